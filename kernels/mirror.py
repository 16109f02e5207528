"""Skew and symmetric matrices from their upper triangles, for products to start from."""

import torch
import triton
import triton.language as tl

from tritonparam.kernels.gemm import Config, launch_options, n_tiles, product_config, triangle
from tritonparam.kernels.launch import NAME, TRITON_DTYPE, compute_dtype, launch


@triton.jit
def _mirror_kernel(
    w_ptr,
    x_ptr,
    n_cols,
    w_stride,
    w_stride_row,
    w_stride_col,
    DIAGONAL: tl.constexpr,
    SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """x = triu(w, 1) + SIGN triu(w, 1)^T + diag(w), or with the number DIAGONAL for diag(w).

    One program for each pair of tiles (i, j), (j, i).
    """
    n_row_tiles = tl.cdiv(n_cols, BLOCK)
    n_tiles = n_row_tiles * (n_row_tiles + 1) // 2
    matrix = (tl.program_id(0) // n_tiles).to(tl.int64)
    i, j = triangle(tl.program_id(0) % n_tiles)
    row = i * BLOCK + tl.arange(0, BLOCK)[:, None]
    col = j * BLOCK + tl.arange(0, BLOCK)[None, :]
    w_ptr += matrix * w_stride
    x_ptr += matrix * n_cols * n_cols
    offset = row.to(tl.int64) * w_stride_row + col.to(tl.int64) * w_stride_col
    x = tl.load(w_ptr + offset, mask=(row < col) & (col < n_cols), other=0.0).to(ACC)
    mirror = tl.trans(x) * SIGN
    if i == j:
        x += mirror
        if DIAGONAL is None:
            inside = (row == col) & (col < n_cols)
            x = tl.where(row == col, tl.load(w_ptr + offset, mask=inside, other=0.0).to(ACC), x)
        else:
            x = tl.where(row == col, DIAGONAL, x)
    tl.store(x_ptr + (row * n_cols + col), x, mask=(row < n_cols) & (col < n_cols))
    if i < j:
        row = j * BLOCK + tl.arange(0, BLOCK)[:, None]
        col = i * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(x_ptr + (row * n_cols + col), mirror, mask=(row < n_cols) & (col < n_cols))


def skew(w: torch.Tensor, config: Config, diagonal: float = 0.0) -> torch.Tensor:
    """triu(w, 1) - triu(w, 1)^T + diagonal I of [matrices, n, n], contiguous, of any strides.

    In the compute dtype `torch.promote_types(w.dtype, torch.float32)`.
    """
    return _mirror(w, config, -1.0, diagonal)


def symmetric(w: torch.Tensor, config: Config) -> torch.Tensor:
    """triu(w) + triu(w, 1)^T of [matrices, n, n], as `skew`."""
    return _mirror(w, config, 1.0, None)


def _mirror(w: torch.Tensor, config: Config, sign: float, diagonal: float | None) -> torch.Tensor:
    x = torch.empty(w.shape, dtype=compute_dtype(w.dtype), device=w.device)
    if x.numel() == 0:
        return x
    options = _options(config, x.dtype, sign, diagonal)
    grid = (w.size(0) * n_tiles(w.size(1), config, "skew"),)
    launch(_mirror_kernel, grid, w, x, w.size(1), *w.stride(), **options)
    return x


def _options(config: Config, dtype: torch.dtype, sign: float, diagonal: float | None) -> dict:
    options: dict = {"DIAGONAL": diagonal, "SIGN": sign, "BLOCK": config.block}
    return options | {"ACC": TRITON_DTYPE[dtype]} | launch_options(config)


def shipped(backend: str) -> list[tuple]:
    """Launches for compiling ahead of time, as `cayley.shipped`."""
    rows: list[tuple] = []
    for dtype, name in NAME.items():
        compute = compute_dtype(dtype)
        config = product_config(64, dtype, backend)
        types = {"w_ptr": f"*{name}", "x_ptr": f"*{NAME[compute]}"}
        for kind, sign, diagonal in (("skew", -1.0, 1.0), ("symmetric", 1.0, None)):
            options = _options(config, compute, sign, diagonal)
            rows.append((f"{kind}_{name}", _mirror_kernel, types, options))
    return rows
