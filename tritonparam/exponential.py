"""exp(A) of [b, n, n] in fp32 or fp64, and its adjoint, linear in the gradient that comes in.

Scaling and squaring: exp(A) = p(A / 2^s)^(2^s), each matrix with its own s, from bounds of its norm
that include that of A². The polynomial p is one of those in `polynomials`.

Everything is written in differentiable operators, so that recording the adjoint differentiates it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonparam import polynomials
from tritonparam.numerics import identity_like
from tritonparam.polynomials import EVEN_ODD_THETA, TAYLOR_THETA, Kind, Saved, symmetrized

# Where the host must not wait for a norm, so many squarings are launched, and masked for matrices
# that need fewer: enough for ‖A‖ <= 3.4 · 2^12 = 13,900. Beyond that the result is NaN.
_LAUNCHED = 12


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
        y, core = polynomials.even_odd(a, square, third, kind)
    else:
        y, core = polynomials.taylor(a, square, third, degree)
        y = y / 2 if kind == "symmetric" else y
    if kind == "symmetric":
        y = symmetrized(y)  # of half the polynomial
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
        y = symmetrized(y).mul_(0.5)
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
        g = symmetrized(g)  # twice what counts, until the polynomial's adjoint halves it
    rounds = len(squared) // 2
    for left in range(rounds + 1):
        if left:
            g = _square_adjoint(g, squared[-2 * left], squared[1 - 2 * left], kind)
        if growth is not None and left == min(rounds, 3):
            g = g * growth
    if _is_even_odd(kind, g):
        h = polynomials.even_odd_adjoint(g, core, kind)
    else:
        h = polynomials.taylor_adjoint(g / 2 if kind == "symmetric" else g, core)
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
    theta = EVEN_ODD_THETA if even_odd else TAYLOR_THETA[a.dtype][18]
    if on_host(a):
        norms = norm.tolist()
        counts = [_count(x, theta) for x in norms]
        top = max(counts)
        if min(counts) == top:
            degree = 12 if max(norms) <= TAYLOR_THETA[a.dtype][12] else 18
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
    h = symmetrized(h) if kind == "symmetric" else torch.baddbmm(h, z.mT, g)
    return h if rows is None else torch.where(rows, h, g)
