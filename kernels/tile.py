"""Device functions on one tile, shared by the kernels of several maps."""

import triton
import triton.language as tl


@triton.jit
def exponent(x):
    """e with 2^(e - 1) <= x < 2^e, for x >= 0 in fp32; -126 for 0, 129 for infinity and NaN."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 126


@triton.jit
def power_of_two(k):
    """2^k in fp32 for an int32 k from -126 to 127."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def growth_of(mu, last):
    """e^(mu / 2^last), rounded once: squarings double its error, and a GPU is 2 ulp off in fp32."""
    return tl.exp((mu * power_of_two(-last)).to(tl.float64)).to(mu.dtype)


@triton.jit
def places(n_matrices, n_cols, BLOCK: tl.constexpr, SLOT: tl.constexpr, TILES: tl.constexpr):
    """Which matrices the entries of a program's tiles belong to, and where in them.

    A tile is [BLOCK, BLOCK], with matrices of at most SLOT rows along its diagonal, zeros beside
    them; there are TILES to a program. Returned are `matrix` and `row` [..., BLOCK, 1], `col`
    [..., 1, BLOCK], and masks: of the blocks on the diagonal, of the diagonal, of what exists.
    """
    place = tl.arange(0, BLOCK)
    r = place[:, None]
    c = place[None, :]
    tile = tl.program_id(0).to(tl.int64) * TILES
    if TILES > 1:
        r = r[None, :, :]
        c = c[None, :, :]
        tile += tl.arange(0, TILES)[:, None, None]
    row = r % SLOT
    col = c % SLOT
    same = r // SLOT == c // SLOT
    mask = (row < n_cols) & (col < n_cols)
    if TILES * BLOCK == SLOT:
        return tile, row, col, same, r == c, mask
    else:
        matrix = tile * (BLOCK // SLOT) + r // SLOT
        return matrix, row, col, same, r == c, mask & same & (matrix < n_matrices)


@triton.jit
def keep(x, same, SLOT: tl.constexpr):
    """x with zeros beside the blocks, where a NaN in one of them may have got through."""
    return tl.where(same, x, 0.0) if x.shape[-1] > SLOT else x


@triton.jit
def product(x, y, same, SLOT: tl.constexpr, PRECISION: tl.constexpr, acc=None):
    """x y + acc of each matrix."""
    z = tl.dot(x, y, acc=acc, input_precision=PRECISION, out_dtype=x.dtype)
    return keep(z, same, SLOT)


@triton.jit
def choose(condition, x, y, same, SLOT: tl.constexpr):
    """x where the condition, one for each matrix, holds, else y; of a single matrix it holds."""
    if len(x.shape) == 2 and x.shape[-1] == SLOT:
        return x
    else:
        return tl.where(condition & same, x, y)


@triton.jit
def sum_each(x, same, SLOT: tl.constexpr):
    """The sum of each matrix, which is symmetric: [..., BLOCK or 1, 1], a scalar of just one."""
    if len(x.shape) == 2 and x.shape[-1] == SLOT:
        return tl.sum(tl.sum(x, axis=1), axis=0)
    else:
        cols = keep(tl.sum(x, axis=-2, keep_dims=True), same, SLOT)
        return tl.sum(cols, axis=-1, keep_dims=True)


@triton.jit
def max_each(x, same, SLOT: tl.constexpr):
    """The same of the largest entry; none is negative."""
    if len(x.shape) == 2 and x.shape[-1] == SLOT:
        return tl.max(tl.max(x, axis=1), axis=0)
    else:
        cols = keep(tl.max(x, axis=-2, keep_dims=True), same, SLOT)
        return tl.max(cols, axis=-1, keep_dims=True)


@triton.jit
def max_of(x):
    """The largest of what `sum_each` or `max_each` returns."""
    return tl.max(x) if x.type.is_block() else x


@triton.jit
def load_triu(
    w_ptr, stride_row, row, col, n_cols, mask, ACC: tl.constexpr, DIAGONAL: tl.constexpr = False
):
    """A block of triu(w, 1): w[row, col] where row < col < n_cols, else 0, as ACC.

    With DIAGONAL it is triu(w).
    """
    offset = row.to(tl.int64) * stride_row + col
    above = (row <= col) if DIAGONAL else (row < col)
    return tl.load(w_ptr + offset, mask=mask & above & (col < n_cols), other=0.0).to(ACC)


@triton.jit
def load_skew_block(
    w_ptr,
    stride_row,
    row,
    col,
    n_cols,
    mask,
    ROW0: tl.constexpr,
    COL0: tl.constexpr,
    ACC: tl.constexpr,
):
    """The block of X = triu(w, 1) - triu(w, 1)^T that starts at (ROW0, COL0).

    `row` is [BLOCK, 1, 1], `mask` and `w_ptr` are [1, matrices, 1], `col` is [1, 1, BLOCK].
    """
    x = load_triu(w_ptr, stride_row, ROW0 + row, COL0 + col, n_cols, mask, ACC)
    if ROW0 >= COL0:
        upper = x
        if ROW0 > COL0:
            # x is all masked here; it stays because the layout of a difference is that of x,
            # which has whole columns in a thread, and a permuted block alone has not.
            upper = load_triu(w_ptr, stride_row, COL0 + row, ROW0 + col, n_cols, mask, ACC)
        x = x - tl.permute(upper, (2, 1, 0))
    return x


@triton.jit
def take_lane(row, index, LANES: tl.constexpr):
    """row[index], where `row` is a tuple of parts [matrices, LANES], as many as fill the row."""
    value = tl.gather(row[0], index & (LANES - 1), 1)
    for part in tl.static_range(1, len(row)):
        value = tl.where(index < part * LANES, value, tl.gather(row[part], index & (LANES - 1), 1))
    return value


@triton.jit
def take_uniform(row, index, LANES: tl.constexpr):
    """The same with one shuffle; `index` must not vary within a matrix."""
    value = row[0]
    for part in tl.static_range(1, len(row)):
        value = tl.where(index < part * LANES, value, row[part])
    return tl.gather(value, index & (LANES - 1), 1)
