"""torch around a fused weight: compile, export, transforms, autocast, double backward, DDP."""

from __future__ import annotations

import pickle
import socket
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tritonparam as tp
from tests.cases import CASES, composed, error, fused

chains = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def layer_of(n: int = 5) -> nn.Module:
    return tp.register_parametrization(nn.Linear(n, n), "weight", tp.Skew(), tp.CayleyMap())


@chains
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compile_fullgraph(case, backend, dtype, device):
    torch.compiler.reset()  # every case compiles the same code object anew
    module = case.module(case.original(case.shape(6), 1.0, dtype).to(device))
    originals = list(module.parametrizations.weight.parameters())

    def loss(x):
        return (module.weight @ x).square().sum()

    x = torch.randn(6, 3, device=device).to(dtype)
    expected = torch.autograd.grad(loss(x), originals)
    tp.stats(reset=True)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for _ in range(2):
        value = compiled(x)
        gradient = torch.autograd.grad(value, originals)
        assert torch.allclose(value, loss(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
        for dw, dw_eager in zip(gradient, expected, strict=True):
            assert torch.allclose(dw, dw_eager, atol=tolerance)
    assert tp.stats()["composed"] == 0
    assert tp.stats()[case.paths[-1] if device == "cuda" else "closed"] >= 4  # half of them eager
    with torch.no_grad():
        assert torch.allclose(compiled(x), loss(x), rtol=1e-2)


def test_custom_operator_contract(device):
    case = CASES[0]
    w = case.original((2, 4, 4), 1.0, torch.float32).to(device).requires_grad_()
    d = torch.ones(2, 4, device=device)
    torch.library.opcheck(torch.ops.tritonparam.skew_cayley.default, (w, d))
    half = w.detach().bfloat16().requires_grad_()
    torch.library.opcheck(torch.ops.tritonparam.skew_cayley.default, (half, d.bfloat16()))
    for shape in ((3, 160, 160), (33, 48, 48), (400, 400)):  # every algorithm of the closed form
        large = case.original(shape, 1.0, torch.float32).to(device)
        ones = torch.ones(shape[:-1], device=device)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.tritonparam.skew_cayley.default, (large, ones), test_utils=tests
        )
    args = (torch.randn_like(w), w.detach(), half.detach(), d)
    torch.library.opcheck(torch.ops.tritonparam.skew_cayley_backward.default, args)


def _arguments(device):
    """Every other operator, with arguments of two kinds of shapes."""
    square = torch.randn(2, 4, 4, device=device)
    tall = torch.randn(2, 7, 3, device=device)
    base = torch.linalg.qr(torch.randn_like(tall))[0]
    for name in ("skew_exp", "symmetric_exp", "matrix_exp"):
        yield name, (square,)
    yield "tall_exp", (tall,)
    yield "householder", (tall,)
    yield "tall_cayley", (tall, 0.5)
    yield "tall_exp_at", (tall, base)
    yield "householder_at", (tall, base)
    yield "tall_cayley_at", (tall, base, 0.5)


def test_custom_operators_of_all_maps(device):
    for name, args in _arguments(device):
        x, *rest = args
        op = getattr(torch.ops.tritonparam, name).default
        torch.library.opcheck(op, (x.clone().requires_grad_(), *rest))
        torch.library.opcheck(op, (x.bfloat16().requires_grad_(), *rest))
        backward = getattr(torch.ops.tritonparam, f"{name}_backward").default
        torch.library.opcheck(backward, (torch.randn_like(x), op(*args), *args))


def test_export():
    layer = layer_of()
    x = torch.randn(2, 5)
    exported = torch.export.export(layer, (x,))
    assert torch.allclose(exported.module()(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_does_not_reach_into_the_map(dtype, device):
    layer = layer_of(16).to(device)
    expected = layer.weight
    g = torch.randn(16, 16, device=device)
    original = layer.parametrizations.weight.original
    (dw,) = torch.autograd.grad(expected, original, g)
    for path in ("closed", "composed"):
        with torch.autocast(device, dtype), tp.use_path(path):
            weight = layer.weight
            assert torch.allclose(weight, expected, atol=1e-6)
            assert weight.dtype == torch.float32
            if path == "closed":  # torch's own backward is not protected
                (inside,) = torch.autograd.grad(weight, original, g)
                assert torch.allclose(inside, dw, atol=1e-5)
            assert layer(torch.randn(2, 16, device=device)).dtype == dtype


@chains
def test_create_graph_and_double_backward(case, device):
    shape = case.shape(5, 2)
    module = case.module(case.original(shape, 1.0, torch.float32).to(device))
    g = torch.randn(shape, device=device)
    results = []
    for path, dtype in (("composed", torch.float64), ("closed", torch.float32)):
        copy = deepcopy(module).to(dtype)
        xs = list(copy.parametrizations.weight.parameters())
        with tp.use_path(path):
            dxs = torch.autograd.grad((copy.weight * g).sum(), xs, create_graph=True)
        penalty = sum(dx.square().sum() for dx in dxs)
        results.append(torch.autograd.grad(penalty, xs))
    assert all(dx.is_contiguous() for dx in results[1])
    if case.name == "weight_norm":
        pytest.skip("torch holds the norms constant; test_norms has the second derivatives")
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert error(mine, theirs) <= 1e-5


@chains
@pytest.mark.parametrize("default", [torch.float64, "meta"], ids=str)
def test_the_defaults_of_the_program_do_not_matter(case, default):
    shape = case.shape(5) if case.form == "layer" else case.shape(5, 3)
    w = case.original(shape, 1.0, torch.float32)
    if case.form != "layer" and case.max_norm > 100:
        w = w * torch.tensor([1.0, 10.0, 100.0])[:, None, None]  # of several scales
    module = case.module(w)
    g = torch.randn(shape)
    expected = fused(module, g, "closed")
    before = torch.get_default_dtype()
    try:
        if default == "meta":
            with torch.device("meta"):
                found = fused(module, g, "closed")
        else:
            torch.set_default_dtype(default)
            found = fused(module, g, "closed")
    finally:
        torch.set_default_dtype(before)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


@chains
def test_an_optimizer_may_step_before_the_backward_pass(case, device):
    w = case.original(case.shape(3), 1.0, torch.float32).to(device)
    wide = (w.mT.contiguous(),) if case.form == "tall" and not case.base else ()
    for original in (w, *wide):
        module = case.module(original)
        g = torch.randn(original.shape, device=device)
        for path in case.paths:
            if not case.runs(path, 3):
                continue
            xs = list(module.parametrizations.weight.parameters())
            _, expected = fused(module, g, path)
            with tp.use_path(path):
                y = module.weight
            before = [x.detach().clone() for x in xs]
            with torch.no_grad():
                for x in xs:
                    x.mul_(2)
            if case.form == "layer":  # of norms torch, too, needs the original itself
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(y, xs, g)
            else:
                (found,) = torch.autograd.grad(y, xs, g)
                assert error(found, expected) <= 1e-6
            with torch.no_grad():
                for x, old in zip(xs, before, strict=True):
                    x.copy_(old)


def test_fake_tensors_and_make_fx_see_the_links():
    layer = layer_of()
    x = torch.randn(2, 5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (2, 5)
        assert "fake tensors" in tp.explain(layer)[0].reason
    assert torch.allclose(make_fx(layer)(x)(2 * x), layer(2 * x), atol=1e-6)
    assert tp.explain(layer)[0].path == "closed"


class Scaled(nn.Module):
    """Reads a weight in a forward of its own, and holds another itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.matrix = layer_of(), nn.Parameter(torch.randn(5, 5))
        tp.register_parametrization(self, "matrix", tp.Symmetric(), tp.MatrixExponential())

    def forward(self, x):
        return x @ self.inner.weight.mT @ self.matrix


def encoder_layer():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    nn.utils.parametrizations.orthogonal(layer.self_attn.out_proj)
    return nn.Sequential(layer)


@pytest.mark.parametrize(("make", "n"), [(Scaled, 5), (encoder_layer, 4)])
def test_symbolic_traces_are_torchs_and_keep_no_weight(make, n):
    module, x = make(), torch.randn(2, 3, n)
    theirs = torch.fx.symbolic_trace(tp.unfuse(module))
    traced = torch.fx.symbolic_trace(tp.fuse(module))
    assert [str(node) for node in traced.graph.nodes] == [str(node) for node in theirs.graph.nodes]
    assert traced.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for w in module.parameters():
            w.mul_(0.5)
    tp.stats(reset=True)
    assert torch.allclose(traced(x), module(x), atol=1e-6)
    assert tp.stats()["composed"] == 0
    if make is Scaled:  # whose lists alone are in the graph, not what torch refuses to pickle
        assert torch.equal(pickle.loads(pickle.dumps(traced))(x), traced(x))


def test_functional_transforms_fall_back():
    layer = layer_of()
    x = torch.randn(3, 5)
    state = {k: v.detach() for k, v in layer.state_dict().items()}

    def loss(state):
        return torch.func.functional_call(layer, state, (x,)).square().sum()

    tp.stats(reset=True)
    loss(state)
    assert tp.stats()["closed"] == 1
    expected = torch.autograd.grad(layer(x).square().sum(), layer.parametrizations.weight.original)
    gradient = torch.func.grad(loss)(state)["parametrizations.weight.original"]
    assert torch.allclose(gradient, expected[0], atol=1e-5)
    name = "parametrizations.weight.original"

    def of_original(original):
        return loss({**state, name: original})

    tangent = torch.randn(5, 5)
    _, forward = torch.func.jvp(of_original, (state[name],), (tangent,))
    assert torch.allclose(forward, (gradient * tangent).sum(), rtol=1e-4)
    many = torch.stack([state[name], state[name] + 1])
    values = torch.func.vmap(of_original)(many)
    assert torch.allclose(values, torch.stack([of_original(m) for m in many]), rtol=1e-4)
    assert tp.stats()["composed"] == 3
    with torch.autograd.forward_ad.dual_level():
        row = tp.explain(layer)[0]
    assert (row.path, row.reason) == ("composed", "forward-mode differentiation is active")


def test_meta_device_then_load():
    with torch.device("meta"):
        layer = layer_of()
    assert layer.weight.is_meta
    source = layer_of()
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer.weight, source.weight)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer.weight, source.weight)


def test_averaged_model():
    layer = layer_of()
    layer(torch.ones(1, 5)).sum().backward()
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(layer)
    assert torch.allclose(averaged.module.weight, layer.weight)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _ddp_worker(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), layer_of(4), nn.Linear(4, 4))
    ddp = nn.parallel.DistributedDataParallel(model)
    x = torch.full((1, 4), float(rank + 1))
    seen = []

    def step():
        ddp.zero_grad()
        ddp(x).square().sum().backward()
        seen.append([p.grad.clone() for p in model.parameters()])

    step()
    tp.register_parametrization(model[0], "weight", tp.Skew(), tp.CayleyMap())
    step()
    model[1].weight = torch.linalg.qr(torch.arange(16.0).reshape(4, 4).cos())[0]
    step()
    tp.remove_parametrizations(model[1], "weight")
    step()
    assert tp.stats()["closed"] > 0
    results[rank] = [[g.tolist() for g in gradients] for gradients in seen]
    torch.distributed.destroy_process_group()


def test_ddp_stays_in_sync_after_registration_assignment_and_removal():
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_ddp_worker, (_free_port(), results), nprocs=2)
        assert results[0] == results[1]
        assert len(results[0]) == 4


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "cayley"], ids=lambda c: c.name)
def test_a_weight_may_be_written_to(case, device):  # Cayley's backward needs the value, see below
    w = case.original(case.shape(3), 1.0, torch.float32).to(device)
    module = case.module(w)
    g = torch.randn(w.shape, device=device)
    for path in case.paths:
        if case.runs(path, 3):
            _, expected = fused(module, 2 * g, path)
            with tp.use_path(path):
                weight = module.weight
                weight.mul_(2)
                xs = list(module.parametrizations.weight.parameters())
                grads = torch.autograd.grad(weight, xs, g)
            found = grads[0] if len(xs) == 1 else torch.cat([x.flatten() for x in grads])[None]
            assert error(found, expected) <= 1e-6


def test_writing_to_a_weight_before_its_backward_is_torchs_error(device):
    case = CASES[0]
    g = torch.randn(3, 5, 5, device=device)
    module = case.module(case.original((3, 5, 5), 1.0, torch.float32).to(device))
    y, dw = fused(module, g, "closed")
    y64, dw64 = composed(module, g)
    assert max(error(y, y64), error(dw, dw64)) <= 1e-6
    weight = module.weight
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weight.sum().backward()
