"""Gradients of a batch at once, as vectorized jacobians ask for them: those of torch's chains."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs

import tritonparam as tp


def linear(n: int, k: int) -> nn.Module:
    return nn.Linear(k, n, bias=False, dtype=torch.float64)


def householder(n: int, k: int, base: bool) -> nn.Module:
    return theirs.orthogonal(linear(n, k), "weight", "householder", use_trivialization=base)


LAYERS = {
    "cayley": lambda: tp.register_parametrization(
        linear(4, 4), "weight", tp.Skew(), tp.CayleyMap()
    ),
    "symmetric_exp": lambda: tp.register_parametrization(
        linear(4, 4), "weight", tp.Symmetric(), tp.MatrixExponential()
    ),
    "tall_exp": lambda: theirs.orthogonal(linear(5, 3), "weight", "matrix_exp"),
    "householder": lambda: householder(4, 4, True),
    "householder_free": lambda: householder(5, 3, False),
    "spectral_norm": lambda: theirs.spectral_norm(linear(4, 3)).eval(),
    "spectral_norm_1": lambda: theirs.spectral_norm(
        nn.Conv2d(2, 3, 2, dtype=torch.float64), dim=1
    ).eval(),
    "weight_norm": lambda: theirs.weight_norm(linear(4, 3)),
    "weight_norm_all": lambda: theirs.weight_norm(linear(4, 3), dim=None),
}


def batched(layer: nn.Module, second: bool) -> tuple[torch.Tensor, ...]:
    """Of the weight, or of its gradient: the gradients for three directions."""
    y, xs = layer.weight, list(layer.parametrizations.weight.parameters())
    generator = torch.Generator().manual_seed(1)
    if second:
        g = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        y = torch.autograd.grad(y, xs, g, create_graph=True)[-1]
    gs = torch.randn(3, *y.shape, generator=generator, dtype=y.dtype)
    return torch.autograd.grad(y, xs, gs.to(y.device), is_grads_batched=True)


@pytest.mark.parametrize("name", LAYERS)
def test_batched_gradients_are_the_composed_chains(name):
    layer = LAYERS[name]()
    with torch.no_grad():
        for x in layer.parametrizations.weight.parameters():
            x.mul_(1.25)
    twin = tp.fuse(copy.deepcopy(tp.unfuse(layer)), strict=True)
    # torch's second derivative of weight_norm on the CPU is wrong, of householder it has none.
    alone = "householder" in name or name == "weight_norm"
    for second in (False,) if alone else (False, True):
        tp.stats(reset=True)
        pairs = zip(batched(twin, second), batched(layer, second), strict=True)
        assert tp.stats() == {"kernel": 0, "closed": 1, "composed": 0}
        assert all(torch.allclose(x, y, rtol=0, atol=1e-12) for x, y in pairs)


@pytest.mark.parametrize("name", ["cayley", "spectral_norm_1", "weight_norm"])
@pytest.mark.parametrize("grouped", [False, True])
def test_kernels_take_them_one_by_one(name, grouped, device):
    pytest.importorskip("triton")
    layer = LAYERS[name]().to(device)
    model = nn.ModuleList([tp.fuse(layer), tp.fuse(copy.deepcopy(layer))])
    with tp.use_path("closed"):
        expected = batched(layer, False)
    tp.stats(reset=True)
    with tp.use_path("kernel"), tp.cached(model) if grouped else nullcontext():
        found = batched(layer, False)
    assert tp.stats() == {"kernel": 2 if grouped else 1, "closed": 0, "composed": 0}
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-12)


def test_a_vectorized_jacobian_is_the_loops():
    layer = tp.fuse(LAYERS["weight_norm"]())
    plist = layer.parametrizations.weight

    def weight(g, v):
        return torch.func.functional_call(plist, {"original0": g, "original1": v}, ())

    xs = (plist.original0, plist.original1)
    loop, vectorized = (
        torch.autograd.functional.jacobian(weight, xs, vectorize=v) for v in (False, True)
    )
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(loop, vectorized, strict=True))
