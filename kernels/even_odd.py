"""The polynomials of small exponentials of skew and symmetric matrices, and how far they reach.

exp(A) = c(B) + A s(B), B = A^2, with c ~ cosh and s ~ sinh / sqrt of the root of B.
"""

import torch
import triton
import triton.language as tl

from tritonparam.kernels.tile import exponent

# Coefficients of c and s over powers of B: the polynomials that interpolate cosh(sqrt B) and
# sinh(sqrt B) / sqrt B at B = 0 and at the other zeros of a Chebyshev polynomial on the spectrum
# of B for ||A|| <= THETA. Their truncation moves exp(A) by at most 6e-9 for fp32, degree 5, and
# 1e-18 for fp64, degree 9: less than a tenth of eps, since it has one sign, so that squarings add
# it up where rounding averages.
THETA = tl.constexpr(2.0)
EVEN_ODD = {
    (-1, torch.float32): (
        (1.0, 0.49999995057457017, 0.041666491253384114, 0.0013886863772994181)
        + (2.4699251487419051e-5, 2.5193240172735751e-7),
        (1.0, 0.16666666283152309, 0.008333319725127865, 0.00019839699494397557)
        + (2.7478031548163227e-6, 2.3223754429853867e-8),
    ),
    (1, torch.float32): (
        (1.0, 0.50000005626361731, 0.041666467602728139, 0.0013891172273153446)
        + (2.4687614771152288e-5, 3.0121817296116397e-7),
        (1.0, 0.1666666709576315, 0.0083333181486130005, 0.00019843012346739265)
        + (2.7470274573865824e-6, 2.7014062864620893e-8),
    ),
    (-1, torch.float64): (
        (1.0, 0.4999999999999999734, 0.0416666666666663998, 0.001388888888887967001)
        + (2.480158730002564973e-5, 2.755731907430104026e-7, 2.087674831928225909e-9)
        + (1.147043610884979555e-11, 4.772809278042340216e-14, 1.482215340966785891e-16),
        (1.0, 0.1666666666666666654, 0.008333333333333320578, 0.0001984126984126543507)
        + (2.755731922323953557e-6, 2.505210831390954122e-8, 1.605903969477531169e-10)
        + (7.647015881529464967e-13, 2.808272891987215319e-15, 7.840271976981089324e-18),
    ),
    (1, torch.float64): (
        (1.0, 0.500000000000000029, 0.04166666666666637595, 0.001388888888889892354)
        + (2.480158729988967568e-5, 2.755731938638467481e-7, 2.087674761083875293e-9)
        + (1.147107882069184064e-11, 4.772355268252117046e-14, 1.645673155926632261e-16),
        (1.0, 0.166666666666666668, 0.008333333333333319541, 0.0001984126984127460214)
        + (2.755731922318041874e-6, 2.505210846250148233e-8, 1.605903938676768188e-10)
        + (7.6473219009214208e-13, 2.808075502567646204e-15, 8.618594158742314314e-18),
    ),
}


@triton.jit
def doublings(square, down, SIGN: tl.constexpr):
    """How often A / 2^down, of norm 1 or less, can be doubled, up to `down`: `square` is the sum of
    the squares of A^4, and the norm of what results is THETA at most.
    """
    if SIGN == -1:
        square = square * 0.5
    norm = tl.sqrt(tl.sqrt(tl.sqrt(square)))
    # It is 8 at most, but of an infinite matrix, whose scale must leave the zeros beside it zero.
    most = tl.minimum(down, 30)
    return tl.minimum(tl.maximum(exponent(1.0 / tl.maximum(norm, 1e-30) * THETA) - 1, 0), most)
