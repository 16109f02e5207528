"""The tiled product in every form, launched directly, against torch in fp64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tritonparam.kernels.gemm import FORMS, Config, n_tiles, product, product_config
from tritonparam.kernels.mirror import skew_square, symmetric_square
from tritonparam.kernels.tile_grid import triangle

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = {
    torch.float32: Config(32, 32, "tf32x3", num_warps=4),
    torch.float64: Config(32, 16, "ieee", num_warps=4, num_stages=2),
}
SHAPED = {
    "full": lambda z: z,
    "symmetric": lambda z: z.triu() + z.triu(1).mT,
    "skew": lambda z: z.triu(1) - z.triu(1).mT,
    "sum": lambda z: z + z.mT,
    "difference": lambda z: z - z.mT,
    "symmetric_gradient": lambda z: (z + z.mT).triu() - torch.diag_embed(z.diagonal(0, 1, 2)),
    "skew_gradient": lambda z: (z - z.mT).triu(1),
}
dtypes = pytest.mark.parametrize("dtype", CONFIG, ids=lambda dtype: str(dtype)[6:])


def randn(*shape, dtype):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def close(found, expected, n_inner, dtype):
    """Within eps for each entry of a sum of n_inner products of normal numbers, twice over."""
    expected = expected.to(found.device)
    assert found.shape == expected.shape
    tolerance = 2 * torch.finfo(dtype).eps * max(n_inner, 1)
    assert (found.double() - expected).abs().max() <= tolerance


@dtypes
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (32, 32, 32), (33, 70, 5), (5, 3, 65)])
def test_products(m, k, n, dtype):
    a, b = randn(2, m, k, dtype=dtype), randn(2, k, n, dtype=dtype)
    found = product(a, b, CONFIG[dtype])
    assert found.dtype == dtype
    assert found.is_contiguous()
    close(found, a.double() @ b.double(), k, dtype)


@dtypes
def test_transposes_and_strides(dtype):
    n, config = 45, CONFIG[dtype]
    a, b = randn(3, n, n, dtype=dtype), randn(3, n, n, dtype=dtype)
    wide = randn(3, n + 3, 2 * n, dtype=dtype)
    views = [(a.mT, b), (a, b.mT), (a.mT, b.mT), (a[:1].expand(3, n, n), b)]
    views += [(wide[:, 2 : n + 2, 1 : n + 1], b.mT), (wide[:, :n, ::2], wide[:, 3:, n:])]
    views += [(a.permute(2, 1, 0)[:3, :, :3], b[:, :3, :9]), (a[:, :0], b), (a[:0], b[:0])]
    views += [(a[..., 0:1].expand(3, n, n), b)]
    for x, y in views:
        expected = x.double() @ y.double()
        if expected.numel():
            close(product(x, y, config), expected, n, dtype)
        else:
            assert product(x, y, config).shape == expected.shape


@dtypes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 40])
def test_epilogues(form, n, dtype):
    config = CONFIG[dtype]
    a, b, c = (randn(2, n, n, dtype=dtype) for _ in range(3))
    u, v, scale = randn(2, n, dtype=dtype), randn(2, n, dtype=dtype), randn(2, 3, dtype=dtype)
    eye = torch.eye(n, dtype=torch.float64, device=DEVICE)
    ab, c64 = a.double().mT @ b.double(), c.double().mT
    # Coefficients that have no exact value in fp32.
    found = product(a.mT, b, config, form=form, alpha=1 / 3, c=c.mT, beta=0.1, gamma=0.7)
    close(found, SHAPED[form](ab / 3 + 0.1 * c64 + 0.7 * eye), n, dtype)
    found = product(
        a.mT, b, config, form=form, u=u, v=v, c=c.mT, beta=-1, gamma=2, scale=scale[:, 1]
    )
    u64, v64, s64 = u.double(), v.double(), scale[:, 1, None, None].double()
    z = s64 * (ab * u64.unsqueeze(1) + (2 * eye - c64) * v64.unsqueeze(1))
    close(found, SHAPED[form](z), 16 * n, dtype)  # three more factors, up to 3 each


@dtypes
@pytest.mark.parametrize("n", [1, 70])
def test_mirror_images_are_exact(n, dtype):
    a, b = randn(2, n, n, dtype=dtype), randn(2, n, n, dtype=dtype)
    x = product(a, b, CONFIG[dtype], form="symmetric")
    assert torch.equal(x, x.mT)
    x = product(a, b, CONFIG[dtype], form="skew")
    assert torch.equal(x, -x.mT)
    for form in ("symmetric_gradient", "skew_gradient"):
        assert not product(a, b, CONFIG[dtype], form=form).tril(-1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_once(dtype):
    a, b = randn(1, 40, 40, dtype=torch.float32), randn(1, 40, 40, dtype=torch.float32)
    wide = product(a, b, CONFIG[torch.float32], form="skew_gradient")
    out = torch.full((1, 40, 40), torch.nan, dtype=dtype, device=DEVICE)
    assert product(a, b, CONFIG[torch.float32], form="skew_gradient", out=out) is out
    # The interpreter rounds bf16 towards zero.
    assert ((out - wide).abs() <= torch.finfo(dtype).eps * wide.abs()).all()


@dtypes
def test_skipped_matrices_are_left_alone(dtype):
    a, b = randn(4, 40, 40, dtype=dtype), randn(4, 40, 40, dtype=dtype)
    first = torch.tensor([0, 3, 4, 9], dtype=torch.int32, device=DEVICE)
    for form in FORMS:
        out = torch.full_like(a, -1.0)
        product(a, b, CONFIG[dtype], out=out, form=form, first=first, turn=3)
        assert torch.equal(out[:2], product(a[:2], b[:2], CONFIG[dtype], form=form))
        assert torch.equal(out[2:], torch.full_like(a[2:], -1.0))


def test_rough_products_stay_in_their_matrix():
    a, b = randn(3, 40, 40, dtype=torch.float32), randn(3, 40, 40, dtype=torch.float32)
    rough = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    found = product(a, b, CONFIG[torch.float32], rough=rough)
    expected = a.double() @ b.double()
    close(found[::2], expected[::2], 40, torch.float32)
    # The interpreter is exact here; TF32 keeps 10 bits of each factor.
    assert (found[1] - expected[1]).abs().max() <= 2.0**-10 * 40


@dtypes
@pytest.mark.parametrize("form", ["full", "symmetric", "skew"])
def test_sums(form, dtype):
    n, config = 50, CONFIG[dtype]
    a, b = randn(3, n, n, dtype=dtype), randn(3, n, n, dtype=dtype)
    sums = torch.full((3, n_tiles(n, config, form), 2), torch.nan, dtype=dtype, device=DEVICE)
    z = product(a, b, config, form=form, gamma=3.0, sums=sums).double()
    found = sums.double().sum(1)
    eps = torch.finfo(dtype).eps
    squares = z.square().sum((1, 2))
    assert ((found[:, 1] - squares) / squares).abs().max() <= 70 * eps
    trace = z.diagonal(0, 1, 2).sum(-1)
    assert (found[:, 0] - trace).abs().max() <= 70 * eps * z.abs().amax()


@dtypes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_matrix(form, bad, dtype):
    a, b = randn(3, 40, 40, dtype=dtype), randn(3, 40, 40, dtype=dtype)
    clean = product(a, b, CONFIG[dtype], form=form)
    a[1, 0] = bad
    found = product(a, b, CONFIG[dtype], form=form)
    assert torch.equal(found[::2], clean[::2])
    assert not found[1, 0, 1:].isfinite().any()


@triton.jit
def _triangle_kernel(i_ptr, j_ptr, n_tiles, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = triangle(index)
    tl.store(i_ptr + index, i, mask=index < n_tiles)
    tl.store(j_ptr + index, j, mask=index < n_tiles)


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_tiles_are_found_by_a_root_as_inexact_as_that_of_a_gpu(ulps, monkeypatch):
    if DEVICE == "cpu":
        builder = triton.runtime.interpreter.InterpreterBuilder
        exact = builder.create_sqrt

        def inexact(self, x):
            y = exact(self, x)
            y.data = np.nextafter(y.data, y.data + np.float32(ulps))
            return y

        monkeypatch.setattr(builder, "create_sqrt", inexact)
    j, i = torch.tril_indices(500, 500, dtype=torch.int32, device=DEVICE)
    found = torch.zeros(2, len(i), dtype=torch.int32, device=DEVICE)
    _triangle_kernel[(triton.cdiv(len(i), 1 << 16),)](*found, len(i), BLOCK=1 << 16)
    assert torch.equal(found, torch.stack([i, j]))


@pytest.mark.parametrize("group", [1, 2, 5])
def test_every_grouping_covers_every_tile(group):
    a, b = randn(1, 100, 8, dtype=torch.float32), randn(1, 8, 90, dtype=torch.float32)
    found = product(a, b, replace(CONFIG[torch.float32], group=group))
    close(found, a.double() @ b.double(), 8, torch.float32)


@pytest.mark.parametrize(
    ("n", "dtype"),
    [(33, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    + [(1, torch.float32), (70, torch.float64)],
)
def test_squares_from_the_upper_triangle(n, dtype):
    compute = torch.promote_types(dtype, torch.float32)
    config = replace(CONFIG[compute], block_k=16)  # two slices to a block
    eps = torch.finfo(compute).eps
    base = torch.randn(1, n + 1, 2 * n, device=DEVICE).to(dtype)
    views = base[:, 1:, ::2], base[:, :n, :n].mT
    eye = torch.eye(n, dtype=compute, device=DEVICE)
    below = torch.ones(n, n, device=DEVICE).tril(-1) > 0
    skewed = torch.where(below | (eye > 0), torch.nan, base[:, :n, :n])  # what is not read
    for w in (views[0], skewed) if n == 33 else (skewed,):
        x = w.to(compute)
        x = x.triu(1) - x.triu(1).mT
        found, square = skew_square(w, config)
        assert found.dtype == square.dtype == compute
        assert found.is_contiguous()
        assert torch.equal(found, x)
        assert torch.equal(square, square.mT)
        close(square, x.double() @ x.double(), 4 * n, compute)
    mirrored = torch.where(below, torch.nan, base[:, :n, :n])
    for w in (views[1], mirrored) if n == 33 else (mirrored,):
        x = w.to(compute)
        found, square, mu = symmetric_square(w, config)
        mean = x.diagonal(0, 1, 2).double().mean(-1).clamp(-500, 0)
        assert (mu - mean).abs().max() <= 8 * eps
        x = x.triu() + x.triu(1).mT - mu[:, None, None] * eye
        assert (found - x).abs().max() <= 8 * eps
        assert torch.equal(square, square.mT)
        close(square, x.double() @ x.double(), 4 * n, compute)
    for found in (*skew_square(base[:0, :n, :n], config), *symmetric_square(base[:0], config)):
        assert found.numel() == 0


@dtypes
@pytest.mark.parametrize("n", [1, 70])
def test_squares_with_the_identity_and_their_sums(n, dtype):
    config, eps = CONFIG[dtype], torch.finfo(dtype).eps
    w = randn(2, n, n, dtype=dtype)
    sums = torch.full(
        (2, n_tiles(n, config, "symmetric"), 2), torch.nan, dtype=dtype, device=DEVICE
    )
    x, h = skew_square(w, config, alpha=-1.0, gamma=1.0, sums=sums)
    eye = torch.eye(n, dtype=dtype, device=DEVICE)
    assert torch.equal(x, w.triu(1) - w.triu(1).mT)
    assert torch.equal(h, h.mT)
    close(h, eye - x.double() @ x.double(), 4 * n, dtype)
    h, found = h.double(), sums.double().sum(1)
    squares, trace = h.square().sum((1, 2)), h.diagonal(0, 1, 2).sum(-1)
    assert ((found[:, 0] - trace) / trace).abs().max() <= 70 * eps
    assert ((found[:, 1] - squares) / squares).abs().max() <= 70 * eps


@pytest.mark.parametrize("shift", [-3.0, 3.0, -1e4])
def test_the_mean_of_the_diagonal_is_taken_off(shift):
    n = 20
    w = randn(2, n, n, dtype=torch.float32) + shift * torch.eye(n, device=DEVICE)
    x, _, mu = symmetric_square(w, CONFIG[torch.float32])
    mean = w.diagonal(0, 1, 2).double().mean(-1).clamp(-500, 0)
    assert (mu - mean).abs().max() <= 4 * torch.finfo(torch.float32).eps * abs(shift)
    assert torch.equal(x.diagonal(0, 1, 2), w.diagonal(0, 1, 2) - mu[:, None])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_squares_keep_nan_in_its_matrix(bad):
    w = randn(3, 20, 20, dtype=torch.float32)
    config = CONFIG[torch.float32]
    clean = (*skew_square(w, config), *symmetric_square(w, config))
    w[1, 0, 19] = bad
    w[1, 5, 5] = bad  # no part of a skew matrix
    for found, expected in zip(
        (*skew_square(w, config), *symmetric_square(w, config)), clean, strict=True
    ):
        assert torch.equal(found[::2], expected[::2])
        if found.dim() == 3:
            assert not found[1, 0].isfinite().all()


def test_default_configurations():
    for dtype in CONFIG:
        for n in (65, 256, 257, 1024, 4096):
            for backend in ("cuda", "hip"):
                config = product_config(n, dtype, backend)
                assert config.block % 32 == 0
                assert config.precision == "ieee" or (dtype, backend) == (torch.float32, "cuda")
