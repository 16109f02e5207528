"""One small Cayley matrix on the CPU, which is computed by fewer operators than a batch of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy import allowed
from tests.cases import CASES, composed, error, fused
from tritonparam.ops.cayley import skew_cayley
from tritonparam.orthogonal_maps import from_left

CAYLEY = next(case for case in CASES if case.name == "cayley")


def signs(*shape: int) -> torch.Tensor:
    return torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize("n", [2, 8, 33, 64])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0, 1e3])
def test_as_exact_as_torch(n, norm):
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        module = CAYLEY.module(CAYLEY.original((n, n), norm, torch.float32))
        module.parametrizations.weight[1].signature.copy_(signs(n))
        g = torch.randn(n, n)
        y64, dw64 = composed(module, g)
        y32, dw32 = composed(module, g, torch.float32)
        y, dw = fused(module, g, "closed")
        errors.append((error(y, y64), error(y32, y64), error(dw, dw64), error(dw32, dw64)))
    value, value32, gradient, gradient32 = torch.tensor(errors).double().square().mean(0).sqrt()
    assert value <= allowed(float(value32))
    assert gradient <= allowed(float(gradient32))


@pytest.mark.parametrize("n", [0, 1, 8, 64])
def test_it_equals_the_same_matrix_in_a_batch(n):
    w = (torch.randn(n, n, dtype=torch.float64) / max(n, 1) ** 0.5).requires_grad_()
    d = signs(n)  # of another dtype
    g, h = torch.randn(2, n, n, dtype=torch.float64)
    results = []
    for view in (w, w.unsqueeze(0)):
        q = skew_cayley(view, d.expand(view.shape[:-1])).view(n, n)
        (dw,) = torch.autograd.grad(q, w, g)
        with_graph = skew_cayley(view, d.expand(view.shape[:-1])).view(n, n)
        (first,) = torch.autograd.grad(with_graph, w, g, create_graph=True)
        (second,) = torch.autograd.grad(first, w, h)
        assert torch.allclose(first, dw, rtol=0, atol=1e-12)
        results.append((q.detach(), dw, second))
    for one, of_batch in zip(*results, strict=True):
        assert one.dtype == torch.float64
        assert torch.allclose(one, of_batch, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nothing_finite_is_left_where_the_original_is_not(bad):
    for n in (2, 5, 64):
        for i, j in ((0, 1), (0, n - 1), (n - 2, n - 1)):
            w = torch.randn(n, n)
            w[i, j] = bad
            assert skew_cayley(w, signs(n)).isnan().all()
    finite = torch.full((4, 4), 1e38)  # the sum of these is not
    assert skew_cayley(finite, torch.ones(4)).isfinite().all()


def torchs(x: torch.Tensor) -> torch.Tensor:
    link = torch.nn.utils.parametrizations.orthogonal(
        torch.nn.Linear(*x.shape), orthogonal_map="cayley", use_trivialization=False
    ).parametrizations.weight[0]
    return link(x)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
def test_torchs_map_is_as_exact_and_as_orthogonal(norm):
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        x = (torch.randn(96, 96) * (norm / 96**0.5)).requires_grad_()
        g = torch.randn(96, 96)
        ys = from_left(None, "cayley", x), torchs(x), torchs(x.double())
        dxs = [torch.autograd.grad(y, x, g.to(y.dtype))[0] for y in ys]
        q, q32, q64 = (y.detach() for y in ys)
        off, off32 = ((y.mT.double() @ y.double() - torch.eye(96)).norm() for y in (q, q32))
        values = error(q, q64), error(q32, q64)
        gradients = (error(dx, dxs[2]) for dx in dxs[:2])
        errors.append((*values, *gradients, float(off), float(off32)))
    ours, theirs = torch.tensor(errors).double().square().mean(0).sqrt().view(3, 2).unbind(1)
    assert all(a <= allowed(float(b)) for a, b in zip(ours[:2], theirs[:2], strict=True))
    assert ours[2] <= theirs[2]


def test_second_derivatives_of_torchs_map_are_torchs():
    x = (torch.randn(70, 70, dtype=torch.float64) / 9).requires_grad_()
    g, h = torch.randn(2, 70, 70, dtype=torch.float64)
    found = []
    for q in (from_left(None, "cayley", x), torchs(x)):
        (dx,) = torch.autograd.grad(q, x, g, create_graph=True)
        found.append((q, dx, torch.autograd.grad(dx, x, h)[0]))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_autocast_and_fp16_compute_in_fp32():
    module = CAYLEY.module(CAYLEY.original((16, 16), 1.0, torch.float16))
    g = torch.randn(16, 16)
    expected = fused(module, g, "closed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused(module, g, "closed")
    for mine, plain in zip(found, expected, strict=True):
        assert torch.equal(mine, plain)
    y64, dw64 = composed(module, g.half())
    assert error(found[0], y64) <= torch.finfo(torch.float16).eps
    assert error(found[1], dw64) <= 2 * torch.finfo(torch.float16).eps
