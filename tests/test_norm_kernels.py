"""The kernels of weight norm and spectral norm, launched directly, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import _SpectralNorm

pytest.importorskip("triton")

from tritonparam.kernels.grouped import Config, default_config
from tritonparam.kernels.spectral_norm import spectral_norm_bwd, spectral_norm_fwd
from tritonparam.kernels.weight_norm import weight_norm_bwd, weight_norm_fwd

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-12
# [before, n, after]: contiguous rows, columns, and both; 1, odd, past a tile, past what is whole.
SHAPES = [
    (1, 1, 1),
    (1, 1, 7),
    (1, 9, 1),
    (1, 5, 48),
    (1, 13, 65),
    (1, 3, 300),
    (1, 9, 513),
    (1, 2, 1100),
    (7, 5, 1),
    (65, 19, 1),
    (3, 6, 4),
    (41, 5, 9),
    (41, 9, 16),
]
# Tiles so small that these shapes fill several, on several programs.
SMALL = Config(elements=256, max_row=512, max_odd_row=512, max_programs=6, max_tensors=2)


def assert_near(got, want, dtype, size=None):
    """Within rounding of sums in the compute dtype, and of one rounding to `dtype`.

    The error is relative to `want`, or to the size of the terms that cancel in it. Pairwise sums
    of a few hundred terms, a root and two products: four eps.
    """
    compute = torch.promote_types(dtype, torch.float32)
    assert got.shape == want.shape
    size = float(want.norm()) if size is None else float(size)
    stored = torch.finfo(dtype).eps / 2 * float(want.norm()) if dtype != compute else 0.0
    assert float((got.double() - want).norm()) <= 4 * torch.finfo(compute).eps * size + stored


def random_weight(shape, dtype=torch.float32):
    before, n, after = shape
    v = torch.randn(before, n, after, device=DEVICE).to(dtype)
    return torch.randn(n, device=DEVICE).to(dtype), v, torch.randn_like(v)


def check_weight_norm(g, v, grad, dtype, config):
    ((w, norm),) = weight_norm_fwd([g], [v], dtype, config)
    ((dg, dv),) = weight_norm_bwd([grad], [g], [v], [norm], config)
    assert (w.dtype, dg.dtype, dv.dtype) == (dtype, v.dtype, v.dtype)
    assert w.is_contiguous()
    assert dv.is_contiguous()
    g64, v64 = (x.detach().double().requires_grad_() for x in (g, v))
    norm64 = v64.square().sum((0, 2)).sqrt()
    want = v64 * (g64 / norm64)[:, None]
    want_dg, want_dv = torch.autograd.grad(want, (g64, v64), grad.double())
    assert_near(w, want.detach(), dtype)
    assert_near(norm, norm64.detach(), norm.dtype)
    # Each is a difference, or a sum with cancellation, of terms of this size.
    scale = (g64 / norm64).detach()[:, None]
    assert_near(dg, want_dg, v.dtype, (grad.double() * v.double() / v.double().norm()).norm() * 4)
    assert_near(dv, want_dv, v.dtype, (grad.double() * scale).norm() * 2)


@pytest.mark.parametrize("config", [default_config(torch.float32), SMALL], ids=["", "small"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_norm(shape, config):
    check_weight_norm(*random_weight(shape), torch.float32, config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 9, 70), (1, 3, 600), (70, 5, 1), (3, 6, 4)], ids=str)
def test_weight_norm_of_other_dtypes(shape, dtype):
    for config in (default_config(dtype), SMALL):
        check_weight_norm(*random_weight(shape, dtype), dtype, config)
    compute = torch.promote_types(dtype, torch.float32)
    check_weight_norm(*random_weight(shape, dtype), compute, SMALL)


def random_power(shape, dtype=torch.float32):
    """A weight, u, v and a gradient; u and v are no singular vectors, so that they move."""
    before, n, after = shape
    w = torch.randn(before, n, after, device=DEVICE).to(dtype)
    u = normalize(torch.randn(n, device=DEVICE), dim=0).to(dtype)
    v = normalize(torch.randn(before * after, device=DEVICE), dim=0).to(dtype)
    return w, u, v, torch.randn_like(w)


def matrix(x):
    return x.movedim(1, 0).flatten(1)


def reference(w, u, v, grad, steps):
    """W/sigma, dW, u, v by torch's link in fp64, from the same buffers."""
    w64 = matrix(w.detach().double()).requires_grad_()
    link = _SpectralNorm(w64.detach(), n_power_iterations=max(steps, 1), eps=EPS)
    link.train(steps > 0)
    link._u.copy_(u)
    link._v.copy_(v)
    y = link(w64)
    (dw,) = torch.autograd.grad(y, w64, matrix(grad.double()))
    return y.detach(), dw, link._u, link._v


def run_spectral(w, u, v, grad, steps, dtype, config):
    ((y, *saved),) = spectral_norm_fwd([w], [u], [v], steps, EPS, dtype, config)
    (dw,) = spectral_norm_bwd([grad], [w], *[[x] for x in saved], config)
    return y, dw, saved


def check_spectral_norm(w, u, v, grad, steps, dtype, config):
    want_y, want_dw, want_u, want_v = reference(w, u, v, grad, steps)
    before = u.clone(), v.clone()
    y, dw, (u_copy, v_copy, sigma) = run_spectral(w, u, v, grad, steps, dtype, config)
    assert (y.dtype, dw.dtype) == (dtype, w.dtype)
    assert y.is_contiguous()
    assert dw.is_contiguous()
    if steps == 0:
        assert torch.equal(u, before[0])
        assert torch.equal(v, before[1])
    # Vectors of an iteration carry the error of those before; sigma = u^T W v of any u and v is a
    # sum with cancellation, of terms as large as the norm of W v.
    compute = u_copy.dtype
    for copy, buffer, want in ((u_copy, u, want_u), (v_copy, v, want_v)):
        assert_near(copy, want, compute, 2)
        limits = torch.finfo(buffer.dtype)
        half_ulp = limits.eps / 2 if buffer.dtype != compute else 0.0
        size = copy.abs().clamp(min=limits.smallest_normal)  # below, digits get fewer
        assert ((copy - buffer).abs() <= half_ulp * size).all()
    w64 = matrix(w.double())
    terms = 1.0 if steps else float((w64 @ want_v).norm() / (want_u @ w64 @ want_v).abs())
    assert_near(matrix(y), want_y, dtype, 2 * terms * want_y.norm())
    size = (grad.double().norm() + want_y.norm() * grad.double().norm()) / sigma.abs().double()
    assert_near(matrix(dw), want_dw, w.dtype, 2 * terms * size)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectral_norm(shape, steps):
    check_spectral_norm(*random_power(shape), steps, torch.float32, SMALL)


@pytest.mark.parametrize("shape", [(1, 5, 48), (1, 3, 300), (1, 2, 1100), (65, 19, 1)], ids=str)
def test_spectral_norm_in_the_default_tiles(shape):
    for steps in (0, 1):
        config = default_config(torch.float32)
        check_spectral_norm(*random_power(shape), steps, torch.float32, config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("shape", [(1, 9, 70), (1, 3, 600), (70, 5, 1), (3, 6, 4)], ids=str)
def test_spectral_norm_of_other_dtypes(shape, steps, dtype):
    for config in (default_config(dtype), SMALL):
        check_spectral_norm(*random_power(shape, dtype), steps, dtype, config)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_squares_neither_vanish_nor_overflow(scale):
    # <q, q> with q = W^T W v, were it not divided by ||W v|| first.
    w, u, v, grad = random_power((1, 9, 70))
    check_spectral_norm(w * scale, u, v, grad, 2, torch.float32, SMALL)


# Five share a launch, in tuples of 16; with two to a launch, every kind of tile is met.
GROUP = [(1, 5, 7), (1, 9, 70), (1, 3, 48), (1, 6, 8), (1, 1, 1), (70, 5, 1), (1, 2, 7), (3, 6, 4)]


@pytest.mark.parametrize("config", [default_config(torch.float32), SMALL], ids=["", "small"])
def test_a_group_is_its_members_bitwise(config):
    gs, vs, grads = zip(*[random_weight(shape) for shape in GROUP], strict=True)
    group = weight_norm_fwd(gs, vs, torch.float32, config)
    norms = [norm for _, norm in group]
    back = weight_norm_bwd(grads, gs, vs, norms, config)
    for i, (g, v, grad) in enumerate(zip(gs, vs, grads, strict=True)):
        (alone,) = weight_norm_fwd([g], [v], torch.float32, config)
        (gradients,) = weight_norm_bwd([grad], [g], [v], [alone[1]], config)
        for got, want in zip((*group[i], *back[i]), (*alone, *gradients), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("config", [default_config(torch.float32), SMALL], ids=["", "small"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_group_of_power_iterations_is_its_members_bitwise(steps, config):
    ws, us, vs, grads = zip(*[random_power(shape) for shape in GROUP], strict=True)
    copies = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
    group = spectral_norm_fwd(ws, us, vs, steps, EPS, torch.float32, config)
    saved = [list(xs) for xs in zip(*[result[1:] for result in group], strict=True)]
    dws = spectral_norm_bwd(grads, ws, *saved, config)
    for i, (u, v) in enumerate(copies):
        y, dw, alone = run_spectral(ws[i], u, v, grads[i], steps, torch.float32, config)
        for got, want in zip((*group[i], dws[i]), (y, *alone, dw), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(us[i], u)
        assert torch.equal(vs[i], v)


def test_results_do_not_depend_on_the_run():
    w, u, v, grad = random_power((1, 40, 70))
    first = run_spectral(w, u.clone(), v.clone(), grad, 2, torch.float32, SMALL)
    second = run_spectral(w, u.clone(), v.clone(), grad, 2, torch.float32, SMALL)
    for a, b in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("config", [default_config(torch.float32), SMALL], ids=["", "small"])
def test_nan_stays_in_its_matrix(bad, config):
    shapes = [(1, 9, 70), (1, 9, 70), (1, 4, 70)]
    runs = []
    parts = [random_power(shape) for shape in shapes]
    pairs = [random_weight(shape) for shape in shapes]
    for poison in (False, True):
        ws, us, vs, grads = zip(*[[x.clone() for x in part] for part in parts], strict=True)
        gs, dirs, dirs_grads = zip(*[[x.clone() for x in pair] for pair in pairs], strict=True)
        if poison:
            ws[1][0, 2, 3] = dirs[1][0, 2, 3] = bad
        results = spectral_norm_fwd(ws, us, vs, 1, EPS, torch.float32, config)
        saved = [list(xs) for xs in zip(*[r[1:] for r in results], strict=True)]
        dws = spectral_norm_bwd(grads, ws, *saved, config)
        normed = weight_norm_fwd(gs, dirs, torch.float32, config)
        back = weight_norm_bwd(dirs_grads, gs, dirs, [n for _, n in normed], config)
        spectral = [(r[0], dw, u, v) for r, dw, u, v in zip(results, dws, us, vs, strict=True)]
        runs.append((spectral, [(*a, *b) for a, b in zip(normed, back, strict=True)]))
    (spectral, weight), (bad_spectral, bad_weight) = runs
    for i in (0, 2):
        for got, want in zip(bad_spectral[i], spectral[i], strict=True):
            assert torch.equal(got, want)
        for got, want in zip(bad_weight[i], weight[i], strict=True):
            assert torch.equal(got, want)
    y, dw, *_ = bad_spectral[1]
    assert y.isnan().all()
    assert dw.isnan().all()
    # A row has its own norm: the others are as they were.
    w, norm, dg, dv = bad_weight[1]
    assert w[0, 2].isnan().any()
    assert not norm[2].isfinite()
    assert dv[0, 2].isnan().any()
    rest = [i for i in range(9) if i != 2]
    assert torch.equal(w[:, rest], weight[1][0][:, rest])
    assert torch.equal(dg[rest], weight[1][2][rest])
    assert torch.equal(dv[:, rest], weight[1][3][:, rest])


@pytest.mark.parametrize("config", [default_config(torch.float32), SMALL], ids=["", "small"])
@pytest.mark.parametrize("shape", [(1, 9, 70), (1, 2, 600), (70, 5, 1)], ids=str)
def test_zero(shape, config):
    g, v, grad = random_weight(shape)
    v[:, 1] = 0
    ((w, norm),) = weight_norm_fwd([g], [v], torch.float32, config)
    ((dg, dv),) = weight_norm_bwd([grad], [g], [v], [norm], config)
    assert not w[:, 1].any()
    assert not dv[:, 1].any()
    assert dg[1] == 0
    assert all(x.isfinite().all() for x in (w, dg, dv))
    for steps in (0, 1):
        w, u, v, grad = random_power(shape)
        y, dw, _ = run_spectral(w * 0, u, v, grad, steps, torch.float32, config)
        assert not y.any()
        assert not dw.any()
        if steps:
            assert not u.any()
            assert not v.any()


def test_a_weight_that_sigma_misses_is_infinite():
    w, u, v, grad = random_power((1, 3, 4))
    y, dw, _ = run_spectral(w, u * 0, v * 0, grad, 0, torch.float32, SMALL)
    assert y.isinf().all()
    assert not dw.any()


def test_any_strides():
    config = SMALL
    g, v, grad = random_weight((3, 10, 8))
    for x, dx in (
        (v.mT, grad.mT),
        (v[..., ::2], grad[..., 1::2]),
        (v[:, 1::3], grad[:1, :3].expand(3, 3, 8)),
        (v.permute(1, 0, 2), grad.permute(1, 0, 2)),
    ):
        n = x.size(1)
        check_weight_norm(g.repeat(2)[1::2][:n], x, dx, torch.float32, config)
        _, u, w, _ = random_power(x.shape)
        check_spectral_norm(x, u, w, dx, 1, torch.float32, config)


def test_pointers_that_are_not_aligned():
    # Views into one buffer, as flat parameters are: 4 bytes past a multiple of 16.
    flat = torch.randn(1000, device=DEVICE)
    assert flat[1:].data_ptr() % 16
    v, grad, g = flat[1:241].view(1, 15, 16), flat[301:541].view(1, 15, 16), flat[601:616]
    check_weight_norm(g, v, grad, torch.float32, SMALL)
    _, u, q, _ = random_power((1, 15, 16))
    check_spectral_norm(v, u, q, grad, 1, torch.float32, SMALL)
