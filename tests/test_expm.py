"""The exponential where it is hard: overflow, definiteness, many norms in one batch, masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonparam as tp
from tests.cases import error, errors
from tritonparam import exponential, polynomials
from tritonparam.functional import matrix_exp, skew_exp, symmetric_exp
from tritonparam.ops.tall_expm import tall_exp, tall_exp_at


def exact(a):
    """exp of [b, n, n] in fp64; batched, as torch's own is wrong for one matrix (#196592)."""
    a = a.double()
    return torch.matrix_exp(torch.cat((a, torch.zeros_like(a[:1]))))[:-1]


@pytest.mark.parametrize("n", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 6.0])
def test_symmetric_exponentials_are_exactly_symmetric_and_positive_definite(n, norm):
    w = torch.randn(7, n, n)
    s = w.triu() + w.triu(1).mT
    p = symmetric_exp(w * (norm / torch.linalg.matrix_norm(s, 2))[:, None, None])
    assert torch.equal(p, p.mT)
    # exp(S) has a condition of e^12 at most, 100 times less than 1 / eps.
    assert (torch.linalg.eigvalsh(p.double()) > 0).all()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_negative_definite_arguments_keep_their_digits(n):
    s = torch.randn(4, n, n)
    s = -(s @ s.mT) - 20 * torch.eye(n)
    # 8 roundings of e^μ, and 4 eps of the polynomial doubled three times.
    assert errors(symmetric_exp(s), exact(s)).max() <= 32 * 2**-23


def test_a_wide_spread_neither_overflows_nor_vanishes():
    s = torch.diag_embed(torch.tensor([[-400.0, 0.0], [-1e4, 0.0], [-60.0, 60.0], [-1e4, -1e4]]))
    p = symmetric_exp(s)
    # Normwise: the smallest eigenvalues are lost in the rounding of the largest, doubled by
    # each of the 7, or 12, squarings.
    unit = torch.diag(torch.tensor([0.0, 1.0]))
    assert torch.allclose(p[0], unit, rtol=0, atol=2**7 * 2**-23)
    assert torch.allclose(p[1], unit, rtol=0, atol=2**12 * 2**-23)
    assert torch.allclose(p[2, 1, 1].double(), torch.tensor(60.0).double().exp(), rtol=1e-4)
    assert torch.equal(p[3], torch.zeros(2, 2))


@pytest.mark.parametrize("function", [symmetric_exp, matrix_exp])
def test_overflow_is_not_finite_as_torchs(function):
    for a in (torch.eye(3) * 100, torch.ones(4, 4) * 50, torch.full((1, 1), 100.0)):
        ours = function(a)
        assert torch.equal(
            ours.isfinite(), torch.matrix_exp(a[None]).expand(2, -1, -1)[0].isfinite()
        )
        assert ours[0, 0] == torch.inf


@pytest.mark.parametrize("kind", ["skew", "symmetric", "general"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_one_batch_of_many_norms(kind, dtype):
    a = torch.randn(9, 6, 6, dtype=torch.float64)
    a = {"skew": a - a.mT, "symmetric": a + a.mT, "general": a}[kind]
    norms = torch.tensor([0.0, 1e-3, 0.5, 2.0, 5.0, 9.0, 17.0, 33.0, 60.0])[:, None, None].double()
    a = (a * norms / torch.linalg.matrix_norm(a, 2)[:, None, None]).to(dtype)
    together, _ = exponential.expm(a, kind)
    alone = torch.cat([exponential.expm(x[None], kind)[0] for x in a])
    eps = torch.finfo(dtype).eps
    # The same algorithm on each matrix: only the degree may differ, a truncation below eps.
    assert (errors(together, alone.double()) <= 64 * norms.flatten().clamp_min(1) * eps).all()
    assert (errors(together, exact(a)) <= 64 * norms.flatten().clamp_min(1) * eps).all()


@pytest.mark.parametrize("kind", ["skew", "symmetric", "general"])
def test_where_the_host_does_not_look_the_result_is_the_same(kind, monkeypatch):
    # The masks that a GPU needs, taken on this machine by calling it another device.
    a = torch.randn(5, 6, 6)
    a = {"skew": a - a.mT, "symmetric": a + a.mT, "general": a}[kind]
    a = a * torch.tensor([0.0, 0.1, 1.0, 5.0, 9.0])[:, None, None]
    g = torch.randn(5, 6, 6)
    y, saved = exponential.expm(a, kind)
    h = exponential.adjoint(g, saved, kind)
    monkeypatch.setattr(exponential, "on_host", lambda x: False)
    y_masked, saved = exponential.expm(a, kind)
    h_masked = exponential.adjoint(g, saved, kind)
    assert len(saved) == 9 + 2 * exponential._LAUNCHED
    assert torch.allclose(y_masked, y, rtol=1e-5, atol=1e-6 * float(y.abs().max()))
    assert torch.allclose(h_masked, h, rtol=1e-5, atol=1e-5 * float(h.abs().max()))
    too_large = exponential.expm(torch.stack((a[1], a[1] * 1e6)), kind)[0]
    assert too_large[0].isfinite().all()
    assert too_large[1].isnan().all()


@pytest.mark.parametrize("degree", polynomials.TAYLOR)
def test_taylor_coefficients(degree):
    """On a nilpotent shift the polynomial shows its coefficients, 1 / k!."""
    n = degree + 1
    shift = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)[None]
    square = shift @ shift
    p, _ = polynomials.taylor(shift, square, square @ shift, degree)
    expected = 1 / torch.arange(n, dtype=torch.float64).add(1).lgamma().exp()
    assert torch.allclose(p[0, 0], expected, rtol=2e-14, atol=0)


def test_gradients_of_a_mixed_batch():
    w = torch.randn(3, 4, 4, dtype=torch.float64) * torch.tensor([0.1, 2.0, 9.0])[:, None, None]
    w.requires_grad_()
    for function in (skew_exp, symmetric_exp, matrix_exp):
        assert torch.autograd.gradcheck(function, w)
    assert torch.autograd.gradgradcheck(lambda w: skew_exp(w) / 10, w)


def test_a_lone_exponential_inside_a_longer_chain():
    layer = nn.Linear(6, 6)
    mask = torch.ones(6, 6).tril()
    tp.register_parametrization(layer, "weight", tp.Pruning(mask), tp.MatrixExponential())
    x = layer.parametrizations.weight.original.detach() * mask
    assert error(layer.weight.detach()[None], exact(x[None])) <= 1e-6  # norm 1: 8 eps
    row = tp.explain(layer)[0]
    assert row.path == "closed"
    assert row.reason.endswith("Pruning is composed: no rule for this chain")


@pytest.mark.parametrize("norm", [100.0, 1000.0])
def test_tall_exponentials_of_few_directions_are_as_exact_as_the_large_ones(norm, device):
    # Of 8 columns below which there is one row; alone, and at a base point.
    x = torch.zeros(2, 9, 8)
    x[:, 8] = torch.nn.functional.normalize(torch.randn(2, 8)) * norm
    base, g = torch.linalg.qr(torch.randn(2, 9, 8)).Q, torch.randn(2, 9, 8)

    def square(x):
        a = torch.nn.functional.pad(x.double(), (0, 1)).tril(-1)
        return torch.matrix_exp(a - a.mT)[..., :8]

    def square_at(x):
        b, x = base.double(), x.double()
        c = b.mT @ x
        p = x - b @ c
        return torch.matrix_exp(b @ (c - c.mT) @ b.mT / 2 + p @ b.mT - b @ p.mT) @ b

    def value_and_gradient(f, x):
        x = x.detach().requires_grad_()
        y = f(x)
        # Small, for the sake of torch's own gradient.
        return y.detach(), torch.autograd.grad(y, x, g.to(y) * 2.0**-20)[0]

    at = base.to(device)
    pairs = ((tall_exp, square), (lambda x: tall_exp_at(x, at), square_at))
    for ours, theirs in pairs:
        got = value_and_gradient(ours, x.to(device))
        for mine, want in zip(got, value_and_gradient(theirs, x.double()), strict=True):
            # Where all is in fp32: eps times the norm, which is the error of a normal matrix.
            assert error(mine.cpu(), want) <= 2**-23 * norm
