"""The polynomials that stand for exp near zero, and their adjoints.

Even/odd, for skew or symmetric A in fp32: with B = A², exp(A) = c(B) + A s(B), c and s of degree 6
(Paterson & Stockmeyer 1973: six products). The coefficients are near-minimax on the spectrum of B
for ‖A‖ <= 3.4, with c(0) = s(0) = 1 and a truncation error of 4e-8.

Taylor, for any A: degree 12 or 18 in 4 or 5 products (Bader, Blanes & Casas, "Computing the matrix
exponential with an optimized Taylor polynomial approximation", Mathematics 7(12), 2019).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["skew", "symmetric", "general"]
Saved = tuple[Tensor | None, ...]
Table = tuple[tuple[float, ...], ...]

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
EVEN_ODD_THETA = 3.4

# Rows B1, B2, ... over I, A, A², A³ and, in degree 18, A⁶. Degree 12: A6 = B3 + B4²,
# p = B1 + (B2 + A6) A6. Degree 18: A9 = B4 + B1 B5, p = B2 + (B3 + A9) A9.
TAYLOR = {
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
TAYLOR_THETA = {
    torch.float32: {12: 1.462, 18: 3.010},
    torch.float64: {12: 0.300, 18: 1.091},
}


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


def symmetrized(x: Tensor) -> Tensor:
    """X + Xᵀ of each matrix."""
    return x + _t(x)


def even_odd(a: Tensor, b: Tensor, b2: Tensor, kind: Kind) -> tuple[Tensor, Saved]:
    """C + A S, half of it for a symmetric A; C = 1 + c(B) + B³ c'(B) and S likewise, B = A²."""
    b3 = torch.bmm(b, b2)
    rows = _combined(_EVEN_ODD[kind], (b, b2, b3))
    rows[:2].diagonal(0, -2, -1).add_(1)
    low_c, low_s, high_c, high_s = rows.unbind()
    c = torch.baddbmm(low_c, b3, high_c)
    s = torch.baddbmm(low_s, b3, high_s)
    half = 0.5 if kind == "symmetric" else 1.0
    return torch.baddbmm(c, a, s, beta=half, alpha=half), (a, b, b2, b3, high_c, high_s, s)


def even_odd_adjoint(g: Tensor, core: Saved, kind: Kind) -> Tensor:
    """h with <h, dA> = <g, d exp(A)> for dA of the kind, from what `even_odd` returned beside."""
    a, b, b2, b3, high_c, high_s, s = _present(core)
    at = _t(a)
    # gc, gk: twice the gradients of C and of A S. B's powers are symmetric, and of the gradients
    # in them the symmetric parts count: x + xᵀ of half a product.
    gc = gk = g
    if kind == "skew":
        gt = _t(g)
        gc, gk = g + gt, g - gt
    gs = symmetrized(_half(at, gk))
    if len(g) == 1:  # one call for two products
        g_low = torch.cat((gc, gs))
        g_high = symmetrized(_half(b3.expand_as(g_low), g_low))
        gs_all = (*g_low.split(1), *g_high.split(1))
    else:
        gs_all = (gc, gs, symmetrized(_half(b3, gc)), symmetrized(_half(b3, gs)))
    gb, gb2, gb3 = _combined(_EVEN_ODD[kind], gs_all, adjoint=True).unbind()
    x = torch.baddbmm(gb3, gc, high_c, beta=0.5, alpha=0.5)
    gb3 = symmetrized(torch.baddbmm(x, gs, high_s, alpha=0.5))
    gb2 = symmetrized(torch.baddbmm(gb2, b, gb3, beta=0.5, alpha=0.5))
    x = torch.baddbmm(gb, gb3, b2, beta=0.5, alpha=0.5)
    gb = symmetrized(torch.baddbmm(x, gb2, b))
    return torch.baddbmm(_half(gk, s), gb, at)


def _half(x: Tensor, y: Tensor) -> Tensor:
    """x y / 2 in one call."""
    return torch.baddbmm(y, x, y, beta=0, alpha=0.5)


def taylor(a: Tensor, a2: Tensor, a3: Tensor, degree: int) -> tuple[Tensor, Saved]:
    """The polynomial of degree 12 or 18, and what `taylor_adjoint` needs."""
    table = TAYLOR[degree]
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


def taylor_adjoint(g: Tensor, core: Saved) -> Tensor:
    """The gradient of A, from that of the polynomial and what `taylor` returned beside it."""
    a, a2, a3, x, m, left, *right = _present(core)
    degree = 18 if right else 12
    gm = torch.bmm(g, x.mT)
    gx = torch.baddbmm(gm, m.mT, g)
    if degree == 12:
        g_rows: tuple[Tensor, ...] = (g, gm, gx, torch.baddbmm(torch.bmm(gx, left.mT), left.mT, gx))
    else:
        g_rows = (torch.bmm(gx, right[0].mT), g, gm, gx, torch.bmm(left.mT, gx))
    table = tuple(row[1:] for row in TAYLOR[degree])
    ga, ga2, ga3, *ga6 = _combined(table, g_rows, adjoint=True)
    if ga6:
        ga3 = torch.baddbmm(torch.baddbmm(ga3, ga6[0], a3.mT), a3.mT, ga6[0])
    ga2 = torch.baddbmm(ga2, ga3, a.mT)
    ga = torch.baddbmm(ga, a2.mT, ga3)
    return torch.baddbmm(torch.baddbmm(ga, ga2, a.mT), a.mT, ga2)


def _present(tensors: Saved) -> tuple[Tensor, ...]:
    return tuple(x for x in tensors if x is not None)
