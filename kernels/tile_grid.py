"""Device functions on the tiles that a matrix is cut into: their sums, and their mirror images."""

import triton
import triton.language as tl


@triton.jit
def tile_pointers(ptr, stride, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr, TRANS):
    """Pointers to the tile [ROWS, COLS] at (row0, col0) of a matrix stored by rows, or, where
    TRANS, by columns. Offsets inside the tile are int32: strides are below 2^24."""
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    if TRANS:
        return ptr + (tl.cast(col0, tl.int64) * stride + row0) + (c * stride + r)
    return ptr + (tl.cast(row0, tl.int64) * stride + col0) + (r * stride + c)


@triton.jit
def tile_sum(
    a_ptr,
    b_ptr,
    a_stride,
    b_stride,
    row0,
    col0,
    n_rows,
    n_cols,
    n_inner,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The tile at (row0, col0) of A B, [BLOCK, BLOCK]."""
    a_ptrs = tile_pointers(a_ptr, a_stride, row0, 0, BLOCK, BLOCK_K, TRANS_A)
    b_ptrs = tile_pointers(b_ptr, b_stride, 0, col0, BLOCK_K, BLOCK, TRANS_B)
    a_step = BLOCK_K * a_stride if TRANS_A else BLOCK_K
    b_step = BLOCK_K if TRANS_B else BLOCK_K * b_stride
    a_mask = row0 + tl.arange(0, BLOCK)[:, None] < n_rows
    b_mask = col0 + tl.arange(0, BLOCK)[None, :] < n_cols
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK, BLOCK], ACC)
    for k0 in range(0, n_inner, BLOCK_K):
        inside = k0 + k < n_inner
        a = tl.load(a_ptrs, mask=a_mask & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=b_mask & inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc=acc, input_precision=PRECISION, out_dtype=ACC)
        a_ptrs += a_step
        b_ptrs += b_step
    return acc


@triton.jit
def triangle(index):
    """The tile pair (i, j), i <= j, of an index into the triangle, column after column."""
    # 8 index + 1 is (2j + 1)^2 where a column begins, and a GPU's square root may be an ulp less:
    # halfway between two columns it is right up to 1400 tiles in a row.
    j = ((tl.sqrt((8 * index + 5).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    return index - j * (j + 1) // 2, j


@triton.jit
def store_pair(ptr, z, mirror, i, j, n, BLOCK: tl.constexpr):
    """Tile (i, j) of an n x n matrix, stored by rows, and beside the diagonal its mirror image."""
    r = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    row = i * BLOCK + r
    col = j * BLOCK + c
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + (row * n + col), z.to(dtype), mask=(row < n) & (col < n))
    if i < j:
        row = j * BLOCK + r
        col = i * BLOCK + c
        tl.store(ptr + (row * n + col), mirror.to(dtype), mask=(row < n) & (col < n))


@triton.jit
def store_sums(sums_ptr, z, diagonal, mask, times):
    """The trace of a tile and `times` the sum of its squares, where the mask holds."""
    z = tl.where(mask, z, 0.0)
    trace = tl.sum(tl.sum(tl.where(diagonal, z, 0.0), axis=1), axis=0)
    tl.store(sums_ptr, trace)
    tl.store(sums_ptr + 1, tl.sum(tl.sum(z * z, axis=1), axis=0) * times)
