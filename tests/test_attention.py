"""Attention: torch's values, every weight evaluated once per forward, on its fast path too."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

import tritonparam as tp
from tests.counted import assert_same, calls, constrained

LAYOUTS = {
    "plain": ({}, ("in_proj_weight",)),
    "both": ({}, ("in_proj_weight", "out_proj.weight")),
    "output": ({}, ("out_proj.weight",)),
    "separate": (
        {"kdim": 3, "vdim": 5},
        ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
    ),
}


def attention(layout: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """One constrained by torch, and its query, key and value: the same where they can be."""
    options, names = LAYOUTS[layout]
    module = constrained(nn.MultiheadAttention(4, 2, batch_first=True, **options), *names)
    q = torch.randn(2, 3, 4, dtype=torch.float64)
    if layout == "separate":
        return module, (q, q[..., :3], torch.randn(2, 3, 5, dtype=torch.float64))
    return module, (q, q, q)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_torchs_and_evaluates_once(layout):
    module, qkv = attention(layout)
    once = tp.fuse(deepcopy(module))
    ones = [1] * len(calls(once))
    for mode in (True, False):
        module.train(mode)
        once.train(mode)
        calls(once)
        assert_same(once, module, *qkv)
        assert calls(once) == ones
        with torch.no_grad():  # without gradients and in eval mode this is the fast path
            y = once(*qkv)[0]
            assert calls(once) == ones
            assert torch.allclose(y, module(*qkv)[0])
    with torch.no_grad(), torch.inference_mode():
        assert torch.allclose(once(*qkv, need_weights=False)[0], y)


def test_the_fast_path_is_taken(monkeypatch):
    module, qkv = attention("both")
    tp.fuse(module).eval()
    taken = []
    native = torch._native_multi_head_attention

    def spy(*args):
        taken.append(args)
        return native(*args)

    monkeypatch.setattr(torch, "_native_multi_head_attention", spy)
    with torch.no_grad():
        module(*qkv)
    assert len(taken) == 1


def test_fused_chains_and_a_block_around():
    module = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    tp.orthogonal(module, "in_proj_weight", "cayley")
    q = torch.randn(2, 3, 4)
    tp.stats(reset=True)
    module(q, q, q)[0].sum().backward()
    assert tp.stats(reset=True) == {"kernel": 0, "closed": 1, "composed": 0}
    with tp.cached():
        module(q, q, q), module(q, q, q)
        with torch.no_grad():
            module(q, q, q)
    assert tp.stats()["closed"] == 2
    assert module.parametrizations.in_proj_weight.original.grad.norm() > 0


@pytest.mark.parametrize("layout", ["both", "output"])
def test_unfuse_and_removal_give_torchs_back(layout):
    module, qkv = attention(layout)
    module.eval()
    calls(module)
    y = module(*qkv)[0]
    before = calls(module)
    assert tp.unfuse(tp.fuse(module))(*qkv)[0].equal(y)
    assert calls(module) == before
    assert repr(tp.fuse(module)) == repr(tp.unfuse(deepcopy(module)))
    for owner, name in ((module, "in_proj_weight"), (module.out_proj, "weight")):
        if tp.is_parametrized(owner, name):
            tp.remove_parametrizations(owner, name)
    assert torch.allclose(pickle.loads(pickle.dumps(module))(*qkv)[0], y)
    assert type(tp.unfuse(module)) is nn.MultiheadAttention


def encoder_layer() -> nn.Module:
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight")
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return constrained(layer, *names)


def test_a_layer_around_it_evaluates_once():
    layer, x = encoder_layer(), torch.randn(2, 3, 4, dtype=torch.float64)
    once = tp.fuse(deepcopy(layer))
    assert isinstance(once, nn.TransformerEncoderLayer)
    for mode in (True, False):
        layer.train(mode)
        once.train(mode)
        calls(once)
        assert_same(once, layer, x)
        assert calls(once) == [1, 1, 1]
    with torch.no_grad():
        assert torch.allclose(once(x), layer(x))
    assert calls(once) == [1, 1, 1]
    assert repr(once) == repr(layer)
    assert type(tp.unfuse(once)) is nn.TransformerEncoderLayer


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_of_layers_evaluates_once(masked):
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    once = tp.fuse(deepcopy(encoder))
    x, mask = torch.randn(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 2] = True
    options = {"src_key_padding_mask": mask} if masked else {}
    with torch.no_grad():
        expected = encoder(x, **options)
        calls(once)
        assert torch.allclose(once(x, **options), expected)
    assert calls(once) == [1] * 6
    once.train()(x, **options).sum().backward()
    assert calls(once) == [1] * 6
    assert type(tp.unfuse(once)) is nn.TransformerEncoder


def test_layers_of_an_encoder_that_share_a_module_iterate_one_after_another():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    torch.nn.utils.parametrizations.spectral_norm(layer.linear1)
    encoder = nn.TransformerEncoder(layer, 3)
    encoder.layers = nn.ModuleList([layer] * 3)
    once, x = tp.fuse(deepcopy(encoder)), torch.randn(2, 3, 4)
    for training in (True, False):
        assert torch.allclose(once.train(training)(x), encoder.train(training)(x), atol=1e-6)
    for a, b in zip(encoder.buffers(), once.buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_compiled():
    torch.compiler.reset()
    module, qkv = attention("both")
    tp.fuse(module)
    ones = [1] * len(calls(module))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(compiled, module, *qkv)
    calls(module)
    compiled(*qkv)
    assert calls(module) == ones
    exported = torch.export.export(module, qkv)
    assert torch.allclose(exported.module()(*qkv)[0], module(*qkv)[0])


def test_a_compiled_layer_around_it():
    torch.compiler.reset()
    layer, x = tp.fuse(encoder_layer()).eval(), torch.randn(2, 3, 4, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), layer(x))
    calls(layer)
    compiled(x)
    assert calls(layer) == [1, 1, 1]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_subclass_that_forwards_with_and_without_gradients(compiled):
    class Both(nn.MultiheadAttention):
        def forward(self, q):
            with torch.no_grad():
                first = super().forward(q, q, q)[0]
            return first + super().forward(q, q, q)[0]

    torch.compiler.reset()
    module = tp.fuse(constrained(Both(4, 2), "in_proj_weight", "out_proj.weight"))
    calls(module)
    run = torch.compile(module, fullgraph=True, backend="eager") if compiled else module
    run(torch.randn(3, 2, 4, dtype=torch.float64)).sum().backward()
    assert calls(module) == [2, 2]
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, nn.RNN])
def test_transforms(kind):
    module = kind(4, 2).double()
    name = "in_proj_weight" if kind is nn.MultiheadAttention else "weight_ih_l0"
    tp.orthogonal(module, name, "cayley")
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    args = (x, x, x) if kind is nn.MultiheadAttention else (x,)
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(module, parameters, args)[0].square().sum()

    tp.stats(reset=True)
    found = torch.func.grad(loss)(parameters)
    assert tp.stats()["composed"] == 1
    loss(dict(module.named_parameters())).backward()
    for key, p in module.named_parameters():
        assert torch.allclose(found[key], p.grad)
    assert torch.allclose(module(*args)[0].square().sum(), loss(parameters))


def test_copies_after_training():
    module, qkv = attention("both")
    tp.fuse(module)
    module(*qkv)[0].sum().backward()
    averaged = torch.optim.swa_utils.AveragedModel(module)
    averaged.update_parameters(module)
    assert averaged.module(*qkv)[0].equal(module(*qkv)[0])
    calls(averaged)
    averaged(*qkv)
    assert calls(averaged) == [1, 1]
