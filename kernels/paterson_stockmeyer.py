"""exp of skew or symmetric matrices in registers: what both kernels of `expm` begin with.

With B = A^2 the polynomial is c(B) + A s(B), c ~ cosh and s ~ sinh / sqrt of the root of B, summed
by Horner in A^4 (Paterson & Stockmeyer 1973): A^2, A^4, A^3 and one product for each further block
of four terms, five in all.
"""

import triton
import triton.language as tl

from tritonparam.kernels.even_odd import doublings
from tritonparam.kernels.tile import exponent, max_each, power_of_two, product, sum_each


@triton.jit
def load(ptr, strides, place, mask, BLOCK: tl.constexpr):
    """x[matrix, row, col] in fp32; tiles larger than 16 have no register for a column's stride."""
    stride, stride_row, stride_col = strides
    ptr += place[0] * stride
    offset = place[1].to(tl.int64) * stride_row
    offset += place[2] if BLOCK > 16 else place[2].to(tl.int64) * stride_col
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def argument(
    w_ptr,
    w_strides,
    place,
    n_cols,
    SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOT: tl.constexpr,
    TILES: tl.constexpr,
):
    """A, skew (SIGN = -1) or symmetric (1), from its upper triangle; and its shift mu.

    exp(A) = e^mu exp(A - mu I) with mu the mean eigenvalue where it is negative, else 0: so the
    polynomial does not cancel. Only a symmetric A is shifted.
    """
    _, row, col, same, diagonal, mask = place
    above = ((row <= col) if SIGN == 1 else (row < col)) & (col < n_cols)
    if SLOT < BLOCK or TILES > 1:
        above &= mask
    x = load(w_ptr, w_strides, place, above, BLOCK)
    if SIGN == -1:
        return x - tl.trans(x), 0.0
    else:
        on_diagonal = diagonal & (row < n_cols)
        mean = sum_each(tl.where(on_diagonal, x, 0.0), same, SLOT) / n_cols
        mu = tl.minimum(tl.maximum(mean, -500.0), 0.0)
        a = tl.where(row <= col, x, tl.trans(x))
        return tl.where(on_diagonal, a - mu, a), mu


@triton.jit
def scaled(a, n_cols, same, SLOT: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr):
    """A, A^2 and A^4 of A / 2^s, and s, the least with ||A^4||_F^(1/4) <= THETA 2^s.

    That bounds ||A|| since A is normal, and nearly attains it. The eigenvalues of a skew matrix
    come in pairs, which halves the square of the Frobenius norm. Before its powers are taken the
    matrix is brought to norm 1, so that nothing overflows.
    """
    largest = max_each(tl.abs(a), same, SLOT)
    down = tl.minimum(tl.maximum(exponent(largest) + exponent(n_cols * 1.0), 0), 125)
    a = a * power_of_two(-down)
    b = product(a, a, same, SLOT, PRECISION)
    b2 = product(b, b, same, SLOT, PRECISION)
    up = doublings(sum_each(b2 * b2, same, SLOT), down, SIGN)
    scale = power_of_two(up)
    b = b * (scale * scale)
    b2 = b2 * (scale * scale) * (scale * scale)
    return a * scale, b, b2, down - up


@triton.jit
def _block(a, b, k, diagonal, J: tl.constexpr, EVEN: tl.constexpr, ODD: tl.constexpr):
    """EVEN[J] I + ODD[J] A + EVEN[J + 1] A^2 + ODD[J + 1] A^3."""
    return tl.where(diagonal, EVEN[J], 0.0) + a * ODD[J] + b * EVEN[J + 1] + k * ODD[J + 1]


@triton.jit
def polynomial(
    a,
    b,
    b2,
    diagonal,
    same,
    SLOT: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c(B) + A s(B), B = A^2."""
    k = product(a, b, same, SLOT, PRECISION)
    y = _block(a, b, k, diagonal, len(EVEN) - 2, EVEN, ODD)
    for j in tl.static_range(len(EVEN) - 4, -1, -2):
        block = _block(a, b, k, diagonal, j, EVEN, ODD)
        y = product(b2, y, same, SLOT, PRECISION, block)
    return y
