"""Inverses of k x k matrices that need no pivoting, one program each, in fp64."""

import torch
import triton
import triton.language as tl

from tritonparam.kernels.launch import launch
from tritonparam.kernels.tall import load_part

# "skew": I - a (C - C^T) + b G, or with "lower", of the part of C below the diagonal. "triangle":
# the upper triangular N with N + N^T = G.
FORMS = ("skew", "lower", "triangle")
MAX_K = 256  # one program works on a matrix


@triton.jit
def _entries(
    gram_ptr,
    c_ptr,
    row,
    col,
    n_cols,
    gram_stride_row,
    gram_stride_col,
    c_stride_row,
    c_stride_col,
    FORM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """What is inverted, at [row, col]."""
    at = (n_cols, n_cols, gram_stride_row, gram_stride_col)
    g = load_part(gram_ptr, row, col, *at, "all")
    if FORM == "triangle":
        s = tl.where(row < col, g, tl.where(row == col, 0.5 * g, 0.0))
    else:
        at = (n_cols, n_cols, c_stride_row, c_stride_col)
        c = load_part(c_ptr, row, col, *at, "all")
        mirror = load_part(c_ptr, col, row, *at, "all")
        if FORM == "lower":
            c = tl.where(row > col, c, 0.0)
            mirror = tl.where(row < col, mirror, 0.0)
        s = g * tl.full([], B, tl.float64) + tl.where(row == col, 1.0, 0.0)
        s -= (c - mirror) * tl.full([], A, tl.float64)
    return s


@triton.jit
def _load(ptr, row, col, n_cols):
    """Of a matrix so small that offsets are int32."""
    return tl.load(ptr + (row * n_cols + col), mask=(row < n_cols) & (col < n_cols), other=0.0)


@triton.jit
def _inverse_of_block(a, n_pivots, SIZE: tl.constexpr):
    """A^{-1} of a small tile, by pivots on the diagonal; after n_pivots it is the identity."""
    index = tl.arange(0, SIZE)
    row, col = index[:, None], index[None, :]
    for k in range(0, n_pivots):
        pivot_row = tl.sum(tl.where(row == k, a, 0.0), axis=0)
        pivot_col = tl.sum(tl.where(col == k, a, 0.0), axis=1)
        pivot = tl.sum(tl.where(index == k, pivot_row, 0.0), axis=0)
        inverse = 1.0 / pivot + (pivot - pivot)  # an infinite pivot gives NaN, not 0
        pivot_row = tl.where(index == k, 1.0, pivot_row) * inverse
        rest = tl.where(col == k, 0.0, a) - pivot_col[:, None] * pivot_row[None, :]
        a = tl.where(row == k, pivot_row[None, :], rest)
    return a


@triton.jit
def _inverse_kernel(
    gram_ptr,
    c_ptr,
    out_ptr,
    n_cols,
    gram_stride,
    gram_stride_row,
    gram_stride_col,
    c_stride,
    c_stride_row,
    c_stride_col,
    FORM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    PIVOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The inverse of one of the FORMS, by Gauss-Jordan in blocks of PIVOTS columns p.

    With X, the matrix so far, R = X[p, p]^{-1} X[p, :] after X[p, p] is set to I in what is
    multiplied, a step is X[p, :] <- R and, for the other rows i, X[i, p] <- 0 and then
    X[i, :] <- X[i, :] - X_before[i, p] R. Nothing is pivoted: the symmetric part of what is
    inverted is at least I, and so is that of every Schur complement (Golub & Van Loan, Matrix
    Computations, 4.2), or it is a triangle with a diagonal of at least 1/2.

    Steps go from one half of out, [2, k, k], to the other; the last writes the first. A number
    that is not finite makes all of the inverse NaN.
    """
    matrix = tl.program_id(0).to(tl.int64)
    size = n_cols * n_cols
    n_steps = tl.cdiv(n_cols, PIVOTS)
    out_ptr += matrix * 2 * size
    gram_ptr += matrix * gram_stride
    if c_ptr is not None:
        c_ptr += matrix * c_stride
    source_ptr = out_ptr + n_steps % 2 * size
    target_ptr = out_ptr + (n_steps + 1) % 2 * size
    pivot = tl.arange(0, PIVOTS)
    row = tl.arange(0, BLOCK)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    strides = (gram_stride_row, gram_stride_col, c_stride_row, c_stride_col)
    nan = tl.zeros([BLOCK], tl.float64)  # once anything is not finite
    for row0 in range(0, n_cols, PIVOTS):
        strip = row0 + pivot[:, None]
        for col0 in range(0, n_cols, BLOCK):
            j = col0 + col
            s = _entries(gram_ptr, c_ptr, strip, j, n_cols, *strides, FORM, A, B)
            nan += tl.sum(s - s, axis=0)
            tl.store(source_ptr + (strip * n_cols + j), s, mask=(strip < n_cols) & (j < n_cols))
    nan_everywhere = tl.sum(nan, axis=0)
    tl.debug_barrier()

    for step in range(0, n_steps):
        first = step * PIVOTS
        last = first + PIVOTS
        p, p_col = first + pivot[:, None], first + pivot[None, :]
        block = _load(source_ptr, p, p_col, n_cols)
        block = _inverse_of_block(block, tl.minimum(n_cols - first, PIVOTS), PIVOTS)
        block += nan_everywhere
        for col0 in range(0, n_cols, BLOCK):
            j = col0 + col
            of_step = (j >= first) & (j < last)
            r = _load(source_ptr, p, j, n_cols)
            r = tl.where(of_step, tl.where(p == j, 1.0, 0.0), r)
            r = tl.dot(block, r, input_precision="ieee", out_dtype=tl.float64)
            for row0 in range(0, n_cols, BLOCK):
                i = row0 + row
                pivots = (i >= first) & (i < last)
                x = _load(source_ptr, i, j, n_cols)
                x = tl.where(pivots | of_step, 0.0, x)
                m = _load(source_ptr, i, p_col, n_cols)
                m = tl.where(pivots, tl.where(i == p_col, 1.0, 0.0), -m)
                x = tl.dot(m, r, acc=x, input_precision="ieee", out_dtype=tl.float64)
                tl.store(target_ptr + (i * n_cols + j), x, mask=(i < n_cols) & (j < n_cols))
        tl.debug_barrier()
        source_ptr, target_ptr = target_ptr, source_ptr


def inverse(
    gram: torch.Tensor, c: torch.Tensor | None, form: str, a: float = 1.0, b: float = 1.0
) -> torch.Tensor:
    """The inverse of what `form` makes of G and C, [matrices, k, k] in fp64, k <= MAX_K.

    `gram` is G, in fp64, and `c` is C, in fp32 or fp64, both of any strides.
    """
    assert form in FORMS
    n_matrices, n_cols, _ = gram.shape
    assert n_cols <= MAX_K
    shape = (n_matrices, 2, n_cols, n_cols)
    out = torch.empty(shape, dtype=torch.float64, device=gram.device)
    c_strides = (0, 0, 0) if c is None else c.stride()
    options = _options(n_cols, form, a, b)
    strides = (*gram.stride(), *c_strides)
    launch(_inverse_kernel, (n_matrices,), gram, c, out, n_cols, *strides, **options)
    return out[:, 0]


def _options(k: int, form: str, a: float, b: float) -> dict:
    options: dict = {"FORM": form, "A": a, "B": b, "PIVOTS": 16, "BLOCK": 32 if k <= 32 else 64}
    return options | {"num_warps": 4 if k <= 32 else 8, "num_stages": 1, "enable_fp_fusion": True}


def shipped(backend: str) -> list[tuple]:
    """Launches for compiling ahead of time, as `cayley.shipped`."""
    rows: list[tuple] = []
    for form, c in (("skew", "fp64"), ("lower", "fp32"), ("triangle", None)):
        for k in (32, 64):
            types = {"gram_ptr": "*fp64", "out_ptr": "*fp64"}
            types |= {} if c is None else {"c_ptr": f"*{c}"}
            options = _options(k, form, 0.5, 0.25) | ({"c_ptr": None} if c is None else {})
            rows.append((f"inverse_{form}_{k}", _inverse_kernel, types, options))
    return rows
