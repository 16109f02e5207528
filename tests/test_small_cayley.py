"""Small orthogonal weights by the Cayley map on the CPU, which few operators compute."""

from __future__ import annotations

import pytest
import torch

import tritonparam as tp
from tests.cases import error
from tritonparam.ops import small_cayley, tall_cayley
from tritonparam.ops.small_cayley import from_left

SHAPES = [(1, 1), (4, 4), (5, 2), (32, 32), (32, 31), (6, 7, 3), (2, 1, 3, 3)]


def reference(x: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    n, k = x.shape[-2:]
    lower = torch.nn.functional.pad(x.tril(-1), (0, n - k))
    a, eye = lower - lower.mT, torch.eye(n, dtype=x.dtype)
    q = torch.linalg.solve(eye - a / 2, eye + a / 2)[..., :k]
    return q if base is None else base @ q


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True], ids=["free", "base"])
@pytest.mark.parametrize("dtype", tp.registry.DTYPES, ids=lambda d: str(d)[6:])
def test_values_and_gradients(shape, with_base, dtype):
    x = (0.5 * torch.randn(shape)).to(dtype).requires_grad_()
    n = shape[-2]
    base = torch.linalg.qr(torch.randn(*shape[:-2], n, n, dtype=torch.float64))[0].to(dtype)
    base = base if with_base else None
    g = torch.randn(shape).to(dtype)
    exact = x.detach().double().requires_grad_()
    want = reference(exact, None if base is None else base.double())
    got = from_left(x, base)
    assert got.is_contiguous()
    assert (got.shape, got.dtype) == (x.shape, dtype)
    tolerance = 8 * torch.finfo(dtype).eps * n**0.5
    assert error(got.detach(), want.detach()) <= tolerance
    dx, dexact = torch.autograd.grad(got, x, g)[0], torch.autograd.grad(want, exact, g.double())[0]
    assert dx.dtype == dtype
    assert float((dx.double() - dexact).norm()) <= tolerance * float(g.double().norm())


@pytest.mark.parametrize("shape", [(3, 3), (4, 2)])
@pytest.mark.parametrize("with_base", [False, True])
def test_two_derivatives(shape, with_base):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = torch.randn(shape[0], shape[0], dtype=torch.float64) if with_base else None
    assert torch.autograd.gradcheck(lambda x: from_left(x, base), x)
    assert torch.autograd.gradgradcheck(lambda x: from_left(x, base), x)


def test_what_is_small():
    assert small_cayley.is_small(torch.ones(32, 3))
    assert not small_cayley.is_small(torch.ones(33, 3))
    assert not small_cayley.is_small(torch.ones(0, 3, 3))
    with tp.use_path("kernel"):
        assert not small_cayley.is_small(torch.ones(3, 3))


@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp"])
def test_small_and_large_are_one_map(orthogonal_map, monkeypatch):
    layer = torch.nn.utils.parametrizations.orthogonal(
        torch.nn.Linear(3, 7).double(), "weight", orthogonal_map
    )
    tp.fuse(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(7, 3))
    small = layer.weight
    monkeypatch.setattr(small_cayley, "_MAX_N", 0)
    monkeypatch.setattr(tall_cayley, "_MAX_CONDITION", 0)  # in fp64 whatever the condition
    tp.stats(reset=True)
    assert torch.allclose(layer.weight, small, rtol=0, atol=1e-13)
    assert tp.stats()["closed"] == 1


def test_what_is_not_finite_is_nan_as_in_torchs_solve():
    x = torch.zeros(4, 4)
    for bad in (torch.nan, torch.inf):
        x[2, 1] = bad
        assert from_left(x, None).isnan().any()
        assert reference(x, None).isnan().any()
