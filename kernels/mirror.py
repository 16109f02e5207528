"""Skew and symmetric matrices from their upper triangles, and their squares, in one launch."""

import torch
import triton
import triton.language as tl

from tritonparam.kernels.gemm import Config, launch_options, n_tiles, product_config
from tritonparam.kernels.launch import NAME, TRITON_DTYPE, compute_dtype, launch
from tritonparam.kernels.tile_grid import store_pair, store_sums, triangle


@triton.jit
def _beside(w, row, col, ACC: tl.constexpr):
    """w[row, col] of a block that lies above the diagonal."""
    w_ptr, n_cols, stride_row, stride_col = w
    offset = row.to(tl.int64) * stride_row + col.to(tl.int64) * stride_col
    return tl.load(w_ptr + offset, mask=col < n_cols, other=0.0).to(ACC)


@triton.jit
def _anywhere(w, row, col, SIGN: tl.constexpr, ACC: tl.constexpr):
    """T[row, col], T = U + SIGN U^T."""
    w_ptr, n_cols, stride_row, stride_col = w
    offset = row.to(tl.int64) * stride_row + col.to(tl.int64) * stride_col
    x = tl.load(w_ptr + offset, mask=(row < col) & (col < n_cols), other=0.0).to(ACC)
    offset = col.to(tl.int64) * stride_row + row.to(tl.int64) * stride_col
    x += tl.load(w_ptr + offset, mask=(col < row) & (row < n_cols), other=0.0).to(ACC) * SIGN
    return x


@triton.jit
def _add_beside(
    acc,
    w,
    row,
    col,
    start,
    stop,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """acc + U U over start <= k < stop, in blocks of U = triu(w, 1) or, where TRANS, of U^T."""
    for k0 in range(start, stop, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = _beside(w, k[None, :], row, ACC) if TRANS_A else _beside(w, row, k[None, :], ACC)
        b = _beside(w, col, k[:, None], ACC) if TRANS_B else _beside(w, k[:, None], col, ACC)
        acc = tl.dot(a, b, acc=acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _mean_of_diagonal(w_ptr, n_cols, stride, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The mean of n_cols numbers that are `stride` apart, or what is nearest to it in [-500, 0]."""
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, n_cols, BLOCK):
        place = start + tl.arange(0, BLOCK)
        d = tl.load(w_ptr + place.to(tl.int64) * stride, mask=place < n_cols, other=0.0)
        total += d.to(ACC)
    mean = tl.sum(total, axis=0) / tl.cast(n_cols, ACC)
    return tl.where(mean < 0.0, tl.maximum(mean, -500.0), 0.0).to(ACC)


@triton.jit
def _square_kernel(
    w_ptr,
    x_ptr,
    h_ptr,
    mu_ptr,
    sums_ptr,
    n_cols,
    w_stride,
    w_stride_row,
    w_stride_col,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """x = X and h = ALPHA X^2 + GAMMA I, one program for each pair of tiles.

    X = T + D, T = U + SIGN U^T, U = triu(w, 1), D = diag(w) - mu I, or 0 without mu_ptr; mu is the
    mean of the diagonal. X^2 = T^2 + D T + T D + D^2. In the tile (i, j) of T^2, i <= j, the sum
    over k has SIGN U^T U up to block i, U U between i and j, SIGN U U^T beyond j, each read where
    it stands; only in blocks i and j a factor crosses the diagonal.
    """
    n_row_tiles = tl.cdiv(n_cols, BLOCK)
    n_tiles = n_row_tiles * (n_row_tiles + 1) // 2
    matrix = (tl.program_id(0) // n_tiles).to(tl.int64)
    index = tl.program_id(0) % n_tiles
    i, j = triangle(index)
    w_ptr += matrix * w_stride
    row = i * BLOCK + tl.arange(0, BLOCK)[:, None]
    col = j * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = (w_ptr, n_cols, w_stride_row, w_stride_col)
    z = tl.zeros([BLOCK, BLOCK], ACC)
    after = (j + 1) * BLOCK
    z = _add_beside(z, w, row, col, 0, i * BLOCK, True, False, BLOCK_K, PRECISION, ACC)
    z = _add_beside(z, w, row, col, after, n_cols, False, True, BLOCK_K, PRECISION, ACC)
    z *= SIGN
    after = (i + 1) * BLOCK
    z = _add_beside(z, w, row, col, after, j * BLOCK, False, False, BLOCK_K, PRECISION, ACC)
    for step in tl.range(0, tl.where(i == j, BLOCK, 2 * BLOCK), BLOCK_K, num_stages=1):
        k = tl.where(step < BLOCK, i, j - 1) * BLOCK + step + tl.arange(0, BLOCK_K)
        a = _anywhere(w, row, k[None, :], SIGN, ACC)
        b = _anywhere(w, k[:, None], col, SIGN, ACC)
        z = tl.dot(a, b, acc=z, input_precision=PRECISION, out_dtype=ACC)
    x = _anywhere(w, row, col, SIGN, ACC)
    diagonal = tl.where(row == col, 1.0, 0.0).to(ACC)
    if mu_ptr is not None:
        stride = w_stride_row + w_stride_col
        mu = _mean_of_diagonal(w_ptr, n_cols, stride, BLOCK, ACC)
        if index == 0:
            tl.store(mu_ptr + matrix, mu)
        d_row = tl.load(w_ptr + row.to(tl.int64) * stride, mask=row < n_cols, other=0.0)
        d_col = tl.load(w_ptr + col.to(tl.int64) * stride, mask=col < n_cols, other=0.0)
        d_row = d_row.to(ACC) - mu
        d_col = d_col.to(ACC) - mu
        z += (d_row + d_col) * x + diagonal * (d_row * d_col)
        x += diagonal * d_row
    z = z * ALPHA + diagonal * GAMMA
    mirror = tl.trans(z)
    z = tl.where(row > col, mirror, z)
    x_ptr += matrix * n_cols * n_cols
    store_pair(x_ptr, x, tl.trans(x) * SIGN, i, j, n_cols, BLOCK)
    store_pair(h_ptr + matrix * n_cols * n_cols, z, mirror, i, j, n_cols, BLOCK)
    if sums_ptr is not None:
        times = tl.where(i < j, 2.0, 1.0)
        mask = (row < n_cols) & (col < n_cols)
        store_sums(sums_ptr + (matrix * n_tiles + index) * 2, z, row == col, mask, times)


def skew_square(
    w: torch.Tensor,
    config: Config,
    *,
    alpha: float = 1.0,
    gamma: float = 0.0,
    sums: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """X and alpha X^2 + gamma I of X = triu(w, 1) - triu(w, 1)^T.

    `w` is [matrices, n, n] of any strides. Both results are contiguous, in the compute dtype
    `torch.promote_types(w.dtype, torch.float32)`; `sums` is as for a "symmetric" `gemm.product`.
    """
    return _square(w, None, config, -1, alpha, gamma, sums)


def symmetric_square(
    w: torch.Tensor, config: Config
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X and X^2 of X = triu(w) + triu(w, 1)^T - mu I, as `skew_square`, and mu [matrices].

    mu is the mean of the diagonal, or what is nearest to it in [-500, 0].
    """
    mu = torch.empty(w.size(0), dtype=compute_dtype(w.dtype), device=w.device)
    x, h = _square(w, mu, config, 1, 1.0, 0.0, None)
    return x, h, mu


def _square(
    w: torch.Tensor,
    mu: torch.Tensor | None,
    config: Config,
    sign: int,
    alpha: float,
    gamma: float,
    sums: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.empty(w.shape, dtype=compute_dtype(w.dtype), device=w.device)
    h = torch.empty_like(x)
    if x.numel():
        grid = (w.size(0) * n_tiles(w.size(1), config, "symmetric"),)
        options = _options(config, x.dtype, sign, alpha, gamma)
        launch(_square_kernel, grid, w, x, h, mu, sums, w.size(1), *w.stride(), **options)
    return x, h


def _options(config: Config, dtype: torch.dtype, sign: int, alpha: float, gamma: float) -> dict:
    options: dict = {"ALPHA": alpha, "GAMMA": gamma, "SIGN": sign, "BLOCK": config.block}
    options |= {"BLOCK_K": config.block_k, "PRECISION": config.precision}
    return options | {"ACC": TRITON_DTYPE[dtype]} | launch_options(config)


def launches(config: Config, dtype: torch.dtype, kind: str) -> list[tuple]:
    """Launches for compiling ahead of time, as in `cayley.launches`."""
    name, compute = NAME[dtype], compute_dtype(dtype)
    types = {"w_ptr": f"*{name}"}
    types |= dict.fromkeys(("x_ptr", "h_ptr", "mu_ptr", "sums_ptr"), f"*{NAME[compute]}")
    if kind == "skew":
        options = {"mu_ptr": None} | _options(config, compute, -1, -1.0, 1.0)
    else:
        options = {"sums_ptr": None} | _options(config, compute, 1, 1.0, 0.0)
    return [(f"{kind}_square_{config.block}_{name}", _square_kernel, types, options)]


def shipped(backend: str) -> list[tuple]:
    """Launches of every default configuration; of 16 bits one dtype in each, they convert alike."""
    rows: list[tuple] = []
    for n, dtypes in (
        (128, (torch.float16, torch.float32, torch.float64)),
        (512, (torch.bfloat16, torch.float32)),
    ):
        for dtype in dtypes:
            config = product_config(n, compute_dtype(dtype), backend)
            for kind in ("skew", "symmetric"):
                rows += launches(config, dtype, kind)
    return rows
