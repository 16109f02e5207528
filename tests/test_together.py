"""``cached(model)`` on the kernels' path: a kind in few launches, each weight with its graph."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

import tritonparam as tp
from tests.cases import error

# How each kind is registered, and the launchers of its kernels.
KINDS = {
    "cayley": (
        lambda layer: tp.register_parametrization(layer, "weight", tp.Skew(), tp.CayleyMap()),
        ("cayley", "cayley"),
    ),
    "skew_exp": (
        lambda layer: tp.register_parametrization(
            layer, "weight", tp.Skew(), tp.MatrixExponential()
        ),
        ("expm", "expm"),
    ),
    "symmetric_exp": (tp.spd, ("expm", "expm")),
    "spectral_norm": (tp.spectral_norm, ("spectral_norm", "spectral_norm")),
    "weight_norm": (tp.weight_norm, ("weight_norm", "weight_norm")),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, device: str, n: int = 5) -> nn.ModuleList:
    """Three layers of a kind, of one shape, and a fourth of another where its kernel groups any."""
    register = KINDS[kind][0]
    layers = [nn.Linear(n, n) for _ in range(3)]
    if kind.endswith("norm"):
        layers.append(nn.Conv2d(3, 4, 2))
    return nn.ModuleList([register(layer) for layer in layers]).to(device)


def originals(model: nn.Module) -> list[torch.Tensor]:
    return [x for name, x in model.named_parameters() if "original" in name]


@pytest.fixture
def launches(monkeypatch):
    """Starts counting how often a kind's launchers are called: forward and backward."""

    def start(kind: str) -> dict[str, int]:
        file, name = KINDS[kind][1]
        kernels = tp.paths.kernels(file)
        counts = {"fwd": 0, "bwd": 0}
        for phase in counts:
            launcher = getattr(kernels, f"{name}_{phase}")

            def counting(*args, launcher=launcher, phase=phase):
                counts[phase] += 1
                return launcher(*args)

            monkeypatch.setattr(kernels, f"{name}_{phase}", counting)
        return counts

    return start


def weights_and_gradients(model, gs, dtype=None):
    weights = [layer.weight for layer in model]
    assert dtype is None or all(w.dtype == dtype for w in weights)
    loss = sum((w * g.to(w.dtype)).sum() for w, g in zip(weights, gs, strict=True))
    return [w.detach() for w in weights], torch.autograd.grad(loss, originals(model))


def random_like_weights(model):
    with torch.no_grad(), tp.use_path("closed"):
        return [torch.randn_like(layer.eval().weight) for layer in model]


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_and_gradients_are_those_of_each(kind, dtype, device, launches):
    model = model_of(kind, device).to(dtype)
    gs = random_like_weights(model)
    model.train()
    reference = deepcopy(model).double()
    if kind == "weight_norm":  # the norms of the rounded directions
        reference.load_state_dict(model.state_dict())
    with tp.use_path("closed"):
        expected = weights_and_gradients(reference, [g.double() for g in gs])
    counts = launches(kind)
    tp.stats(reset=True)
    with tp.use_path("kernel"), tp.cached(model):
        weights, gradients = weights_and_gradients(model, gs, dtype)
    assert counts == {"fwd": 1, "bwd": 1}
    assert tp.stats() == {"kernel": len(model), "closed": 0, "composed": 0}
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2  # a few eps, of entries of up to 10
    for mine, theirs in zip([*weights, *gradients], [*expected[0], *expected[1]], strict=True):
        assert mine.dtype == dtype
        assert mine.shape == theirs.shape
        assert torch.allclose(mine.double(), theirs, rtol=tolerance, atol=tolerance)
    states = zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    assert all(torch.allclose(x.double(), y, atol=tolerance) for x, y in states)  # u and v too


@kinds
def test_each_weight_has_a_backward_pass_of_its_own(kind, device, launches):
    model = model_of(kind, device)
    gs = random_like_weights(model)
    with tp.use_path("kernel"):
        _, expected = weights_and_gradients(model, gs)
        counts = launches(kind)
        with tp.cached(model):
            for layer, g in zip(model, gs, strict=True):
                (layer.weight * g).sum().backward()
            assert counts == {"fwd": 1, "bwd": len(model)}
            for mine, theirs in zip(originals(model), expected, strict=True):
                assert torch.allclose(mine.grad, theirs, atol=1e-5)
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                model[1].weight.sum().backward()
            weight, other = model[0].weight, model[1].weight
        with torch.no_grad():
            originals(model)[0].mul_(2)
        assert weight._version == other._version == 0


@kinds
def test_changes_are_errors_of_the_changed_weight_alone(kind, device):
    model = model_of(kind, device).eval()
    x = originals(model)[0]
    with tp.use_path("closed"):
        (expected,) = torch.autograd.grad(model[0].weight.sum(), x)
    with tp.use_path("kernel"), tp.cached(model):
        first, second, third, *_ = [layer.weight for layer in model]
        with torch.no_grad():
            x.mul_(2)  # of weight norm the norms, of which the value is linear
            if kind == "cayley":  # whose gradient needs the value alone
                first.mul_(2)
        if kind.endswith("exp"):  # has a copy of the original, as composed chains have
            first.sum().backward()
            assert error(x.grad, expected) <= 1e-5
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                first.sum().backward()
        (second.sum() + third.sum()).backward(retain_graph=True)
        third.sum().backward()


@kinds
def test_second_derivatives(kind, device):
    model = model_of(kind, device).eval()
    gs = random_like_weights(model)
    results = []
    for path, dtype in (("closed", torch.float64), ("kernel", torch.float32)):
        copy = deepcopy(model).to(dtype)
        xs = originals(copy)
        with tp.use_path(path), tp.cached(copy):
            loss = sum((m.weight * g.to(dtype)).sum() for m, g in zip(copy, gs, strict=True))
            dxs = torch.autograd.grad(loss, xs, create_graph=True)
            penalty = sum(dx.square().sum() for dx in dxs)
            results.append(torch.autograd.grad(penalty, xs))
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert torch.allclose(mine.double(), theirs, rtol=1e-3, atol=1e-3)


def test_who_goes_together(device, launches):
    model = model_of("cayley", device)
    model.append(KINDS["cayley"][0](nn.Linear(5, 5)).to(device).requires_grad_(False))  # frozen
    model.append(KINDS["cayley"][0](nn.Linear(5, 5)).to(device).double())
    model.append(KINDS["cayley"][0](nn.Linear(4, 4)).to(device))
    longer = KINDS["cayley"][0](nn.Linear(5, 5)).to(device)
    model.append(tp.register_parametrization(longer, "weight", tp.Pruning(torch.ones(5, 5))))
    hooked = KINDS["cayley"][0](nn.Linear(5, 5)).to(device)
    hooked.parametrizations.weight[0].register_forward_hook(lambda *args: None)
    model.append(hooked)
    counts = launches("cayley")

    def reading(layers) -> int:
        before = counts["fwd"]
        for layer in layers:
            layer.weight
        return counts["fwd"] - before

    with tp.use_path("kernel"), tp.cached(model):
        assert reading(model) == 5
        assert not model[3].weight.requires_grad
        assert all(layer.weight.requires_grad for layer in model[:3])
        assert reading(model) == 0
        with torch.no_grad():
            model[1].parametrizations.weight.original.mul_(2)
        assert reading(model) == 1
        torch.optim.SGD(model[1:].parameters(), lr=0.1).step()
        assert reading(model[:3]) == 1
        with torch.no_grad():
            assert reading(model[:3]) == 1
            assert not model[2].weight.requires_grad
        with tp.use_path("closed"):
            assert reading(model) == 0
    with tp.use_path("kernel"), tp.cached():  # of no model
        assert reading(model[:2]) == 2


def test_a_stack_is_bounded(device, launches, monkeypatch):
    model = model_of("cayley", device)
    monkeypatch.setattr(tp.ops.cayley._skew_cayleys, "max_numel", 2 * 25 + 1)
    expected = [layer.weight for layer in model]
    counts = launches("cayley")
    with tp.use_path("kernel"), tp.cached(model), torch.inference_mode():
        weights = [layer.weight for layer in model]
        assert weights[0] is model[0].weight
    assert counts["fwd"] == 2
    for mine, theirs in zip(weights, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_spectral_norm_iterates_once_for_all_and_by_mode(device, launches):
    model = model_of("spectral_norm", device)
    alone = deepcopy(model)
    counts = launches("spectral_norm")
    model[1].eval()
    alone[1].eval()
    with tp.use_path("kernel"):
        expected = [layer.weight for layer in alone]
        assert counts["fwd"] == 4
        with tp.cached(model):
            assert torch.equal(model[0].weight, expected[0])
            assert counts["fwd"] == 5
            assert torch.equal(model[1].weight, expected[1])
            assert all(torch.equal(m.weight, w) for m, w in zip(model, expected, strict=True))
            assert counts["fwd"] == 6
    for x, y in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(x, y)


def test_a_link_of_two_weights_iterates_twice(device, launches):
    model = model_of("spectral_norm", device)[:2]
    model[1].parametrizations.weight[0] = model[0].parametrizations.weight[0]
    counts = launches("spectral_norm")
    with tp.use_path("kernel"), tp.cached(model):
        model[0].weight
        assert counts["fwd"] == 1
        model[1].weight
        assert counts["fwd"] == 2


def test_on_the_cpu_every_weight_by_itself(launches):
    model = model_of("cayley", "cpu")
    tp.stats(reset=True)
    with tp.cached(model):
        model[0].weight
        assert tp.stats() == {"kernel": 0, "closed": 1, "composed": 0}
