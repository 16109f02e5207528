"""orthogonal_map="householder": the first k columns of a product of k reflectors, by compact WY.

V = tril(x, -1) + E with E the first k columns of I; d = sign(diag x), ±1. The product of the
reflectors I - 2 v vᵀ / ‖v‖² is H = I - V N⁻¹ Vᵀ, where N + Nᵀ = Vᵀ V and N is upper triangular
(Schreiber & Van Loan 1989; Puglisi 1992). Nothing is n×n and nothing is sequential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonparam.autograd import FusedMap
from tritonparam.numerics import compute_dtype
from tritonparam.tall_kernels import TallKernels

Factors = tuple[Tensor, Tensor, Tensor]
Saved = tuple[Tensor, ...]

_KERNELS = TallKernels("householder", max_k=256)  # one program inverts N
kernel_declines, kernel_file = _KERNELS.declines, _KERNELS.kernel_file
n_launches = _KERNELS.n_launches


def _vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """V [..., n, k] and d [..., k]; the sign of zero is +1, of what is not finite NaN."""
    v = x.tril(-1)
    v.diagonal(dim1=-2, dim2=-1).fill_(1)
    diagonal = x.detach().diagonal(dim1=-2, dim2=-1)
    return v, 1 - 2 * (diagonal < 0) + 0 * diagonal


def _factors(x: Tensor) -> Factors:
    """V, d and N, this in fp64: in fp32 the rounding of VᵀV is up to ten times that of Q."""
    v, d = _vectors(x)
    wide = v.double()
    n = (wide.mT @ wide).triu()
    n.diagonal(dim1=-2, dim2=-1).div_(2)
    return v, d, n


def _solve(n: Tensor, b: Tensor, *, upper: bool) -> Tensor:
    return torch.linalg.solve_triangular(n, b.to(n.dtype), upper=upper).to(b.dtype)


def _scale_rows(x: Tensor, d: Tensor) -> Tensor:
    # blockdiag(D, I) x
    k = d.size(-1)
    return torch.cat([x[..., :k, :] * d.unsqueeze(-1), x[..., k:, :]], -2)


def _small(factors: Factors) -> Tensor:
    """Y = N⁻¹ V₁ᵀ D [..., k, k] with V₁ the first k rows of V, so that Q = E D - V Y."""
    v, d, n = factors
    return _solve(n, v[..., : v.size(-1), :].mT * d.unsqueeze(-2), upper=True)


def _value(factors: Factors, y: Tensor) -> Tensor:
    v, d, _ = factors
    q = v @ -y
    q.diagonal(dim1=-2, dim2=-1).add_(d)
    return q


def _adjoint(g: Tensor, factors: Factors, y: Tensor) -> Tensor:
    # dN = triu(U Yᵀ) with U = N⁻ᵀ Vᵀ G; dV = V (triu(dN) + triu(dN, 1)ᵀ) - G Yᵀ; dV₁ -= D Uᵀ
    v, d, n = factors
    u = _solve(n.mT, v.mT @ g, upper=False)
    dn = (u @ y.mT).triu()
    dv = v @ (dn + dn.triu(1).mT) - g @ y.mT
    dv[..., : v.size(-1), :] -= (u * d.unsqueeze(-2)).mT
    return dv.tril(-1)


def _at(base: Factors, q: Tensor) -> Tensor:
    # H blockdiag(D, I) Q with V, d and N of the base
    v, d, n = base
    q = _scale_rows(q, d)
    return q - v @ _solve(n, v.mT @ q, upper=True)


def _at_adjoint(base: Factors, g: Tensor) -> Tensor:
    v, d, n = base
    return _scale_rows(g - v @ _solve(n.mT, v.mT @ g, upper=False), d)


def _again(x: Tensor, n: Tensor, dtype: torch.dtype) -> Factors:
    # V is a masked copy of x: to make it again costs less than to keep it.
    return *_vectors(x.to(dtype)), n


def _closed(x: Tensor) -> tuple[Tensor, Saved]:
    factors = _factors(x.to(compute_dtype(x.dtype)))
    y = _small(factors)
    return _value(factors, y), (x, factors[2], y)


def _resume_closed(x: Tensor) -> Saved:
    factors = _factors(x.to(compute_dtype(x.dtype)))
    return x, factors[2], _small(factors)


def _resume_closed_at(x: Tensor, base: Tensor) -> Saved:
    x, *of_x = _resume_closed(x)
    return x, base, *of_x, _factors(base.to(compute_dtype(x.dtype)))[2]


def _closed_at(x: Tensor, base: Tensor) -> tuple[Tensor, Saved]:
    q, saved = _closed(x)
    factors = _factors(base.to(q.dtype))
    return _at(factors, q), (x, base, *saved[1:], factors[2])


def _forward(x: Tensor) -> tuple[Tensor, Saved]:
    return _KERNELS.forward("householder_fwd", x, None) or _closed(x)


def _backward(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    if len(saved) == 4:  # by the kernels
        x, *more = saved
        if dx := _KERNELS.backward("householder_bwd", g, x, None, tuple(more)):
            return dx
        saved = _resume_closed(x)
    x, n, y = saved
    return (_adjoint(g, _again(x, n, y.dtype), y),)


def _graph(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    # The adjoint of factors that are made of x again, differentiably.
    factors = _factors(saved[0].to(compute_dtype(dtype)))
    return (_adjoint(g, factors, _small(factors)),)


def _resume(q: Tensor, x: Tensor) -> Saved:
    return _KERNELS.prepare(x, None) or _resume_closed(x)


def _forward_at(x: Tensor, base: Tensor) -> tuple[Tensor, Saved]:
    return _KERNELS.forward("householder_fwd", x, base) or _closed_at(x, base)


def _backward_at(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    if len(saved) == 7:  # by the kernels
        x, base, *more = saved
        if dx := _KERNELS.backward("householder_bwd", g, x, base, tuple(more)):
            return dx
        saved = _resume_closed_at(x, base)
    x, base, *of_x, n = saved
    return _backward(_at_adjoint(_again(base, n, g.dtype), g), (x, *of_x), dtype)


def _graph_at(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    x, base, *_ = saved
    return _graph(_at_adjoint(_factors(base.to(g.dtype)), g), (x,), dtype)


def _resume_at(q: Tensor, x: Tensor, base: Tensor) -> Saved:
    return _KERNELS.prepare(x, base) or _resume_closed_at(x, base)


_householder = FusedMap(
    "householder", "Tensor x", _forward, _backward, graph=_graph, resume=_resume, keeps=True
)
_householder_at = FusedMap(
    "householder_at",
    "Tensor x, Tensor base",
    _forward_at,
    _backward_at,
    graph=_graph_at,
    resume=_resume_at,
    keeps=True,
)


def householder(x: Tensor, left: Tensor | None = None) -> Tensor:
    """The first k columns of H₁ H₂ ⋯ H_k, times diag(sign(diag x)); Hᵢ = I - 2 v vᵀ / ‖v‖².

    v is column i of tril(x, -1), with a one at i. As ``torch.nn.utils.parametrizations.orthogonal``
    with ``orthogonal_map="householder"`` and no base, but for the diagonal of x: torch truncates it
    to an integer, so that a little weight decay makes the weight zero. Here its sign counts, +1 for
    zero. It has no gradient.

    Arguments:
        x: [..., n, k] with n >= k, fp16, bf16, fp32 or fp64; the first two are computed in fp32,
            and the k×k system is solved in fp64.
        left: a matrix to multiply on from the left, of the compute dtype; it has no gradient.

    Returns:
        A fresh contiguous tensor of x's shape and dtype with orthonormal columns, twice
        differentiable in x.
    """
    return _householder.left(left, x)


def householder_at(x: Tensor, base: Tensor) -> Tensor:
    """householder(x) multiplied from the left by the orthogonal n×n matrix that `base` stands for.

    That matrix is the full product of the reflectors of `base`, times blockdiag(D, I) with D its
    signs; its first k columns are householder(base). At x = -I, the negative identity of shape
    n×k, the value is householder(base): torch's ``base @ Q`` with the completion of `base`.

    Arguments:
        x: as for `householder`.
        base: reflectors and signs like x, for example from `reflectors`; computed in the dtype
            that x is computed in. It has no gradient.

    Returns:
        A fresh contiguous tensor of x's shape and dtype with orthonormal columns, twice
        differentiable in x.
    """
    return _householder_at(x, base)
