"""Square tiles in memory of a program's own: products of them, slice by slice, and the rest."""

import triton
import triton.language as tl


@triton.jit
def rows_of(row0, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows [BLOCK_K, 1] and columns [1, BLOCK] of a slice of a tile, and its offsets there."""
    row = row0 + tl.arange(0, BLOCK_K)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    return row, col, row * BLOCK + col


@triton.jit
def times(
    x_ptr, y_ptr, n_cols, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """x y of two tiles, and the offsets of its entries."""
    row = tl.arange(0, BLOCK)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    z = tl.zeros([BLOCK, BLOCK], x_ptr.dtype.element_ty)
    for k0 in range(0, n_cols, BLOCK_K):
        x = tl.load(x_ptr + (row * BLOCK + (k0 + tl.arange(0, BLOCK_K)[None, :])))
        y = tl.load(y_ptr + ((k0 + tl.arange(0, BLOCK_K)[:, None]) * BLOCK + col))
        z = tl.dot(x, y, acc=z, input_precision=PRECISION, out_dtype=z.dtype)
    return z, row * BLOCK + col


@triton.jit
def put(ptrs, z):
    """Write a tile that the whole program will read; none that this turn has read."""
    tl.store(ptrs, z)
    tl.debug_barrier()


@triton.jit
def one_of(k, x, y, z):
    """x, y or z for k = 0, 1, 2."""
    return tl.where(k == 0, x, tl.where(k == 1, y, z))
