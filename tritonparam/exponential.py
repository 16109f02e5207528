"""exp(A) of [b, n, n] in fp32 or fp64, and its adjoint, linear in the gradient that comes in.

Scaling and squaring: exp(A) = p(A / 2^s)^(2^s), each matrix with its own s, from bounds of its norm
that include that of A². The polynomial p is one of two.

Even/odd, for skew or symmetric A in fp32: with B = A², exp(A) = c(B) + A s(B), c and s of degree 6
(Paterson & Stockmeyer 1973: six products). The coefficients are near-minimax on the spectrum of B
for ‖A‖ <= 3.4, with c(0) = s(0) = 1 and a truncation error of 4e-8.

Taylor, for any A: degree 12 or 18 in 4 or 5 products (Bader, Blanes & Casas, "Computing the matrix
exponential with an optimized Taylor polynomial approximation", Mathematics 7(12), 2019).

Everything is written in differentiable operators, so that recording the adjoint differentiates it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from tritonparam.numerics import identity_like

Kind = Literal["skew", "symmetric", "general"]
Saved = tuple[Tensor | None, ...]
Table = tuple[tuple[float, ...], ...]

# Where the host must not wait for a norm, so many squarings are launched, and masked for matrices
# that need fewer: enough for ‖A‖ <= 3.4 · 2^12 = 13,900. Beyond that the result is NaN.
_LAUNCHED = 12

# Rows c, s over B, B², B³ (after the leading 1), and c, s over the same times B³.
_EVEN_ODD = {
    "skew": (
        (0.4999998114770654, 0.041666347230318819, 0.0013887084077417518),
        (0.1666666421782797, 0.0083332999171947236, 0.00019839635032366541),
        (2.4754559474877075e-05, 2.6933620341196188e-07, 1.6737689683742903e-09),
        (2.7518934571085639e-06, 2.4582094248018048e-08, 1.3134934764754287e-10),
    ),
    "symmetric": (
        (0.49999992471420962, 0.041666853008941143, 0.0013887522584617625),
        (0.16666665471959033, 0.008333355098891054, 0.00019839957824830201),
        (2.4844403687812973e-05, 2.6913522279279284e-07, 2.5417348656609646e-09),
        (2.7593201005021339e-06, 2.4563764412842265e-08, 1.925423225150378e-10),
    ),
}
_EVEN_ODD_THETA = 3.4

# Rows B1, B2, ... over I, A, A², A³ and, in degree 18, A⁶. Degree 12: A6 = B3 + B4²,
# p = B1 + (B2 + A6) A6. Degree 18: A9 = B4 + B1 B5, p = B2 + (B3 + A9) A9.
_TAYLOR = {
    12: (
        (9.0198e-16, 0.4693211759541824, -0.20099424927047284, -0.046239461340630717),
        (5.315978957598712, 1.1992679041713223, 0.01179296240992997, 0.01108844528519168),
        (0.18188869982170435, 0.05502798439925399, 0.09351590770535415, 0.0061070052889805823),
        (-2.0861320e-13, -0.13181061013830184, -0.020278555405892591, -0.0067595184686308636),
    ),
    18: (
        (0.0, -0.10036558103014462, -0.0080292464824115696, -0.00089213849804572998, 0.0),
        (
            0.0,
            0.39784974949964508,
            1.3678377846041172,
            0.49828962252538267,
            -0.00063789819459472328,
        ),
        (
            -10.967639605296206,
            1.6801581387890621,
            0.05717798464788655,
            -0.0069821012248805206,
            3.3497501708607047e-05,
        ),
        (
            -0.090431683239081062,
            -0.067640451907138188,
            0.067596130177045966,
            0.029555257042931552,
            -1.3918025751606069e-05,
        ),
        (0.0, 0.0, -0.092336461936711856, -0.016936493900208172, -1.4008679818203610e-05),
    ),
}
# The norms up to which they are exact to half an eps (the same paper, table 1).
_TAYLOR_THETA = {
    torch.float32: {12: 1.462, 18: 3.010},
    torch.float64: {12: 0.300, 18: 1.091},
}


def expm(a: Tensor, kind: Kind) -> tuple[Tensor, Saved]:
    """exp of [b, n, n], exactly symmetric for a symmetric kind, and what ``adjoint`` needs."""
    if a.numel() == 0:
        return a.clone(), ()
    if a.size(-1) == 1:
        y = a.exp()
        return y, (y,)
    mu = _shift(a.detach()) if kind == "symmetric" else None
    if mu is not None:
        a = a - mu * identity_like(a)
    even_odd = _is_even_odd(kind, a)
    square = torch.bmm(a, a)
    third = torch.bmm(square, square if even_odd else a)  # A⁴ or A³
    scale, active, degree = _scaling(a.detach(), square.detach(), third.detach(), kind)
    if scale is not None:
        scale2 = scale * scale
        a, square, third = (
            a * scale,
            square * scale2,
            third * (scale2 * (scale2 if even_odd else scale)),
        )
    if even_odd:
        y, core = _even_odd(a, square, third, kind)
    else:
        y, core = _taylor(a, square, third, degree)
        y = y / 2 if kind == "symmetric" else y
    if kind == "symmetric":
        y = _symmetrized(y)  # of half the polynomial
    growth = None
    squared: list[Tensor | None] = []
    for left in range(len(active), -1, -1):  # squarings that are to come
        if mu is not None and left == min(len(active), 3):
            # e^μ is multiplied on before the last three at most: earlier its rounding would be
            # amplified, later exp(S - μ I) could have overflown.
            growth = (mu if scale is None else mu * scale.clamp(min=0.125)).exp()
            y = y * growth
        if left:
            squared += [y, active[-left]]
            y = _square(y, active[-left])
    if kind == "symmetric" and active:
        y = _symmetrized(y).mul_(0.5)
    return y, (scale, growth, *core, *squared)


def adjoint(g: Tensor, saved: Saved, kind: Kind) -> Tensor:
    """h such that <h, dA> = <g, d exp(A)> for every dA of the kind.

    The gradient in A is h itself for the general kind, (h - hᵀ) / 2 for the skew one and
    (h + hᵀ) / 2 for the symmetric one.
    """
    if len(saved) < 2:
        return g if not saved or saved[0] is None else g * saved[0]
    (scale, growth), core, squared = saved[:2], saved[2:9], saved[9:]
    if kind == "symmetric":
        g = _symmetrized(g)  # twice what counts, until the polynomial's adjoint halves it
    rounds = len(squared) // 2
    for left in range(rounds + 1):
        if left:
            g = _square_adjoint(g, squared[-2 * left], squared[1 - 2 * left], kind)
        if growth is not None and left == min(rounds, 3):
            g = g * growth
    if _is_even_odd(kind, g):
        h = _even_odd_adjoint(g, core, kind)
    else:
        h = _taylor_adjoint(g / 2 if kind == "symmetric" else g, core)
    return h if scale is None else h * scale


def on_host(x: Tensor) -> bool:
    """Whether the host may look at values of x without waiting for a device."""
    return x.device.type == "cpu"


def _shift(a: Tensor) -> Tensor | None:
    """μ [b, 1, 1]: the mean eigenvalue where it is negative, else 0; None where it is not worth it.

    exp(S) = e^μ exp(S - μ I) saves the digits that the polynomial cancels where all eigenvalues
    are negative. Where the largest is positive it is what counts, and a shift only adds rounding.
    """
    mean = a.diagonal(0, -2, -1).mean(-1)
    if on_host(a) and not mean.min().item() < -1:
        return None
    return mean.clamp(-500, 0)[:, None, None]


def _is_even_odd(kind: Kind, x: Tensor) -> bool:
    return kind != "general" and x.dtype == torch.float32


def _scaling(
    a: Tensor, square: Tensor, third: Tensor, kind: Kind
) -> tuple[Tensor | None, list[Tensor | None], int]:
    """2^-s, what each round squares, and the degree of Taylor's polynomial.

    2^-s is a scalar or [b, 1, 1], None where nothing is scaled. A round squares all matrices
    (None), those of an index, or those of a mask; later rounds square at least as many.
    """
    if even_odd := _is_even_odd(kind, a):
        norm = _norm_of_fourth_root(third, kind)
    else:
        norm = _norm(a, square, third, kind)
    theta = _EVEN_ODD_THETA if even_odd else _TAYLOR_THETA[a.dtype][18]
    if on_host(a):
        norms = norm.tolist()
        counts = [_count(x, theta) for x in norms]
        top = max(counts)
        if min(counts) == top:
            degree = 12 if max(norms) <= _TAYLOR_THETA[a.dtype][12] else 18
            return (a.new_tensor(2.0**-top) if top else None), [None] * top, degree
        s = norm.new_tensor(counts)
        rows = [(s > j).nonzero().squeeze(-1) for j in reversed(range(top))]
        return torch.pow(2.0, -s)[:, None, None], [*rows], 18
    s = torch.frexp(norm / theta).exponent.clamp(min=0)
    scale = torch.where(s <= _LAUNCHED, torch.pow(2.0, -s.to(norm.dtype)), torch.nan)
    masks = [(s > j)[:, None, None] for j in reversed(range(_LAUNCHED))]
    return scale[:, None, None], [*masks], 18


def _norm_of_fourth_root(fourth: Tensor, kind: Kind) -> Tensor:
    """‖A⁴‖_F^(1/4), a bound of ‖A‖ for normal A and nearly tight.

    The eigenvalues of a skew matrix come in pairs, which halves ‖A⁴‖_F².
    """
    norm = torch.linalg.vector_norm(fourth, dim=(-2, -1))
    if on_host(fourth) and not math.isfinite(norm.sum().item()):
        norm = torch.linalg.vector_norm(fourth, 1, dim=-1).amax(-1)  # squares overflow earlier
    elif kind == "skew":
        norm *= 0.5**0.5
    return norm.pow_(0.25)


def _norm(a: Tensor, square: Tensor, cube: Tensor, kind: Kind) -> Tensor:
    """What stands for ‖A‖ in the truncation: ‖A²‖^(1/2), or more for matrices that are not normal.

    For those max(‖A²‖^(1/2), ‖A³‖^(1/3)) bounds the remainder (Al-Mohy & Higham, "A new scaling
    and squaring algorithm for the matrix exponential", 2009, theorem 4.2); it is kept above a
    quarter of ‖A‖, beyond which the polynomial itself cancels.
    """
    d2 = _bound(square).sqrt()
    if kind != "general":
        return d2
    norm = torch.minimum(_bound(a), torch.linalg.vector_norm(a, 1, dim=-2).amax(-1))
    return torch.minimum(torch.maximum(torch.maximum(d2, _bound(cube) ** (1 / 3)), norm / 4), norm)


def _bound(x: Tensor) -> Tensor:
    """min(‖X‖_inf, ‖X‖_F) of each matrix: both bound the spectral norm."""
    rows = torch.linalg.vector_norm(x, 1, dim=-1).amax(-1)
    return torch.minimum(rows, torch.linalg.vector_norm(x, dim=(-2, -1)))


def _count(norm: float, theta: float) -> int:
    """Squarings for a norm; none where it is not finite, which the products then show."""
    return max(0, math.frexp(norm / theta)[1]) if math.isfinite(norm) else 0


def _square(z: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return torch.bmm(z, z)
    if rows.dtype == torch.bool:
        return torch.where(rows, torch.bmm(z, z), z)
    some = z[rows]
    return z.index_copy(0, rows, torch.bmm(some, some))


def _square_adjoint(g: Tensor, z: Tensor | None, rows: Tensor | None, kind: Kind) -> Tensor:
    assert z is not None
    if rows is not None and rows.dtype != torch.bool:
        return g.index_copy(0, rows, _square_adjoint(g[rows], z[rows], None, kind))
    h = torch.bmm(g, z.mT)
    h = _symmetrized(h) if kind == "symmetric" else torch.baddbmm(h, z.mT, g)
    return h if rows is None else torch.where(rows, h, g)


def _combined(table: Table, xs: tuple[Tensor, ...], *, adjoint: bool = False) -> Tensor:
    """Rows of coefficients, or columns, times tensors of one shape, in one product."""
    c = _coefficients(table, xs[0].dtype, xs[0].device)
    x = torch.stack(xs).view(len(xs), -1)
    return torch.mm(c.mT if adjoint else c, x).view(-1, *xs[0].shape)


@lru_cache
def _coefficients(table: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the call, and may be saved for a backward
        return torch.tensor(table, dtype=dtype, device=device)


def _t(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)  # what x.mT calls in the end


def _symmetrized(x: Tensor) -> Tensor:
    return x + _t(x)


def _even_odd(a: Tensor, b: Tensor, b2: Tensor, kind: Kind) -> tuple[Tensor, Saved]:
    """C + A S, half of it for a symmetric A; C = 1 + c(B) + B³ c'(B) and S likewise, B = A²."""
    b3 = torch.bmm(b, b2)
    rows = _combined(_EVEN_ODD[kind], (b, b2, b3))
    rows[:2].diagonal(0, -2, -1).add_(1)
    low_c, low_s, high_c, high_s = rows.unbind()
    c = torch.baddbmm(low_c, b3, high_c)
    s = torch.baddbmm(low_s, b3, high_s)
    half = 0.5 if kind == "symmetric" else 1.0
    return torch.baddbmm(c, a, s, beta=half, alpha=half), (a, b, b2, b3, high_c, high_s, s)


def _even_odd_adjoint(g: Tensor, core: Saved, kind: Kind) -> Tensor:
    a, b, b2, b3, high_c, high_s, s = _present(core)
    at = _t(a)
    # gc, gk: twice the gradients of C and of A S. B's powers are symmetric, and of the gradients
    # in them the symmetric parts count: x + xᵀ of half a product.
    gc = gk = g
    if kind == "skew":
        gt = _t(g)
        gc, gk = g + gt, g - gt
    gs = _symmetrized(_half(at, gk))
    if len(g) == 1:  # one call for two products
        g_low = torch.cat((gc, gs))
        g_high = _symmetrized(_half(b3.expand_as(g_low), g_low))
        gs_all = (*g_low.split(1), *g_high.split(1))
    else:
        gs_all = (gc, gs, _symmetrized(_half(b3, gc)), _symmetrized(_half(b3, gs)))
    gb, gb2, gb3 = _combined(_EVEN_ODD[kind], gs_all, adjoint=True).unbind()
    x = torch.baddbmm(gb3, gc, high_c, beta=0.5, alpha=0.5)
    gb3 = _symmetrized(torch.baddbmm(x, gs, high_s, alpha=0.5))
    gb2 = _symmetrized(torch.baddbmm(gb2, b, gb3, beta=0.5, alpha=0.5))
    x = torch.baddbmm(gb, gb3, b2, beta=0.5, alpha=0.5)
    gb = _symmetrized(torch.baddbmm(x, gb2, b))
    return torch.baddbmm(_half(gk, s), gb, at)


def _half(x: Tensor, y: Tensor) -> Tensor:
    """x y / 2 in one call."""
    return torch.baddbmm(y, x, y, beta=0, alpha=0.5)


def _taylor(a: Tensor, a2: Tensor, a3: Tensor, degree: int) -> tuple[Tensor, Saved]:
    """The polynomial of degree 12 or 18 of the table."""
    table = _TAYLOR[degree]
    powers = (a, a2, a3) if degree == 12 else (a, a2, a3, torch.bmm(a3, a3))
    rows = _combined(tuple(row[1:] for row in table), powers)
    ones = _coefficients(tuple(row[:1] for row in table), a.dtype, a.device)
    rows.diagonal(dim1=-2, dim2=-1).add_(ones[:, :, None])
    if degree == 12:
        first, second, third, left = rows
        right = left
    else:
        left, first, second, third, right = rows
    x = torch.baddbmm(third, left, right)
    m = second + x
    return torch.baddbmm(first, m, x), (a, a2, a3, x, m, left, right if degree == 18 else None)


def _taylor_adjoint(g: Tensor, core: Saved) -> Tensor:
    a, a2, a3, x, m, left, *right = _present(core)
    degree = 18 if right else 12
    gm = torch.bmm(g, x.mT)
    gx = torch.baddbmm(gm, m.mT, g)
    if degree == 12:
        g_rows: tuple[Tensor, ...] = (g, gm, gx, torch.baddbmm(torch.bmm(gx, left.mT), left.mT, gx))
    else:
        g_rows = (torch.bmm(gx, right[0].mT), g, gm, gx, torch.bmm(left.mT, gx))
    table = tuple(row[1:] for row in _TAYLOR[degree])
    ga, ga2, ga3, *ga6 = _combined(table, g_rows, adjoint=True)
    if ga6:
        ga3 = torch.baddbmm(torch.baddbmm(ga3, ga6[0], a3.mT), a3.mT, ga6[0])
    ga2 = torch.baddbmm(ga2, ga3, a.mT)
    ga = torch.baddbmm(ga, a2.mT, ga3)
    return torch.baddbmm(torch.baddbmm(ga, ga2, a.mT), a.mT, ga2)


def _present(tensors: Saved) -> tuple[Tensor, ...]:
    return tuple(x for x in tensors if x is not None)
