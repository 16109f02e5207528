"""exp of a skew or symmetric matrix by Horner's scheme and squarings, with its tiles in memory.

The forward kernel of `expm_scratch`, and what its backward kernel begins with.
"""

import triton
import triton.language as tl

from tritonparam.kernels.even_odd import doublings
from tritonparam.kernels.scratch import one_of, put, rows_of, times
from tritonparam.kernels.tile import exponent, growth_of, power_of_two


@triton.jit
def argument(
    w_ptr,
    tile_ptr,
    n_cols,
    stride_row,
    stride_col,
    SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tile 0: A / 2^down of norm 1 at most; and down and the shift mu, as `paterson_stockmeyer`."""
    ACC: tl.constexpr = tile_ptr.dtype.element_ty
    mu = tl.full([], 0.0, ACC)
    if SIGN == 1:
        i = tl.arange(0, BLOCK)
        x = tl.load(w_ptr + i.to(tl.int64) * (stride_row + stride_col), mask=i < n_cols, other=0.0)
        mu = tl.minimum(tl.maximum(tl.sum(x.to(ACC), axis=0) / n_cols, -500.0), 0.0)
    largest = tl.full([], 0.0, ACC)
    for row0 in range(0, BLOCK, BLOCK_K):
        row, col, entry = rows_of(row0, BLOCK, BLOCK_K)
        above = tl.minimum(row, col).to(tl.int64) * stride_row
        above += tl.maximum(row, col).to(tl.int64) * stride_col
        inside = (row < n_cols) & (col < n_cols)
        a = tl.load(w_ptr + above, mask=inside, other=0.0).to(ACC)
        a = tl.where(row > col, a * SIGN, a)
        a = tl.where(inside & (row == col), a - mu if SIGN == 1 else 0.0, a)
        tl.store(tile_ptr + entry, a)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(a), axis=1), axis=0))
    tl.debug_barrier()
    largest = largest.to(tl.float32)
    down = tl.minimum(tl.maximum(exponent(largest) + exponent(n_cols * 1.0), 0), 125)
    nothing = largest - largest  # or NaN, of what is infinite, if only in fp32: it takes no rounds
    down = tl.where(nothing == 0.0, down, 0)
    scale = power_of_two(-down) + nothing
    for row0 in range(0, BLOCK, BLOCK_K):
        _, _, entry = rows_of(row0, BLOCK, BLOCK_K)
        tl.store(tile_ptr + entry, tl.load(tile_ptr + entry) * scale)
    tl.debug_barrier()
    return down, mu


@triton.jit
def blocks(
    tile_ptr,
    n_cols,
    down,
    FACTOR: tl.constexpr,
    SIGN: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What c(B) + A s(B) is summed from, A scaled as there, times FACTOR.

    Tile 0 is A, tile 2 A^4, tile 1 the block EVEN[0] I + ODD[0] A + EVEN[1] A^2 + ODD[1] A^3 and
    tiles 3, 4, ... those that follow. Returned is s, the number of squarings.
    """
    AREA: tl.constexpr = BLOCK * BLOCK
    ACC: tl.constexpr = tile_ptr.dtype.element_ty
    for i in range(3):  # A^2, A^4 and A^3
        x_ptr = tile_ptr + one_of(i, 0, 1, 0) * AREA
        y_ptr = tile_ptr + one_of(i, 0, 1, 1) * AREA
        z, entry = times(x_ptr, y_ptr, n_cols, BLOCK, BLOCK_K, PRECISION)
        put(tile_ptr + (i + 1) * AREA + entry, z)
    square = tl.full([], 0.0, ACC)
    for row0 in range(0, BLOCK, BLOCK_K):
        _, _, entry = rows_of(row0, BLOCK, BLOCK_K)
        b2 = tl.load(tile_ptr + 2 * AREA + entry)
        square += tl.sum(tl.sum(b2 * b2, axis=1), axis=0)
    up = doublings(square.to(tl.float32), down, SIGN)
    scale = power_of_two(up) * FACTOR
    for row0 in range(0, BLOCK, BLOCK_K):
        row, col, entry = rows_of(row0, BLOCK, BLOCK_K)
        ptrs = tile_ptr + entry
        a = tl.load(ptrs) * scale
        b = tl.load(ptrs + AREA) * (scale * scale)
        b2 = tl.load(ptrs + 2 * AREA) * (scale * scale) * (scale * scale)
        k = tl.load(ptrs + 3 * AREA) * (scale * scale * scale)
        tl.store(ptrs, a)
        tl.store(ptrs + 2 * AREA, b2)
        for j in tl.static_range(0, len(EVEN), 2):
            block = tl.where(row == col, tl.full([], EVEN[j], ACC), 0.0)
            block += a * tl.full([], ODD[j], ACC) + b * tl.full([], EVEN[j + 1], ACC)
            block += k * tl.full([], ODD[j + 1], ACC)
            tl.store(ptrs + (1 if j == 0 else 2 + j // 2) * AREA, block)
    tl.debug_barrier()
    return down - up


@triton.jit(
    do_not_specialize=["n_cols", "w_stride", "w_stride_row", "w_stride_col"],
    do_not_specialize_on_alignment=["w_ptr", "y_ptr"],
)
def expm_fwd_kernel(
    w_ptr,
    y_ptr,
    tile_ptr,
    n_cols,
    w_stride,
    w_stride_row,
    w_stride_col,
    SIGN: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """exp(A), A = triu(w, 1) - triu(w, 1)^T (SIGN = -1) or triu(w) + triu(w, 1)^T (SIGN = 1)."""
    AREA: tl.constexpr = BLOCK * BLOCK
    STEPS: tl.constexpr = len(EVEN) // 2 - 1  # of Horner's scheme
    matrix = tl.program_id(0).to(tl.int64)
    w_ptr += matrix * w_stride
    tile_ptr += matrix * ((STEPS + 4) * AREA)
    strides = (w_stride_row, w_stride_col)
    down, mu = argument(w_ptr, tile_ptr, n_cols, *strides, SIGN, BLOCK, BLOCK_K)
    left = blocks(tile_ptr, n_cols, down, 1.0, SIGN, EVEN, ODD, BLOCK, BLOCK_K, PRECISION)
    # e^mu is multiplied on before the last three squarings at most, as in `expm`.
    last = tl.minimum(left, 3)
    growth = growth_of(mu, last)
    # By numbers of tiles, not by pointers, as in `expm_scratch`.
    for i in range(STEPS):
        z_ptr = tile_ptr + (STEPS + 2 + i % 2) * AREA
        z, entry = times(tile_ptr + 2 * AREA, z_ptr, n_cols, BLOCK, BLOCK_K, PRECISION)
        z += tl.load(tile_ptr + tl.where(i == STEPS - 1, 1, STEPS + 1 - i) * AREA + entry)
        if SIGN == 1:
            z *= tl.where((i == STEPS - 1) & (left == last), growth, 1.0)
        put(tile_ptr + (STEPS + 3 - i % 2) * AREA + entry, z)
    for i in range(STEPS, STEPS + left):
        z_ptr = tile_ptr + (STEPS + 2 + i % 2) * AREA
        z, entry = times(z_ptr, z_ptr, n_cols, BLOCK, BLOCK_K, "ieee" if SIGN == 1 else PRECISION)
        if SIGN == 1:
            z *= tl.where(i == STEPS - 1 + left - last, growth, 1.0)
        put(tile_ptr + (STEPS + 3 - i % 2) * AREA + entry, z)
    z_ptr = tile_ptr + (STEPS + 2 + (STEPS + left) % 2) * AREA
    y_ptr += matrix * n_cols * n_cols
    for row0 in range(0, n_cols, BLOCK_K):
        row, col, entry = rows_of(row0, BLOCK, BLOCK_K)
        y = tl.load(z_ptr + entry)
        if SIGN == 1:
            y = 0.5 * (y + tl.load(z_ptr + (col * BLOCK + row)))
        mask = (row < n_cols) & (col < n_cols)
        tl.store(y_ptr + (row * n_cols + col), y.to(y_ptr.dtype.element_ty), mask=mask)
