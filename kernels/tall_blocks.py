"""The small matrices of tall exponentials: K of blocks, its adjoint's argument, and their results.

K = [[Omega, -P^T P / b], [b I, 0]] with b = sqrt(trace(P^T P) / k), which balances it.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonparam.kernels.launch import launch
from tritonparam.kernels.taylor import ROUNDS

empty = partial(torch.empty, dtype=torch.float64)


@triton.jit
def balance(pp_ptr, n_cols, pp_stride_row, pp_stride_col, BLOCK: tl.constexpr):
    """b, or 1 where P is 0."""
    i = tl.arange(0, BLOCK)
    diagonal = pp_ptr + i.to(tl.int64) * (pp_stride_row + pp_stride_col)
    trace = tl.sum(tl.load(diagonal, mask=i < n_cols, other=0.0), axis=0)
    b = tl.sqrt(trace / n_cols)
    return tl.where(b > 0, b, 1.0)


@triton.jit
def argument(
    pp_ptr,
    c_ptr,
    b,
    i,
    row,
    j,
    col,
    n_cols,
    pp_stride_row,
    pp_stride_col,
    c_stride_row,
    c_stride_col,
    LOWER: tl.constexpr,
):
    """K at [row, col] of its block (i, j), and 0 beside the blocks.

    With LOWER, Omega = L - L^T for the part L of C below the diagonal, else (C - C^T) / 2.
    """
    inside = (row < n_cols) & (col < n_cols)
    below = inside & (i == 0) & (j == 0)
    above = below
    if LOWER:
        below &= row > col
        above &= row < col
    row, col = row.to(tl.int64), col.to(tl.int64)
    c = tl.load(c_ptr + (row * c_stride_row + col * c_stride_col), mask=below, other=0.0)
    mirror = tl.load(c_ptr + (col * c_stride_row + row * c_stride_col), mask=above, other=0.0)
    omega = c.to(tl.float64) - mirror.to(tl.float64)
    if not LOWER:
        omega *= 0.5
    at_p = inside & (i == 0) & (j == 1)
    pp = tl.load(pp_ptr + (row * pp_stride_row + col * pp_stride_col), mask=at_p, other=0.0)
    return omega - pp / b + tl.where(inside & (i == 1) & (j == 0) & (row == col), b, 0.0)


@triton.jit
def _part(size, BLOCK: tl.constexpr):
    """The program's matrix, the part of its `size` entries that it makes, and these."""
    n_parts = tl.cdiv(size, BLOCK)
    part = tl.program_id(0) % n_parts
    return (tl.program_id(0) // n_parts).to(tl.int64), part, part * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=["n_cols"])
def _argument_kernel(
    pp_ptr,
    c_ptr,
    k_ptr,
    b_ptr,
    squares_ptr,
    n_cols,
    pp_stride,
    pp_stride_row,
    pp_stride_col,
    c_stride,
    c_stride_row,
    c_stride_col,
    LOWER: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """K, b, and the sum of squares of a program's part of K."""
    size = 2 * n_cols
    matrix, part, entry = _part(size * size, BLOCK)
    pp_ptr += matrix * pp_stride
    b = balance(pp_ptr, n_cols, pp_stride_row, pp_stride_col, COLS)
    row, col = entry // size, entry % size
    i, j = row // n_cols, col // n_cols
    at = (i, row - i * n_cols, j, col - j * n_cols, n_cols)
    strides = (pp_stride_row, pp_stride_col, c_stride_row, c_stride_col)
    k = argument(pp_ptr, c_ptr + matrix * c_stride, b, *at, *strides, LOWER)
    tl.store(k_ptr + matrix * size * size + entry, k, mask=entry < size * size)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(k * k, axis=0))
    if part == 0:
        tl.store(b_ptr + matrix, b)


@triton.jit
def _result(y_ptr, y2_ptr, first_ptr, ROUNDS: tl.constexpr):
    """Where `taylor.exp` left the exponential."""
    return tl.where((ROUNDS - tl.load(first_ptr)) % 2 == 1, y2_ptr, y_ptr)


@triton.jit(do_not_specialize=["n_cols"])
def _columns_kernel(
    y_ptr,
    y2_ptr,
    first_ptr,
    b_ptr,
    top_ptr,
    u_ptr,
    n_cols,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """E_top and E_bottom / b of exp(K) in y or y2."""
    size = n_cols * n_cols
    matrix, _, entry = _part(size, BLOCK)
    mask = entry < size
    y_ptr = _result(y_ptr, y2_ptr, first_ptr + matrix, ROUNDS)
    y_ptr += matrix * 4 * size + (entry // n_cols * (2 * n_cols) + entry % n_cols)
    top = tl.load(y_ptr, mask=mask, other=0.0)
    bottom = tl.load(y_ptr + 2 * size, mask=mask, other=0.0)
    tl.store(top_ptr + matrix * size + entry, top, mask=mask)
    tl.store(u_ptr + matrix * size + entry, bottom / tl.load(b_ptr + matrix), mask=mask)


@triton.jit(do_not_specialize=["n_cols"])
def _twice_kernel(
    k_ptr,
    bg_ptr,
    pg_ptr,
    b_ptr,
    out_ptr,
    n_cols,
    bg_stride,
    bg_stride_row,
    bg_stride_col,
    pg_stride,
    pg_stride_row,
    pg_stride_col,
    BLOCK: tl.constexpr,
):
    """[[K^T, G], [0, K^T]], G = [B^T G, 0] over [P^T G / b, 0]."""
    half = 2 * n_cols
    size = 2 * half
    matrix, _, entry = _part(size * size, BLOCK)
    row, col = entry // size, entry % size
    i, j = row // half, col // half
    mask = (entry < size * size) & (i == j)
    source = (col - j * half) * half + (row - i * half)
    x = tl.load(k_ptr + matrix * half * half + source, mask=mask, other=0.0)
    col -= half
    of_g = (i == 0) & (col >= 0) & (col < n_cols)
    top, bottom = of_g & (row < n_cols), of_g & (row >= n_cols)
    row, col = row.to(tl.int64), col.to(tl.int64)
    bg_ptr += matrix * bg_stride + (row * bg_stride_row + col * bg_stride_col)
    x += tl.load(bg_ptr, mask=top, other=0.0).to(tl.float64)
    pg_ptr += matrix * pg_stride + ((row - n_cols) * pg_stride_row + col * pg_stride_col)
    x += tl.load(pg_ptr, mask=bottom, other=0.0) / tl.load(b_ptr + matrix)
    tl.store(out_ptr + matrix * size * size + entry, x, mask=entry < size * size)


@triton.jit(do_not_specialize=["n_cols"])
def _gradients_kernel(
    y_ptr,
    y2_ptr,
    first_ptr,
    b_ptr,
    d_ptr,
    v_ptr,
    n_cols,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """D = H_1 - H_1^T and V = -(H_2 + H_2^T) / b; [H_1, H_2] are rows of exp in y or y2."""
    size = n_cols * n_cols
    matrix, _, entry = _part(size, BLOCK)
    mask = entry < size
    row, col = entry // n_cols, entry % n_cols
    y_ptr = _result(y_ptr, y2_ptr, first_ptr + matrix, ROUNDS)
    y_ptr += matrix * 16 * size + 2 * n_cols
    at = row * (4 * n_cols) + col
    mirror = col * (4 * n_cols) + row
    d = tl.load(y_ptr + at, mask=mask, other=0.0) - tl.load(y_ptr + mirror, mask=mask, other=0.0)
    y_ptr += n_cols
    v = tl.load(y_ptr + at, mask=mask, other=0.0) + tl.load(y_ptr + mirror, mask=mask, other=0.0)
    tl.store(d_ptr + matrix * size + entry, d, mask=mask)
    tl.store(v_ptr + matrix * size + entry, v / -tl.load(b_ptr + matrix), mask=mask)


def small(pp: Tensor, c: Tensor, *, lower: bool) -> tuple[Tensor, Tensor, Tensor]:
    """K, b, and numbers that add up to the square of ||K||_F, from P^T P and C, [matrices, k, k].

    P^T P is in fp64, C in fp32 or fp64, both of any strides.
    """
    n_matrices, k, _ = pp.shape
    options = _argument_options(k, lower)
    parts = triton.cdiv(4 * k * k, options["BLOCK"])
    argument = empty(n_matrices, 2 * k, 2 * k, device=pp.device)
    b, squares = empty(n_matrices, device=pp.device), empty(n_matrices, parts, device=pp.device)
    strides = (*pp.stride(), *c.stride())
    grid = (n_matrices * parts,)
    launch(_argument_kernel, grid, pp, c, argument, b, squares, k, *strides, **options)
    return argument, b, squares


def columns(ys: tuple[Tensor, Tensor], first: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """E_top and E_bottom / b, of exp(K) as `taylor.exp` returns it."""
    return _halves(_columns_kernel, ys, first, b, ys[0].size(1) // 2)


def twice(argument: Tensor, bg: Tensor, pg: Tensor, b: Tensor) -> Tensor:
    """[[K^T, G], [0, K^T]], whose exponential has the gradient of K above its diagonal."""
    n_matrices, k, _ = pg.shape
    out = empty(n_matrices, 4 * k, 4 * k, device=pg.device)
    grid = (n_matrices * triton.cdiv(16 * k * k, _OPTIONS["BLOCK"]),)
    strides = (*bg.stride(), *pg.stride())
    launch(_twice_kernel, grid, argument, bg, pg, b, out, k, *strides, **_OPTIONS)
    return out


def gradients(ys: tuple[Tensor, Tensor], first: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """That of Omega less its transpose, that of P^T P plus its, from the exponential of `twice`."""
    return _halves(_gradients_kernel, ys, first, b, ys[0].size(1) // 4)


def _halves(
    kernel: Any, ys: tuple[Tensor, Tensor], first: Tensor, b: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    n_matrices = b.size(0)
    one, other = (empty(n_matrices, k, k, device=b.device) for _ in range(2))
    grid = (n_matrices * triton.cdiv(k * k, _OPTIONS["BLOCK"]),)
    launch(kernel, grid, *ys, first, b, one, other, k, ROUNDS=ROUNDS, **_OPTIONS)
    return one, other


_OPTIONS: dict = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}


def _argument_options(k: int, lower: bool) -> dict:
    return {"LOWER": lower, "COLS": max(triton.next_power_of_2(k), 16)} | _OPTIONS


def shipped(backend: str) -> list[tuple]:
    """Launches for compiling ahead of time, as `cayley.shipped`."""
    names = ("pp_ptr", "k_ptr", "b_ptr", "squares_ptr", "y_ptr", "y2_ptr", "top_ptr", "u_ptr")
    names += ("bg_ptr", "pg_ptr", "out_ptr", "d_ptr", "v_ptr")
    types = dict.fromkeys(names, "*fp64") | {"first_ptr": "*i32"}
    rows: list[tuple] = []
    for lower, c in ((True, "fp32"), (False, "fp64")):
        row = f"tall_argument_{'lower' if lower else 'skew'}"
        options = _argument_options(256, lower)
        rows.append(
            (row, _argument_kernel, _of(_argument_kernel, types | {"c_ptr": f"*{c}"}), options)
        )
    rows.append(("tall_twice", _twice_kernel, _of(_twice_kernel, types), _OPTIONS))
    for row, kernel in (("tall_columns", _columns_kernel), ("tall_gradients", _gradients_kernel)):
        rows.append((row, kernel, _of(kernel, types), _OPTIONS | {"ROUNDS": ROUNDS}))
    return rows


def _of(kernel, types: dict) -> dict:
    return {name: types[name] for name in kernel.arg_names if name in types}
