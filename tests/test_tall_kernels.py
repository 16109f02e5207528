"""The kernels of tall matrices against fp64: their parts, and each map on its kernel path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import tritonparam as tp
from tests.cases import error, through
from tritonparam import polynomials
from tritonparam.kernels import elimination, tall, tall_combine, tall_gram, taylor
from tritonparam.ops.householder import householder, householder_at
from tritonparam.ops.tall_cayley import tall_cayley, tall_cayley_at
from tritonparam.ops.tall_expm import tall_exp, tall_exp_at

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = tp.paths.backend()
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Map:
    """A map without and with a base, and what its base is."""

    free: Callable[[Tensor], Tensor]
    at: Callable[[Tensor, Tensor], Tensor]
    base: Callable[..., Tensor]
    max_k: int


def orthonormal(shape, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64)).Q.to(dtype).contiguous()


def reflectors(shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


MAPS = {
    "tall_cayley": Map(tall_cayley, tall_cayley_at, orthonormal, 256),
    "householder": Map(householder, householder_at, reflectors, 256),
    "tall_exp": Map(tall_exp, tall_exp_at, orthonormal, 256),
}
every_map = pytest.mark.parametrize("of", MAPS.values(), ids=MAPS.keys())


def original(shape, norm, dtype=torch.float32):
    """A random one of this spectral norm."""
    x = torch.randn(shape, dtype=torch.float64)
    return (x * (norm / torch.linalg.matrix_norm(x, 2)[..., None, None])).to(dtype)


def functions(of, base, path):
    """The map without and with the base, on a path, each once more of a tensor's device."""

    def free(x):
        with tp.use_path(path):
            return of.free(x)

    def at(x):
        with tp.use_path(path):
            return of.at(x, base.to(x.device, torch.promote_types(x.dtype, base.dtype)))

    return free, at


def run(function, x, g):
    """Value and gradient on DEVICE, both passes on the kernel path."""
    with tp.use_path("kernel"):
        results = through(function, x.to(DEVICE), g.to(DEVICE))
    return [y.cpu() for y in results]


def check(of, x, g, base, tolerance):
    """The kernels are as exact as this, relative to the closed form in fp64."""
    kernels = functions(of, base, "kernel")
    for kernel, closed in zip(kernels, functions(of, base, "closed"), strict=True):
        before = tp.stats()["kernel"]
        found = run(kernel, x, g)
        assert tp.stats()["kernel"] == before + 1
        with tp.use_path("closed"):
            exact = through(closed, x.double(), g)
        for out, want in zip(found, exact, strict=True):
            assert error(out, want) <= tolerance


CASES = [
    ((1, 1), 1.0),
    ((4, 3), 1e-3),
    ((5, 5), 10.0),
    ((40, 17), 1e3),
    ((9, 2), 0.0),
    ((20, 11), 1e3),
]
if DEVICE == "cuda":  # the interpreter takes a second for the small ones
    CASES += [((4096, 64), 1e3), ((30000, 50), 30.0), ((300, 200), 1.0), ((3, 700, 256), 10.0)]


@every_map
@pytest.mark.parametrize(("shape", "norm"), CASES)
def test_computed_in_fp64_and_rounded_once(of, shape, norm):
    x = torch.zeros(shape) if norm == 0 else original(shape, norm)
    check(of, x, torch.randn(shape), of.base(shape), EPS)


@every_map
def test_fp64_stays_fp64(of):
    shape = (11, 5)
    x = original(shape, 3.0, torch.float64)
    base = of.base(shape, torch.float64)
    check(of, x, torch.randn(shape, dtype=torch.float64), base, 200 * 2.0**-52)


@pytest.mark.parametrize("name", ["tall_cayley", "householder"])
def test_beyond_one_tile(name):
    of = MAPS[name]
    x, g = original((73, 70), 30.0), torch.randn(73, 70)
    with tp.use_path("closed"):
        exact = through(of.free, x.double(), g)
    for out, want in zip(run(of.free, x, g), exact, strict=True):
        assert error(out, want) <= EPS


@every_map
def test_any_strides(of):
    x = torch.randn(2, 2, 5).mT  # wide, read through its transpose
    base = of.base((2, 5, 2)).mT.contiguous().mT
    g = torch.ones(()).expand(2, 5, 2)
    check(of, x, g, base, EPS)
    x, base = (x.movedim(0, 2).contiguous().movedim(2, 0) for x in (x, base))  # the batch last
    check(of, x, g, base, EPS)


@every_map
@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0), (2, 0, 3, 2)])
def test_empty(of, shape):
    x = torch.randn(shape)
    for function in functions(of, x, "kernel"):
        run(function, x, x)


@every_map
def test_nan_stays_in_its_matrix(of):
    x, g, base = original((2, 5, 2), 1.0), torch.randn(2, 5, 2), of.base((2, 5, 2))
    x[1, 4, 1] = torch.inf
    kernel, closed = (functions(of, base, path)[1] for path in ("kernel", "closed"))
    found = run(kernel, x, g)
    assert found[0][1].isnan().all()
    assert found[1][1].isnan().any()
    with tp.use_path("closed"):
        exact = through(closed, x.double(), g)
    for out, want in zip(found, exact, strict=True):
        assert error(out[:1], want[:1]) <= EPS
    x[0, 4, 0] = torch.nan
    with tp.use_path("kernel"):
        assert of.free(x.to(DEVICE)).isnan().all()


@every_map
def test_gradcheck(of):
    x = torch.randn(4, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    _, at = functions(of, of.base((4, 2), torch.float64), "kernel")
    with tp.use_path("kernel"):
        assert torch.autograd.gradcheck(at, x, fast_mode=True)


@every_map
def test_low_precision_is_computed_in_fp32(of):
    x, g, base = (x.bfloat16() for x in (torch.randn(5, 2), torch.randn(5, 2), of.base((5, 2))))
    _, at = functions(of, base, "kernel")
    for out, exact in zip(run(at, x, g), run(at, x.float(), g), strict=True):
        assert torch.equal(out, exact.bfloat16())


@every_map
def test_each_pass_takes_the_path_of_what_was_saved(of):
    x, g, base = torch.randn(4, 2), torch.randn(4, 2), of.base((4, 2))
    kernels, closeds = (functions(of, base, path) for path in ("kernel", "closed"))
    for kernel, closed in zip(kernels, closeds, strict=True):
        with tp.use_path("closed"):  # only the forward is on the kernel path
            found = through(kernel, x.to(DEVICE), g.to(DEVICE))
            exact = through(closed, x.double(), g)
        for out, want in zip(found, exact, strict=True):
            assert error(out.cpu(), want) <= 4 * EPS


@every_map
def test_compiles(of):
    x, g, base = torch.randn(4, 2), torch.randn(4, 2), of.base((4, 2))
    on_device = base.to(DEVICE)
    compiled = torch.compile(of.at, fullgraph=True, backend="aot_eager")
    found = run(lambda x: compiled(x, on_device), x, g)
    with tp.use_path("closed"):
        exact = through(lambda x: of.at(x, base.double()), x.double(), g)
    for out, want in zip(found, exact, strict=True):
        assert error(out, want) <= EPS


@every_map
def test_larger_k_is_refused(of):
    x = torch.randn(of.max_k + 1, of.max_k + 1, device=DEVICE)
    refused = pytest.raises(RuntimeError, match=f"k = {of.max_k + 1} is beyond the kernel's")
    with tp.use_path("kernel"), refused:
        of.free(x)


def test_explain_knows():
    for name in ("cayley", "householder", "matrix_exp"):
        layer = torch.nn.Linear(3, 5, device=DEVICE)
        tp.orthogonal(layer, "weight", orthogonal_map=name)
        with tp.use_path("kernel"):
            assert tp.explain(layer)[0].path == "kernel"


PARTS = {
    "all": lambda x: x,
    "below": lambda x: torch.cat((0 * x[:, : x.size(2)], x[:, x.size(2) :]), 1),
    "unit": lambda x: x.tril(-1) + torch.eye(*x.shape[1:], dtype=x.dtype, device=x.device),
}


@pytest.mark.parametrize("parts", [("all", "all"), ("below", "below"), ("unit", "all")])
def test_sums_over_rows(parts):
    n, k = 150, 5  # three programs
    x, y = torch.randn(2, 1, n, k, device=DEVICE)
    numbers = tall.config(k, x.dtype, BACKEND)
    found = tall_gram.gram((x, y), (y, x), numbers, parts=parts)
    left, right = (PARTS[part] for part in parts)
    for i, a in enumerate((x, y)):
        for j, b in enumerate((y, x)):
            want = left(a.double()).mT @ right(b.double())
            assert error(found[2 * i + j], want) <= n * 2.0**-52


def test_products_with_small_matrices():
    n, k = 67, 18
    x, y, z, c = torch.randn(4, 2, n, k, device=DEVICE)
    u, v, w, top = torch.randn(4, 2, k, k, dtype=torch.float64, device=DEVICE)
    signs = torch.randn(2, k, device=DEVICE).sign().double()
    numbers = tall.config(k, x.dtype, BACKEND)
    found = tall_combine.combine(
        *((x, u), (y, v.mT), (z, w)),
        **{"parts": ("unit", "below"), "scale": 0.3, "c": c, "top": top.mT, "alpha": 0.7},
        **{"gamma": -1.0, "signs": signs, "dtype": torch.float64, "config": numbers},
    )
    x, y, z, c = x.double(), y.double(), z.double(), c.double()
    want = 0.3 * PARTS["unit"](x) @ u + PARTS["below"](y) @ v.mT + z @ w + c
    want[:, :k] += 0.7 * top.mT - torch.eye(k, dtype=torch.float64, device=DEVICE)
    want[:, :k] *= signs.unsqueeze(-1)
    assert error(found, want) <= 4 * k * 2.0**-52
    lower = tall_combine.combine((x, u), dtype=torch.float32, config=numbers, lower=True)
    assert error(lower, (x @ u).tril(-1)) <= EPS


@pytest.mark.parametrize("norm", [1.0, 1e4])
@pytest.mark.parametrize("form", elimination.FORMS)
def test_elimination(form, norm):
    k = 21  # two steps
    x, c = torch.randn(2, 30, k).double() * norm, torch.randn(2, k, k).double() * norm
    gram = x.mT @ x + torch.eye(k)
    lower = c.tril(-1) if form == "lower" else c
    s = torch.eye(k) - 0.3 * (lower - lower.mT) + 0.09 * gram
    if form == "triangle":
        s = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    given = None if form == "triangle" else c.to(DEVICE)
    found = elimination.inverse(gram.to(DEVICE), given, form, 0.3, 0.09).cpu()
    # The residual of a backward stable inverse; 8 for the constants in k steps.
    size = torch.linalg.matrix_norm(s) * torch.linalg.matrix_norm(found)
    residual = torch.linalg.matrix_norm(found @ s - torch.eye(k))
    assert (residual <= 8 * k * 2.0**-53 * size).all()


def test_the_polynomial_is_that_of_the_closed_form():
    assert [c for row in polynomials.TAYLOR[18] for c in row] == list(taylor.TAYLOR)


@pytest.mark.parametrize("k", [2, 17])  # in one program, and in several
def test_what_the_squarings_do_not_reach_is_nan(k):
    x = original((2, 19, k), 1.0)
    x[1] *= 4 * taylor.THETA * 2.0**taylor.ROUNDS
    q, dx = run(tall_exp, x, torch.randn(2, 19, k))
    assert q[0].isfinite().all()
    assert dx[0].isfinite().all()
    assert q[1].isnan().all()
    assert dx[1].isnan().any()
