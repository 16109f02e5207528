"""``cached()``: once per block and thread, and never stale."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import tritonparam as tp


@pytest.fixture
def layer():
    return tp.register_parametrization(nn.Linear(4, 4), "weight", tp.Skew(), tp.CayleyMap())


def reads(layer: nn.Module) -> int:
    """How many evaluations one more read costs."""
    tp.stats(reset=True)
    layer.weight
    return sum(tp.stats().values())


def test_once_per_block(layer):
    assert reads(layer) == reads(layer) == 1
    with tp.cached():
        assert reads(layer) == 1
        assert reads(layer) == 0
        with tp.cached():
            assert reads(layer) == 0
        assert reads(layer) == 0
    assert reads(layer) == 1


def test_composed_chains_too():
    layer = tp.register_parametrization(nn.Linear(4, 4), "weight", tp.Skew())
    with tp.cached():
        assert [reads(layer), reads(layer)] == [1, 0]


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_is_seen(layer, fused):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused)
    with tp.cached():
        layer.weight[0, 1].backward()
        assert reads(layer) == 0
        optimizer.step()
        assert reads(layer) == 1


def test_assignment_load_and_conversion_are_seen(layer):
    q = torch.linalg.qr(torch.randn(4, 4))[0]
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    with tp.cached():
        first = layer.weight
        layer.weight = q
        assert torch.allclose(layer.weight, q, atol=1e-5)
        layer.load_state_dict(state)
        assert torch.equal(layer.weight, first)
        assert layer.double().weight.dtype == torch.float64
        layer.eval()
        assert reads(layer) == 1
        layer.parametrizations.weight[1].signature.neg_()
        assert reads(layer) == 1
        with tp.use_path("composed"):
            assert reads(layer) == 1


def test_a_read_without_gradients_does_not_poison_a_later_one(layer):
    with tp.cached():
        with torch.no_grad():
            assert not layer.weight.requires_grad
        layer.weight.sum().backward()
        assert layer.parametrizations.weight.original.grad is not None
        with torch.inference_mode():
            layer.weight
        assert layer.weight.requires_grad


def test_two_backwards_give_torchs_error(layer):
    with tp.cached():
        layer.weight.square().sum().backward()
        with pytest.raises(RuntimeError, match="a second time"):
            layer.weight.square().sum().backward()


def test_threads_do_not_share(layer):
    seen = []
    with tp.cached():
        reads(layer)
        thread = threading.Thread(target=lambda: seen.extend([reads(layer), reads(layer)]))
        thread.start()
        thread.join()
    assert seen == [1, 1]


def test_freed_modules_never_match():
    with tp.cached():
        for i in range(20):
            layer = tp.register_parametrization(
                nn.Linear(2, 2), "weight", tp.Skew(), tp.CayleyMap()
            )
            with torch.no_grad():
                layer.parametrizations.weight.original.fill_(float(i))
            assert torch.allclose(
                layer.weight, tp.CayleyMap()(tp.Skew()(torch.full((2, 2), float(i))))
            )
            del layer
            gc.collect()


def test_the_block_ends_after_an_error(layer):
    with pytest.raises(ZeroDivisionError), tp.cached():
        layer.weight / (1 // 0)
    assert reads(layer) == reads(layer) == 1


def test_transforms_are_not_cached(layer):
    def loss(original):
        state = {"parametrizations.weight.original": original}
        return torch.func.functional_call(layer, state, (torch.ones(1, 4),)).sum()

    original = layer.parametrizations.weight.original.detach()
    expected = torch.func.grad(loss)(original)
    with tp.cached():
        layer.weight
        assert torch.allclose(torch.func.grad(loss)(original), expected)
        assert reads(layer) == 0


def another() -> nn.Module:
    return tp.register_parametrization(nn.Linear(4, 4), "weight", tp.Skew(), tp.CayleyMap())


def test_of_a_model_only(layer):
    other = another()
    with tp.cached(nn.Sequential(layer, nn.ReLU())):
        assert [reads(layer), reads(layer)] == [1, 0]
        assert [reads(other), reads(other)] == [1, 1]
        with tp.cached(other):
            assert [reads(layer), reads(other), reads(other)] == [0, 1, 0]
        assert [reads(layer), reads(other), reads(other)] == [0, 1, 1]
        with tp.cached(other):
            assert reads(other) == 1
        with tp.cached():
            assert [reads(layer), reads(other), reads(other)] == [0, 1, 0]
    assert reads(layer) == 1
    with tp.cached():
        reads(other)
        with tp.cached(layer):
            assert [reads(layer), reads(other)] == [1, 0]
        assert reads(layer) == 0
    with pytest.raises(TypeError, match="cached: the model must be an nn.Module, got int; pass"):
        tp.cached(3).__enter__()


def test_writing_to_a_kept_weight_is_seen(layer):
    with tp.cached(layer), torch.no_grad():
        expected = layer.weight.clone()
        layer.weight.zero_()
        assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", ["inside", "outside"])
@pytest.mark.parametrize("read_first", [True, False])
def test_activation_checkpoints(layer, reentrant, backward, read_first):
    """Two regions read one weight, one of them twice."""
    original = layer.parametrizations.weight.original
    x = torch.randn(3, 4, requires_grad=True)

    def loss(run):
        scale = layer.weight.sum() if read_first else 1.0
        y = run(lambda x: layer(layer(x).tanh()).tanh(), x)
        return (run(lambda y: layer(y).square(), y) * scale).sum()

    expected = torch.autograd.grad(loss(lambda function, x: function(x)), [original, x])
    with tp.cached(layer):
        value = loss(lambda *args: checkpoint(*args, use_reentrant=reentrant))
        if backward == "inside":
            value.backward()
    if backward == "outside":
        value.backward()
    assert torch.allclose(original.grad, expected[0], atol=1e-5)
    assert torch.allclose(x.grad, expected[1], atol=1e-5)
    assert original.grad.abs().max() > 0


def test_a_checkpoint_keeps_its_checks(layer):
    def region(x):
        return layer(x).square()

    original = layer.parametrizations.weight.original
    with tp.cached(layer):
        value = checkpoint(region, torch.ones(1, 4), use_reentrant=False).sum()
        with torch.no_grad():
            layer.weight = torch.eye(4)
        value.backward()  # torch recomputes with what the weight is now
        expected = torch.autograd.grad(region(torch.ones(1, 4)).sum(), original)
        assert torch.allclose(original.grad, expected[0], atol=1e-6)


def test_a_backward_pass_does_not_read_what_was_kept(layer):
    seen = []
    with tp.cached(layer):
        y = layer(torch.ones(1, 4))
        y.register_hook(lambda g: seen.extend([reads(layer), reads(layer)]))
        y.sum().backward()
        assert reads(layer) == 0
    assert seen == [1, 1]


def test_a_captured_graph_computes_its_own(layer, monkeypatch):
    with tp.cached(layer):
        assert [reads(layer), reads(layer)] == [1, 0]
        monkeypatch.setattr(tp.cache, "_capturing", lambda: True)
        assert [reads(layer), reads(layer)] == [1, 1]
        with tp.cached(layer):
            assert [reads(layer), reads(layer)] == [1, 0]
        monkeypatch.undo()
        assert reads(layer) == 0


def test_a_compiled_model_is_compiled_once(layer):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(2, 4)
    expected = layer(x)
    compiled(x)
    for _ in range(2):
        with tp.cached(layer):
            assert torch.allclose(compiled(x), expected, atol=1e-6)
    assert counter.frame_count == 1
