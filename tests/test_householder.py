"""Products of reflectors by compact WY, against torch.linalg.householder_product in fp64."""

from __future__ import annotations

import pytest
import torch

import tritonparam as tp
from tests.cases import error, errors, through
from tests.tall import EMPTY, SHAPES, strided
from tritonparam.ops.householder import householder, householder_at
from tritonparam.orthogonal import reflectors

NORMS = (1e-3, 0.03, 1.0, 30.0, 1e3)


def signs(x):
    return torch.where(x.detach().diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(x.dtype)


def product(x):
    """torch's map with signs in the place of truncation."""
    a = x.tril(-1)
    tau = 2 / (1 + a.square().sum(-2))
    q = torch.linalg.householder_product(a, tau) * signs(x).unsqueeze(-2)
    return q.contiguous()  # LAPACK's is by columns


def full(base):
    """The n×n matrix that a base stands for: all of the product, times blockdiag(D, I)."""
    n, k = base.shape[-2:]
    a = torch.zeros(*base.shape[:-2], n, n, dtype=base.dtype)
    a[..., :k] = base.tril(-1)
    tau = 2 / (1 + a[..., :k].square().sum(-2))
    h = torch.linalg.householder_product(a, tau)
    return h * torch.cat([signs(base), torch.ones(*base.shape[:-2], n - k)], -1).unsqueeze(-2)


def check(x, g, base=None):
    """Value and gradient are those of the n×n formula, in fp64.

    The tolerance is 200 eps: as many roundings as the longest sum has terms, at their worst.
    """
    ours, reference = householder, product
    if base is not None:
        h = full(base)
        ours, reference = lambda x: householder_at(x, base), lambda x: h @ product(x)
    assert x.dtype == torch.float64
    for out, want in zip(through(ours, x, g), through(reference, x, g), strict=True):
        assert error(out, want) <= 200 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_product(shape, norm):
    x = norm * torch.randn(shape, dtype=torch.float64)
    check(x, torch.randn_like(x))
    check(x, torch.randn_like(x), base=torch.randn_like(x))


@pytest.mark.parametrize("shape", EMPTY)
def test_empty(shape):
    x = torch.randn(shape)
    through(householder, x, x)
    through(lambda x: householder_at(x, x.detach()), x, x)
    assert reflectors(x).shape == shape


def test_any_strides():
    for x in strided():
        assert not x.is_contiguous()
        check(x, torch.randn_like(x).mT.contiguous().mT)
        check(x, torch.randn_like(x), base=x.flip(-1))
    x = torch.randn(9, 4, dtype=torch.float64)
    check(x, torch.ones((), dtype=torch.float64).expand(9, 4))


def test_diagonal_is_a_sign():
    x = torch.randn(5, 4, dtype=torch.float64)
    x.diagonal().copy_(torch.tensor([0.4, -0.4, 0.0, -0.0]))
    q, dx = through(householder, x, torch.randn_like(x))
    x.diagonal().copy_(torch.tensor([1.0, -7.0, 1.0, 1.0]))
    assert torch.equal(q, householder(x))
    assert not dx.triu().any()


def test_above_the_diagonal_nothing_is_read():
    x, g = torch.randn(6, 4), torch.randn(6, 4)
    above = torch.where(torch.ones(6, 4).triu(1) > 0, torch.nan, x)
    for out, want in zip(through(householder, above, g), through(householder, x, g), strict=True):
        assert torch.equal(out, want)


def nearly_parallel(n, k):
    return torch.randn(n, 1) + 0.03 * torch.randn(n, k)


@pytest.mark.parametrize("norm", [*NORMS, "parallel"])
@pytest.mark.parametrize("shape", [(5, 3), (17, 17), (65, 64), (300, 40), (130, 130)])
def test_fp32_is_as_exact_as_torch(shape, norm):
    x = nearly_parallel(*shape) if norm == "parallel" else norm * torch.randn(shape)
    g = torch.randn(shape)
    exact = through(product, x.double(), g)
    # 5e-7, eight roundings to fp32, where torch happens to be nearly exact.
    for out, baseline, want in zip(
        through(householder, x, g), through(product, x, g), exact, strict=True
    ):
        assert error(out, want) <= max(1.5 * error(baseline, want), 5e-7)
    # The same roundings, and those of the base.
    base = torch.randn(shape)
    exact = through(lambda x: full(base.double()) @ product(x), x.double(), g)
    for out, want in zip(through(lambda x: householder_at(x, base), x, g), exact, strict=True):
        assert error(out, want) <= 1.5e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(17, 17), (65, 64), (400, 30)])
def test_columns_are_orthonormal(shape, norm):
    x = norm * torch.randn(shape)
    eye = torch.eye(shape[-1])
    for q in (householder(x), householder_at(x, norm * torch.randn(shape))):
        # Twice the error of q, at most 5e-7, relative to |I| = √k.
        assert error(q.double().mT @ q.double(), eye) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype):
    x, g, base = (torch.randn(2, 9, 4).to(dtype) for _ in range(3))
    for function in (householder, lambda x: householder_at(x, base)):
        want = through(function, x.float(), g.float())
        for out, exact in zip(through(function, x, g), want, strict=True):
            assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(6, 1), (2, 2)])
def test_nan_stays_in_its_matrix(place, bad):
    x, g, base = torch.randn(3, 3, 7, 5)
    for function in (householder, lambda x: householder_at(x, base)):
        clean = through(function, x, g)
        broken = x.clone()
        broken[1][place] = bad
        for out, want in zip(through(function, broken, g), clean, strict=True):
            assert out[1].isnan().any()
            assert torch.equal(out[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("shape", [(4, 4), (5, 2), (2, 4, 3)])
def test_gradcheck(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = torch.randn_like(x)
    for function in (householder, lambda x: householder_at(x, base)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_create_graph_gives_the_same_gradient(dtype):
    x, g, base = (torch.randn(20, 6).to(dtype) for _ in range(3))
    for function in (householder, lambda x: householder_at(x, base)):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(function(leaf), leaf, g, create_graph=True)
        assert dx.requires_grad
        # The same operators run, on the same numbers.
        assert torch.equal(dx, through(function, x, g)[1])


def test_gradient_is_linear():
    x, g, base = torch.randn(3, 40, 7)
    for function in (householder, lambda x: householder_at(x, base)):
        _, dx = through(function, x, g)
        for scale in (2.0**-20, 2.0**20):
            assert torch.equal(through(function, x, scale * g)[1], scale * dx)


def test_compiles():
    x, g, base = torch.randn(3, 2, 9, 4)
    for function in (householder, lambda x: householder_at(x, base)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for out, want in zip(through(compiled, x, g), through(function, x, g), strict=True):
            assert torch.equal(out, want)


@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (9, 4), (40, 40), (3, 9, 4)])
def test_reflectors_invert(shape):
    q = torch.linalg.qr(torch.randn(shape, dtype=torch.float64)).Q
    x = reflectors(q)
    assert x.dtype == torch.float64
    assert not x.triu(1).any()
    assert errors(householder(x), q).max() <= 1e-13  # 450 eps: two products of k ≤ 40 reflectors
    assert errors(householder(reflectors(q.float()).float()), q).max() <= 1e-6  # 8 eps
    # tau == 0: no reflection in LAPACK.
    e = torch.eye(*shape[-2:], dtype=torch.float64).expand(shape)
    for unit in (e, -e):
        assert torch.equal(householder(reflectors(unit)), unit)


@pytest.mark.parametrize("shape", [(4, 4), (9, 4), (3, 9, 4), (300, 40)])
def test_at_minus_identity_is_the_base(shape):
    base = torch.randn(shape)
    minus = torch.zeros(shape)
    minus.diagonal(dim1=-2, dim2=-1).fill_(-1)
    assert torch.equal(householder_at(minus, base), householder(base))


def test_path_is_counted():
    x = torch.randn(5, 3)
    householder(x)
    householder_at(x, x)
    assert tp.stats() == {"kernel": 0, "closed": 2, "composed": 0}
    with tp.use_path("kernel"), pytest.raises(RuntimeError, match="the kernel cannot run because"):
        householder(torch.randn(258, 257))
