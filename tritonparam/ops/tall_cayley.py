"""The Cayley map of a skew n×n matrix of rank 2k, on k columns, by one k×k system.

The skew matrix is B Ω Bᵀ + P Bᵀ - B Pᵀ with orthonormal columns B, Pᵀ B = 0 and Ω skew; its
Cayley map with scale a takes B to W = B (2M - I) + 2a P M, where M = S⁻¹ and
S = I - a Ω + a² Pᵀ P. The symmetric part of S is at least I, so that M always exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tritonparam.autograd import FusedMap
from tritonparam.numerics import compute_dtype, inv_ex, inverse_definite
from tritonparam.tall_kernels import TallKernels

Parts = tuple[Tensor, Tensor]
Saved = tuple[Tensor, ...]

_KERNELS = TallKernels("tall_cayley", max_k=256)  # one program eliminates a k×k system
_MAX_CONDITION = 2.0  # of S, ‖S‖_F ‖M‖_F / k, up to which fp32 is as exact as the n×n system
kernel_declines, kernel_file = _KERNELS.declines, _KERNELS.kernel_file
n_launches = _KERNELS.n_launches


def _system(c: Tensor, p: Tensor, a: float) -> Tensor:
    # S for Ω = C - Cᵀ
    s = a * a * (p.mT @ p) - a * (c - c.mT)
    s.diagonal(dim1=-2, dim2=-1).add_(1)
    return s


def _inverse(parts: Callable[[torch.dtype], Parts], x: Tensor, a: float) -> tuple[Parts, Tensor]:
    """C and P, made in a dtype, and M in the same: fp64, or fp32 where that is exact enough.

    Pᵀ P squares the condition of the n×n system: at norm 1000, in fp32, the gradient of a 100×64
    matrix has an error of 8e-4, that of the n×n system 2e-5. The CPU, where fp64 takes twice the
    time, looks at the condition; a GPU would have to wait for the answer.
    """
    dtype = compute_dtype(x.dtype) if x.device.type == "cpu" else torch.float64
    cp = parts(dtype)
    s = _system(*cp, a)
    m = inverse_definite(s)
    if dtype != torch.float64:
        condition = _frobenius(s) * _frobenius(m)
        if (condition > _MAX_CONDITION * s.size(-1)).any():
            cp = parts(torch.float64)
            s = _system(*cp, a)
            m = inverse_definite(s)
    # LU takes infinity for a good pivot; where S is not finite this is NaN, as in torch's solve.
    return cp, m + 0 * s.sum((-2, -1), keepdim=True)


def _frobenius(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1))


def _graph_inverse(c: Tensor, p: Tensor, a: float) -> Tensor:
    return inv_ex(_system(c, p, a))[0]


def _cosine(m: Tensor) -> Tensor:
    # 2M - I
    y = 2 * m
    y.diagonal(dim1=-2, dim2=-1).sub_(1)
    return y


def _adjoint(bg: Tensor, g: Tensor, p: Tensor, m: Tensor, a: float) -> Parts:
    # dΩ - dΩᵀ and dP for bg = Bᵀ G, from dS = H = -Mᵀ (2 Bᵀ G + 2a Pᵀ G) Mᵀ. Differentiable.
    h = m.mT @ (-2 * bg - 2 * a * (p.mT @ g)) @ m.mT
    return a * (h.mT - h), g @ (2 * a * m.mT) + p @ (a * a * (h + h.mT))


# Without a base B is the first k columns of I: C and P are the rows of x above and below k.


def _rows(x: Tensor) -> Parts:
    k = x.size(-1)
    return x[..., :k, :].tril(-1), x[..., k:, :]


def _value(x: Tensor, a: float) -> tuple[Tensor, Saved]:
    (_, p), m = _inverse(lambda dtype: _rows(x.to(dtype)), x, a)
    q = torch.cat([_cosine(m), p @ (2 * a * m)], -2)
    return q.to(compute_dtype(x.dtype)), (x, m)


def _forward(x: Tensor, a: float) -> tuple[Tensor, Saved]:
    return _KERNELS.forward("tall_cayley_fwd", x, None, a) or _value(x, a)


def _resume(q: Tensor, x: Tensor, a: float) -> Saved:
    if saved := _KERNELS.prepare(x, None, a):
        return saved
    return x, _inverse(lambda dtype: _rows(x.to(dtype)), x, a)[1]


def _rows_adjoint(g: Tensor, x: Tensor, m: Tensor, a: float) -> tuple[Tensor]:
    k = x.size(-1)
    dc, dp = _adjoint(g[..., :k, :], g[..., k:, :], x[..., k:, :], m, a)
    return (torch.cat([dc.tril(-1), dp], -2),)


def _backward(g: Tensor, saved: Saved, dtype: torch.dtype, a: float) -> tuple[Tensor]:
    x, m = saved
    # M is the same on both paths.
    runs = _KERNELS.path(x) == "kernel"
    if runs and (dx := _KERNELS.backward("tall_cayley_bwd", g, x, None, (m,), a)):
        return dx
    return _rows_adjoint(g.to(m.dtype), x.to(m.dtype), m, a)


def _graph(g: Tensor, saved: Saved, dtype: torch.dtype, a: float) -> tuple[Tensor]:
    # The adjoint of an inverse that is made of x again, differentiably.
    x = saved[0].double()
    return _rows_adjoint(g.double(), x, _graph_inverse(*_rows(x), a), a)


# With a base: C = Bᵀ X / 2 and P = X - 2 B C.


def _tangent(x: Tensor, b: Tensor) -> Parts:
    c = b.mT @ x
    return c / 2, x - b @ c


def _inverse_at(x: Tensor, base: Tensor, a: float) -> tuple[Parts, Tensor]:
    return _inverse(lambda dtype: _tangent(x.to(dtype), base.to(dtype)), x, a)


def _value_at(x: Tensor, base: Tensor, a: float) -> tuple[Tensor, Saved]:
    (c, p), m = _inverse_at(x, base, a)
    w = (base.to(m.dtype) @ _cosine(m)).add_(p @ (2 * a * m))
    return w.to(compute_dtype(x.dtype)), (x, base, c, m)


def _forward_at(x: Tensor, base: Tensor, a: float) -> tuple[Tensor, Saved]:
    return _KERNELS.forward("tall_cayley_fwd", x, base, a) or _value_at(x, base, a)


def _resume_at(w: Tensor, x: Tensor, base: Tensor, a: float) -> Saved:
    if saved := _KERNELS.prepare(x, base, a):
        return saved
    (c, _), m = _inverse_at(x, base, a)
    return x, base, c, m


def _at_adjoint(g: Tensor, b: Tensor, p: Tensor, m: Tensor, a: float) -> tuple[Tensor]:
    # dX = dP + B ((dΩ - dΩᵀ)/2 - Bᵀ dP)
    dc, dp = _adjoint(b.mT @ g, g, p, m, a)
    return (dp + b @ (dc / 2 - b.mT @ dp),)


def _backward_at(g: Tensor, saved: Saved, dtype: torch.dtype, a: float) -> tuple[Tensor]:
    if len(saved) == 5:  # by the kernels
        x, base, *more = saved
        if dx := _KERNELS.backward("tall_cayley_bwd", g, x, base, tuple(more), a):
            return dx
        (c, _), m = _inverse_at(x, base, a)
    else:
        x, base, c, m = saved
    b = base.to(m.dtype)
    return _at_adjoint(g.to(m.dtype), b, x.to(m.dtype) - b @ (2 * c), m, a)


def _graph_at(g: Tensor, saved: Saved, dtype: torch.dtype, a: float) -> tuple[Tensor]:
    b = saved[1].double()
    c, p = _tangent(saved[0].double(), b)
    return _at_adjoint(g.double(), b, p, _graph_inverse(c, p, a), a)


_tall_cayley = FusedMap(
    "tall_cayley",
    "Tensor x, float scale",
    _forward,
    _backward,
    graph=_graph,
    resume=_resume,
    keeps=True,
)
_tall_cayley_at = FusedMap(
    "tall_cayley_at",
    "Tensor x, Tensor base, float scale",
    _forward_at,
    _backward_at,
    graph=_graph_at,
    resume=_resume_at,
    keeps=True,
)


def tall_cayley(x: Tensor, scale: float = 0.5, left: Tensor | None = None) -> Tensor:
    """The first k columns of (I - a A)⁻¹ (I + a A), A = [[L₁ - L₁ᵀ, -L₂ᵀ], [L₂, 0]], a = scale.

    L₁ is the part of the first k rows of x below the diagonal, L₂ the other rows: with scale 1/2
    ``torch.nn.utils.parametrizations.orthogonal`` with ``orthogonal_map="cayley"`` and no base.

    Arguments:
        x: [..., n, k] with n >= k, fp16, bf16, fp32 or fp64; computed in fp64, or in
            fp32 where that is as exact.
        scale: the number a.
        left: a matrix to multiply on from the left, of the compute dtype; it has no gradient.

    Returns:
        A fresh contiguous tensor of x's shape and dtype with orthonormal columns, twice
        differentiable in x.
    """
    return _tall_cayley.left(left, x, scale)


def tall_cayley_at(x: Tensor, base: Tensor, scale: float = 0.5) -> Tensor:
    """The Cayley map of the skew matrix that x stands for at `base`, applied to `base`.

    With B = base, Ω = (Bᵀ x - xᵀ B) / 2 and P = x - B Bᵀ x, the value is
    (I - a A)⁻¹ (I + a A) B for A = B Ω Bᵀ + P Bᵀ - B Pᵀ and a = scale. At x = 0 it is `base`.

    Arguments:
        x: [..., n, k] with n >= k, fp16, bf16, fp32 or fp64; computed in fp64, or in
            fp32 where that is as exact.
        base: orthonormal columns, of x's shape; taken as they are. It has no gradient.
        scale: the number a.

    Returns:
        A fresh contiguous tensor of x's shape and dtype with orthonormal columns, twice
        differentiable in x.
    """
    return _tall_cayley_at(x, base, scale)
