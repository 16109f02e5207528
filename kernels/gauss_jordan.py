"""The Cayley map of small matrices by elimination: the forward kernels of `kernels/cayley.py`."""

import triton
import triton.language as tl

from tritonparam.kernels.tile import load_skew_block, load_triu, take_lane, take_uniform


@triton.jit
def _reciprocal(x):
    """1 / x, rounded once: a GPU's own quotient is up to 2 ulp off. NaN of infinity and of 0."""
    y = 1.0 / x
    return tl.fma(y, tl.fma(-x, y, 1.0), y)


@triton.jit
def _excess(t, s):
    """By how much columns of M = (I - X)^{-1} are too long, of t = sum M (M - I) and s = sum M^2.

    M + M^T = 2 M^T M, so that t is 0 but for rounding, above all of what were pivots near 1. Where
    s, which is above 1 / (1 + ||X||^2), is so small that fp32 no longer sees M in Q, less is taken.
    """
    return t / tl.maximum(s, 1e-7)


@triton.jit(
    do_not_specialize=["n_matrices", "n_cols", "w_stride", "w_stride_row", "d_stride"],
    do_not_specialize_on_alignment=["w_ptr", "d_ptr", "q_ptr"],
)
def cayley_fwd_kernel(
    w_ptr,
    d_ptr,
    q_ptr,
    n_matrices,
    n_cols,
    w_stride,
    w_stride_row,
    d_stride,
    BLOCK_COLS: tl.constexpr,
    BLOCK_LANES: tl.constexpr,
    BLOCK_MATRICES: tl.constexpr,
    ACC: tl.constexpr,
    UNROLL: tl.constexpr = 2,
):
    """Q = (2 A^{-1} - I) diag(d), A = I - X, X = triu(w, 1) - triu(w, 1)^T.

    In-place Gauss-Jordan with column pivoting (Golub & Van Loan, Matrix Computations, 3.4; it is
    partial pivoting on A^T). Step k takes row k as it stands, finds its largest entry p_k among
    the columns not used so far and eliminates column p_k from every other row. What then stands
    at (k, p_l) is A^{-1}[p_k, l].

    A row lies in registers with its columns in lanes: row i is the tuple of [BLOCK_MATRICES,
    BLOCK_LANES] at rows[i * PARTS]. The pivot rows are always the first UNROLL, because the tuple
    rotates by as many after them; no register is indexed at run time. UNROLL is 2 because at 1
    LLVM vectorizes across the rotation and keeps every row twice.
    """
    PARTS: tl.constexpr = BLOCK_COLS // BLOCK_LANES
    row = tl.arange(0, BLOCK_LANES)[:, None, None]
    slot = tl.program_id(0).to(tl.int64) * BLOCK_MATRICES + tl.arange(0, BLOCK_MATRICES)
    matrix = slot[None, :, None]
    col = tl.arange(0, BLOCK_LANES)[None, None, :]
    mask = matrix < n_matrices
    w_ptr += matrix * w_stride
    rows = ()
    for row0 in tl.static_range(0, BLOCK_COLS, BLOCK_LANES):
        blocks = ()
        for col0 in tl.static_range(0, BLOCK_COLS, BLOCK_LANES):
            x = load_skew_block(w_ptr, w_stride_row, row, col, n_cols, mask, row0, col0, ACC)
            blocks = blocks + (tl.where(row0 + row == col0 + col, 1.0, -x),)
        for i in tl.static_range(BLOCK_LANES):
            here = row == i
            for part in tl.static_range(PARTS):
                rows = rows + (tl.sum(tl.where(here, blocks[part], 0.0), axis=0),)

    zero = tl.zeros([BLOCK_MATRICES, BLOCK_LANES], tl.int32)
    cols = ()  # the column of each lane
    source = ()  # the step that used this column; -1 before it, 0 in the padding
    pivots = ()  # p_k in lane k
    for part in tl.static_range(PARTS):
        lane = zero + tl.arange(0, BLOCK_LANES)[None, :] + part * BLOCK_LANES
        cols = cols + (lane,)
        source = source + (tl.where(lane < n_cols, -1, 0),)
        pivots = pivots + (zero,)
    for k0 in range(0, n_cols, UNROLL):
        for j in tl.static_range(UNROLL):
            k = k0 + j
            # Largest magnitude first; the column in the last bits breaks ties (within 2^-17).
            best = zero - 1
            for part in tl.static_range(PARTS):
                size = tl.abs(rows[j * PARTS + part]).to(tl.float32).to(tl.int32, bitcast=True)
                free = tl.where(k < n_cols, source[part], cols[part] - k - 1) == -1
                best = tl.maximum(best, tl.where(free, (size & -BLOCK_COLS) | cols[part], -1))
            pivot = zero + (tl.max(best, axis=1, keep_dims=True) & (BLOCK_COLS - 1))
            a = take_uniform(rows[j * PARTS : (j + 1) * PARTS], pivot, BLOCK_LANES)
            inverse = _reciprocal(a)
            hits = ()
            scaled = ()
            next_source = ()
            next_pivots = ()
            for part in tl.static_range(PARTS):
                hit = cols[part] == pivot
                hits = hits + (hit,)
                scaled = scaled + (tl.where(hit, inverse, rows[j * PARTS + part] * inverse),)
                next_source = next_source + (tl.where(hit, k, source[part]),)
                next_pivots = next_pivots + (tl.where(cols[part] == k, pivot, pivots[part]),)
            source = next_source
            pivots = next_pivots
            next_rows = ()
            for i in tl.static_range(BLOCK_COLS):
                if i == j:
                    next_rows = next_rows + scaled
                else:
                    m = take_uniform(rows[i * PARTS : (i + 1) * PARTS], pivot, BLOCK_LANES)
                    for part in tl.static_range(PARTS):
                        base = tl.where(hits[part], 0.0, rows[i * PARTS + part])
                        next_rows = next_rows + (base - m * scaled[part],)
            rows = next_rows
        rows = rows[UNROLL * PARTS :] + rows[: UNROLL * PARTS]

    shift = BLOCK_COLS - (n_cols + UNROLL - 1) // UNROLL * UNROLL  # row k is now at k + shift
    excess = ()
    for part in tl.static_range(PARTS):
        diagonal = take_lane(source, source[part], BLOCK_LANES) + shift
        t = tl.zeros([BLOCK_MATRICES, BLOCK_LANES], ACC)
        s = tl.zeros([BLOCK_MATRICES, BLOCK_LANES], ACC)
        for i in tl.static_range(BLOCK_COLS):
            m = rows[i * PARTS + part]
            t += m * (m - tl.where(diagonal == i, 1.0, 0.0))
            s += m * m
        excess = excess + (_excess(t, s),)

    # Loops over the blocks of Q, to compile a quarter of the code.
    q_ptr += matrix * n_cols * n_cols
    for out_row in range(0, BLOCK_COLS, BLOCK_LANES):
        k = cols[0] + (out_row - shift)
        p = take_lane(pivots, k, BLOCK_LANES)
        p = tl.where((k >= 0) & (k < n_cols), p, BLOCK_COLS)
        p = tl.permute(p[None, :, :], (2, 1, 0))  # p_k, [BLOCK_LANES, matrices, 1]
        sources = pivots
        for out_col in range(0, BLOCK_COLS, BLOCK_LANES):
            c = out_col + col
            q = tl.zeros([BLOCK_LANES, BLOCK_MATRICES, BLOCK_LANES], ACC)
            for i in tl.static_range(BLOCK_LANES):
                line = take_lane(rows[i * PARTS : (i + 1) * PARTS], sources[0], BLOCK_LANES)
                q = tl.where(row == i, line[None, :, :], q)
            q -= take_lane(excess, sources[0], BLOCK_LANES)[None, :, :] * q
            mask_c = mask & (c < n_cols)
            d = tl.load(d_ptr + matrix * d_stride + c, mask=mask_c, other=0.0).to(ACC)
            q = (2.0 * q - tl.where(p == c, 1.0, 0.0)) * d
            tl.store(q_ptr + (p * n_cols + c), q, mask=mask_c & (p < BLOCK_COLS))
            sources = sources[1:] + sources[:1]
        rows = rows[BLOCK_LANES * PARTS :] + rows[: BLOCK_LANES * PARTS]


@triton.jit(
    do_not_specialize=["n_cols", "w_stride", "w_stride_row", "d_stride"],
    do_not_specialize_on_alignment=["w_ptr", "d_ptr", "q_ptr"],
)
def cayley_fwd_tile_kernel(
    w_ptr,
    d_ptr,
    q_ptr,
    n_cols,
    w_stride,
    w_stride_row,
    d_stride,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The same elimination on one tile spread over several warps, for what fills more registers
    than a warp has (fp64 above n = 32)."""
    matrix = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_COLS)
    col = tl.arange(0, BLOCK_COLS)
    r = row[:, None]
    c = col[None, :]
    x = load_triu(w_ptr + matrix * w_stride, w_stride_row, r, c, n_cols, True, ACC)
    a = tl.where(r == c, 1.0, tl.trans(x) - x)  # [BLOCK_COLS, BLOCK_COLS]
    target = row  # p_k
    source = col  # the step that used this column
    used = tl.where(col < n_cols, 0, 1)
    for k in range(0, n_cols):
        s = tl.sum(tl.where(r == k, a, 0.0), axis=0)
        size = tl.abs(s).to(tl.float32).to(tl.int32, bitcast=True)
        size = tl.where(used == 0, (size & -BLOCK_COLS) | col, -1)
        pivot = tl.max(size, axis=0) & (BLOCK_COLS - 1)
        m = tl.sum(tl.where(c == pivot, a, 0.0), axis=1)
        p = tl.sum(tl.where(col == pivot, s, 0.0), axis=0)
        inverse = _reciprocal(p)
        s = tl.where(col == pivot, inverse, s * inverse)
        a = tl.where(r == k, s[None, :], tl.where(c == pivot, 0.0, a) - m[:, None] * s[None, :])
        target = tl.where(row == k, pivot, target)
        source = tl.where(col == pivot, k, source)
        used = tl.where(col == pivot, 1, used)
    mask = (r < n_cols) & (c < n_cols)
    d = tl.load(d_ptr + matrix * d_stride + source, mask=col < n_cols, other=0.0).to(ACC)
    eye = tl.where(target[:, None] == source[None, :], 1.0, 0.0)
    excess = _excess(tl.sum(a * (a - eye), axis=0), tl.sum(a * a, axis=0))
    a -= excess[None, :] * a
    q = (2.0 * a - eye) * d[None, :]
    offset = (matrix * n_cols + target[:, None]) * n_cols + source[None, :]
    tl.store(q_ptr + offset, q, mask=mask)
