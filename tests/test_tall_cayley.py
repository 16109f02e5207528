"""The Cayley map of a tall matrix by its k×k system, against the n×n system in fp64."""

from __future__ import annotations

import pytest
import torch

import tritonparam as tp
from tests.cases import error, through
from tests.tall import EMPTY, SHAPES, strided
from tritonparam import numerics
from tritonparam.ops import tall_cayley as ops
from tritonparam.ops.tall_cayley import tall_cayley, tall_cayley_at

NORMS = (1e-3, 0.3, 1.0, 10.0, 30.0, 100.0, 1e3)


def cayley(a, scale):
    eye = torch.eye(a.size(-1), dtype=a.dtype)
    return numerics.solve(eye - scale * a, eye + scale * a)


def embedded(x, scale=0.5):
    """torch's map: the n×n system, of which k columns are kept."""
    n, k = x.shape[-2:]
    x = torch.cat([x.tril(), x.new_zeros(*x.shape[:-2], n, n - k)], -1)
    return cayley(x - x.mT, scale)[..., :k].contiguous()


def embedded_at(x, b, scale=0.5):
    c = b.mT @ x
    p = x - b @ c
    return cayley(b @ (c - c.mT) @ b.mT / 2 + p @ b.mT - b @ p.mT, scale) @ b


def random(shape, norm, dtype=torch.float64):
    """Of this spectral norm."""
    x = torch.randn(shape, dtype=torch.float64)
    return (x * (norm / torch.linalg.matrix_norm(x, 2)[..., None, None])).to(dtype)


def orthonormal(shape, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64)).Q.contiguous().to(dtype)


def check(x, g, base=None, scale=0.5):
    """Value and gradient are those of the n×n system, in fp64.

    1e-12 is 4500 eps: the systems here have a condition of up to 50.
    """
    assert x.dtype == torch.float64
    if base is None:
        ours, reference = lambda x: tall_cayley(x, scale), lambda x: embedded(x, scale)
    else:
        ours = lambda x: tall_cayley_at(x, base, scale)  # noqa: E731
        reference = lambda x: embedded_at(x, base, scale)  # noqa: E731
    for out, want in zip(through(ours, x, g), through(reference, x, g), strict=True):
        assert error(out, want) <= 1e-12


@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_n_by_n_system(shape, norm):
    x = random(shape, norm)
    check(x, torch.randn_like(x))
    check(x, torch.randn_like(x), base=orthonormal(shape))
    check(x, torch.randn_like(x), scale=1.0)
    check(x, torch.randn_like(x), base=orthonormal(shape), scale=-0.3)


@pytest.mark.parametrize("shape", EMPTY)
def test_empty(shape):
    x = torch.randn(shape)
    through(tall_cayley, x, x)
    through(lambda x: tall_cayley_at(x, x.detach()), x, x)


def test_any_strides():
    for x in strided():
        assert not x.is_contiguous()
        check(x, torch.randn_like(x).mT.contiguous().mT)
        # By columns, as QR returns it.
        check(x, torch.randn_like(x), base=orthonormal(x.shape).mT.contiguous().mT)
    x = torch.randn(9, 4, dtype=torch.float64)
    check(x, torch.ones((), dtype=torch.float64).expand(9, 4))


def test_on_and_above_the_diagonal_nothing_is_read():
    x, g = torch.randn(6, 4), torch.randn(6, 4)
    above = torch.where(torch.ones(6, 4).triu() > 0, torch.nan, x)
    for out, want in zip(through(tall_cayley, above, g), through(tall_cayley, x, g), strict=True):
        assert torch.equal(out, want)


def test_zero_is_the_base():
    base = orthonormal((3, 9, 4), torch.float32)
    assert torch.equal(tall_cayley_at(torch.zeros(3, 9, 4), base), base)
    assert torch.equal(tall_cayley(torch.zeros(9, 4)), torch.eye(9, 4))


def test_agrees_with_torch():
    for shape in ((9, 4), (5, 5)):
        layer = torch.nn.Linear(shape[1], shape[0], dtype=torch.float64)
        torch.nn.utils.parametrizations.orthogonal(
            layer, orthogonal_map="cayley", use_trivialization=False
        )
        x = layer.parametrizations.weight.original
        assert error(tall_cayley(x.detach()), layer.weight.detach()) <= 1e-14  # 45 eps


SIZES = [(5, 3), (17, 17), (32, 31), (65, 64), (100, 64), (300, 40)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SIZES)
def test_fp32_is_as_exact_as_torch(shape, norm):
    x, g = random(shape, norm, torch.float32), torch.randn(shape)
    exact = through(embedded, x.double(), g)
    # 5e-7, eight roundings to fp32, where torch happens to be nearly exact.
    for out, base, want in zip(
        through(tall_cayley, x, g), through(embedded, x, g), exact, strict=True
    ):
        assert error(out, want) <= max(1.5 * error(base, want), 5e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SIZES)
def test_fp32_at_a_base(shape, norm):
    x, g, base = random(shape, norm, torch.float32), torch.randn(shape), orthonormal(shape)
    exact = through(lambda x: embedded_at(x, base), x.double(), g)
    out = through(lambda x: tall_cayley_at(x, base.float()), x, g)
    # That the base is rounded to fp32 turns the skew matrix by eps times its norm.
    eps = torch.finfo(torch.float32).eps
    for got, want in zip(out, exact, strict=True):
        assert error(got, want) <= 8 * eps * (1 + norm)
    # Of a base that is not rounded, nothing is lost.
    assert error(tall_cayley_at(x.double(), base), exact[0]) <= 1e-15 * (1 + norm) ** 2 + 1e-14


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SIZES)
def test_columns_are_orthonormal(shape, norm):
    x, eye = random(shape, norm, torch.float32), torch.eye(shape[-1])
    q = tall_cayley(x).double()
    assert error(q.mT @ q, eye) <= 1e-6  # twice the error of q, relative to |I| = √k
    w = tall_cayley_at(x, orthonormal(shape, torch.float32)).double()
    assert error(w.mT @ w, eye) <= 1e-6 + norm * torch.finfo(torch.float32).eps  # the base's


def test_each_precision_is_taken(monkeypatch):
    dtypes = []
    inverse = ops.inverse_definite
    monkeypatch.setattr(ops, "inverse_definite", lambda s: dtypes.append(s.dtype) or inverse(s))
    tall_cayley(random((65, 64), 1.0, torch.float32))
    assert dtypes == [torch.float32]
    tall_cayley(random((65, 64), 100.0, torch.float32))
    assert dtypes[1:] == [torch.float32, torch.float64]
    tall_cayley(random((65, 64), 100.0))
    assert dtypes[3:] == [torch.float64]


@pytest.mark.parametrize("norm", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype, norm):
    x, g = random((2, 9, 4), norm, dtype), torch.randn(2, 9, 4).to(dtype)
    base = orthonormal((2, 9, 4), dtype)
    for function in (tall_cayley, lambda x: tall_cayley_at(x, base)):
        want = through(function, x.float(), g.float())
        for out, exact in zip(through(function, x, g), want, strict=True):
            assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(6, 1), (2, 1)])
def test_nan_stays_in_its_matrix(place, bad):
    x, g = torch.randn(2, 3, 7, 5).double()
    base = orthonormal((3, 7, 5))
    for function in (tall_cayley, lambda x: tall_cayley_at(x, base)):
        clean = through(function, x, g)
        broken = x.clone()
        broken[1][place] = bad
        for out, want in zip(through(function, broken, g), clean, strict=True):
            assert out[1].isnan().any()
            assert torch.equal(out[[0, 2]], want[[0, 2]])
        assert function(broken)[1].isnan().all()


@pytest.mark.parametrize("shape", [(4, 4), (5, 2), (2, 4, 3)])
def test_gradcheck(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = orthonormal(shape)
    for function in (tall_cayley, lambda x: tall_cayley_at(x, base, 0.8)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_create_graph_gives_the_same_gradient(dtype):
    x, g, base = torch.randn(20, 6).to(dtype), torch.randn(20, 6), orthonormal((20, 6), dtype)
    for function in (tall_cayley, lambda x: tall_cayley_at(x, base)):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(function(leaf), leaf, g.to(dtype), create_graph=True)
        assert dx.requires_grad
        # The graph is in fp64: the difference is the error of fp32, and one rounding to bf16.
        assert error(dx, through(function, x, g)[1]) <= max(5e-7, torch.finfo(dtype).eps)


def test_gradient_is_linear():
    for norm in (1.0, 100.0):
        x, g, base = random((40, 7), norm, torch.float32), torch.randn(40, 7), orthonormal((40, 7))
        for function in (tall_cayley, lambda x, base=base: tall_cayley_at(x, base)):
            _, dx = through(function, x, g)
            for scale in (2.0**-20, 2.0**20):
                assert torch.equal(through(function, x, scale * g)[1], scale * dx)


def test_compiles():
    x, g, base = torch.randn(2, 9, 4), torch.randn(2, 9, 4), orthonormal((2, 9, 4), torch.float32)
    for function in (tall_cayley, lambda x: tall_cayley_at(x, base)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for out, want in zip(through(compiled, x, g), through(function, x, g), strict=True):
            assert torch.equal(out, want)


def test_path_is_counted():
    x = torch.randn(5, 3)
    tall_cayley(x)
    tall_cayley_at(x, orthonormal((5, 3)))
    assert tp.stats() == {"kernel": 0, "closed": 2, "composed": 0}
    with tp.use_path("kernel"), pytest.raises(RuntimeError, match="the kernel cannot run because"):
        tall_cayley(torch.randn(258, 257))
