"""Device functions on the tiles that a matrix is cut into: sums, mirror images, products."""

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


@triton.jit
def tiles_of(n_rows, n_cols, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """How many tiles, or pairs of tiles (i, j), (j, i) where the form is not "full"."""
    n_row_tiles = tl.cdiv(n_rows, BLOCK)
    if FORM == "full":
        n_tiles = n_row_tiles * tl.cdiv(n_cols, BLOCK)
    else:
        n_tiles = n_row_tiles * (n_row_tiles + 1) // 2
    return n_tiles


@triton.jit
def product_tile(
    matrix,
    index,
    a,
    b,
    c,
    out_ptr,
    u,
    v,
    scale,
    rough,
    sums_ptr,
    sizes,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GAMMA: tl.constexpr,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    TRANS_C: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile, or pair of tiles, of one matrix of `gemm.product`: computed, and stored.

    a, b and c are pointers, each with the stride of matrices and that of rows or columns; u, v and
    scale those with the stride of matrices alone. With sums there is a program for each tile.
    """
    a_ptr, a_stride_matrix, a_stride = a
    b_ptr, b_stride_matrix, b_stride = b
    n_rows, n_cols, n_inner = sizes
    n_row_tiles = tl.cdiv(n_rows, BLOCK)
    n_col_tiles = tl.cdiv(n_cols, BLOCK)
    if FORM == "full":
        # GROUP rows of tiles at a time, column after column: their operands stay in L2.
        group = index // (GROUP * n_col_tiles)
        height = tl.minimum(n_row_tiles - group * GROUP, GROUP)
        within = index % (GROUP * n_col_tiles)
        i = group * GROUP + within % height
        j = within // height
    else:
        i, j = triangle(index)
    a_ptr += matrix * a_stride_matrix
    b_ptr += matrix * b_stride_matrix
    HALVES: tl.constexpr = 1 if FORM == "full" or FORM == "symmetric" or FORM == "skew" else 2
    z = tl.zeros([BLOCK, BLOCK], ACC)
    for half in tl.static_range(HALVES):  # the tile (i, j), last; before it (j, i)
        partner = z
        row0 = (i if half == HALVES - 1 else j) * BLOCK
        col0 = (j if half == HALVES - 1 else i) * BLOCK
        tile = (a_ptr, b_ptr, a_stride, b_stride, row0, col0, n_rows, n_cols, n_inner)
        if rough is None or rough == 0:
            z = tile_sum(*tile, TRANS_A, TRANS_B, BLOCK, BLOCK_K, PRECISION, ACC)
        else:
            z = tile_sum(*tile, TRANS_A, TRANS_B, BLOCK, BLOCK_K, "tf32", ACC)
        row = row0 + tl.arange(0, BLOCK)[:, None]
        col = col0 + tl.arange(0, BLOCK)[None, :]
        mask = (row < n_rows) & (col < n_cols)
        z *= ALPHA
        if u is not None:
            u_ptr, u_stride = u
            factor = tl.load(u_ptr + matrix * u_stride + col, mask=col < n_cols, other=0.0)
            z *= factor.to(ACC)
        rest = tl.where(row == col, 1.0, 0.0).to(ACC) * GAMMA
        if c is not None:
            c_ptr, c_stride_matrix, c_stride = c
            c_ptrs = tile_pointers(c_ptr, c_stride, row0, col0, BLOCK, BLOCK, TRANS_C)
            add = tl.load(c_ptrs + matrix * c_stride_matrix, mask=mask, other=0.0)
            rest += add.to(ACC) * BETA
        if v is not None:
            v_ptr, v_stride = v
            factor = tl.load(v_ptr + matrix * v_stride + col, mask=col < n_cols, other=0.0)
            rest *= factor.to(ACC)
        z += rest
        if scale is not None:
            scale_ptr, scale_stride = scale
            z *= tl.load(scale_ptr + matrix * scale_stride)
    mirror = z
    if FORM == "symmetric":
        mirror = tl.trans(z)
        z = tl.where(row > col, mirror, z)
    if FORM == "skew":
        mirror = -tl.trans(z)
        z = tl.where(row > col, mirror, tl.where(row == col, 0.0, z))
    if FORM == "difference" or FORM == "skew_gradient":
        z -= tl.trans(partner)
        mirror = -tl.trans(z)
    if FORM == "sum":
        z += tl.trans(partner)
        mirror = tl.trans(z)
    if FORM == "symmetric_gradient":
        z = tl.where(row == col, z, z + tl.trans(partner))
    if FORM == "symmetric_gradient" or FORM == "skew_gradient":
        mirror = tl.zeros_like(z)
        above = row <= col if FORM == "symmetric_gradient" else row < col
        z = tl.where(above, z, 0.0)
    out_ptr += matrix * n_rows * n_cols
    if FORM == "full":
        tl.store(out_ptr + (row * n_cols + col), z.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        store_pair(out_ptr, z, mirror, i, j, n_cols, BLOCK)
    if sums_ptr is not None:
        times = 1.0 if FORM == "full" else tl.where(i < j, 2.0, 1.0)
        store_sums(sums_ptr + tl.program_id(0).to(tl.int64) * 2, z, row == col, mask, times)
