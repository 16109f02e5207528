"""Tall matrices with orthonormal columns by the exponential of a 2k × 2k matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from tritonparam.autograd import FusedMap
from tritonparam.exponential import Saved, adjoint, expm
from tritonparam.numerics import as_batch, compute_dtype, identity_like
from tritonparam.tall_kernels import TallKernels

Parts = tuple[Tensor, Tensor]

_KERNELS = TallKernels("tall_exp", max_k=256, file="tall_expm")  # products of 4k × 4k matrices
kernel_declines, kernel_file = _KERNELS.declines, _KERNELS.kernel_file
n_launches = _KERNELS.n_launches
_MAX_GROWTH = 4.0  # of exp in the Frobenius norm beyond an orthogonal matrix, for fp32


def _exp(parts: Callable[[torch.dtype], Parts], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """P, E_top and E_bottom / b of exp([[Ω, -C/b], [b I, 0]]), C = PᵀP, with Ω and P in a dtype.

    b = sqrt(trace(C) / k) balances the blocks; the result does not depend on it. The more C
    differs from b² I the more the matrix from a skew one, and the rounding is up to as much larger
    than that of the n×n exponential as this one grows beyond an orthogonal one: 100 times for C of
    rank 1 and norm 300. The CPU, which may look at it, then computes in fp64, as the kernels do.
    """
    omega, p = parts(compute_dtype(x.dtype))
    e, saved = _balanced_exp(omega, p)
    if x.is_cpu and e.dtype != torch.float64:
        growth = torch.linalg.vector_norm(e.detach(), dim=(-2, -1))
        if (growth > _MAX_GROWTH * e.size(-1) ** 0.5).any():
            omega, p = parts(torch.float64)
            e, saved = _balanced_exp(omega, p)
    k, b = omega.size(-1), saved[0]
    assert b is not None
    return p, e[..., :k, :k], e[..., k:, :k] / b, saved


def _balanced_exp(omega: Tensor, p: Tensor) -> tuple[Tensor, Saved]:
    c = p.mT @ p
    b = c.detach().diagonal(dim1=-2, dim2=-1).mean(-1).sqrt()
    b = torch.where(b > 0, b, 1.0)[..., None, None]
    balance = b * identity_like(c)
    argument = torch.cat(
        (torch.cat((omega, c / -b), -1), torch.cat((balance, torch.zeros_like(c)), -1)), -2
    )
    e, saved = expm(as_batch(argument), "general")
    return e.view(argument.shape), (b, *saved)


def _exp_adjoint(g_top: Tensor, g_bottom: Tensor, p: Tensor, saved: Saved) -> tuple[Tensor, Tensor]:
    """The gradients in Ω and, through C, in P."""
    b, *of_exp = saved
    assert b is not None
    k = g_top.size(-1)
    g = torch.cat((g_top, g_bottom / b), -2)
    g = torch.cat((g, torch.zeros_like(g)), -1)
    h = adjoint(as_batch(g), tuple(of_exp), "general").view(g.shape)
    gc = h[..., :k, k:] / -b
    return h[..., :k, :k], p @ (gc + gc.mT)


def _rows(x: Tensor) -> Parts:
    k = x.size(-1)
    lower = x[..., :k, :].tril(-1)
    return lower - lower.mT, x[..., k:, :]


def _value(x: Tensor) -> tuple[Tensor, Saved]:
    p, top, bottom, saved = _exp(lambda dtype: _rows(x.to(dtype)), x)
    return torch.cat((top, p @ bottom), -2).to(compute_dtype(x.dtype)), (x, bottom, *saved)


def _backward(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    if len(saved) == 6:  # by the kernels
        of_x, *more = cast(tuple[Tensor, ...], saved)
        if dx := _KERNELS.backward("tall_expm_bwd", g, of_x, None, tuple(more)):
            return dx
        saved = _value(of_x)[1]
    x, bottom, *of_exp = saved
    assert x is not None
    assert bottom is not None
    k = x.size(-1)
    g = g.to(bottom.dtype)
    p = x[..., k:, :].to(g.dtype)
    g1, g2 = g[..., :k, :], g[..., k:, :]
    omega, gp = _exp_adjoint(g1, p.mT @ g2, p, tuple(of_exp))
    return (torch.cat(((omega - omega.mT).tril(-1), gp + g2 @ bottom.mT), -2),)


def _tangent(x: Tensor, b: Tensor) -> Parts:
    c = b.mT @ x
    return (c - c.mT) / 2, x - b @ c


def _value_at(x: Tensor, base: Tensor) -> tuple[Tensor, Saved]:
    p, top, bottom, saved = _exp(lambda dtype: _tangent(x.to(dtype), base.to(dtype)), x)
    w = base.to(p.dtype) @ top + p @ bottom
    return w.to(compute_dtype(x.dtype)), (x, base, p, bottom, *saved)


def _backward_at(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    if len(saved) == 9:  # by the kernels
        x, at, *more = cast(tuple[Tensor, ...], saved)
        if dx := _KERNELS.backward("tall_expm_bwd", g, x, at, tuple(more)):
            return dx
        saved = _value_at(x, at)[1]
    _, base, p, bottom, *of_exp = saved
    assert base is not None
    assert p is not None
    assert bottom is not None
    g, b = g.to(p.dtype), base.to(p.dtype)
    omega, gp = _exp_adjoint(b.mT @ g, p.mT @ g, p, tuple(of_exp))
    gp = gp + g @ bottom.mT
    # X enters through Ω = skew(BᵀX) and P = X - B BᵀX.
    return (gp + b @ ((omega - omega.mT) / 2 - b.mT @ gp),)


def _forward(x: Tensor) -> tuple[Tensor, Saved]:
    return _KERNELS.forward("tall_expm_fwd", x, None) or _value(x)


def _forward_at(x: Tensor, base: Tensor) -> tuple[Tensor, Saved]:
    return _KERNELS.forward("tall_expm_fwd", x, base) or _value_at(x, base)


def _resume(q: Tensor, x: Tensor) -> Saved:
    return _KERNELS.prepare(x, None) or _value(x)[1]


def _resume_at(w: Tensor, x: Tensor, base: Tensor) -> Saved:
    return _KERNELS.prepare(x, base) or _value_at(x, base)[1]


def _graph(g: Tensor, saved: Any, dtype: torch.dtype) -> tuple[Tensor]:
    return _backward(g, _value(saved[0])[1], dtype)


def _graph_at(g: Tensor, saved: Any, dtype: torch.dtype) -> tuple[Tensor]:
    return _backward_at(g, _value_at(saved[0], saved[1])[1], dtype)


_tall_exp = FusedMap(
    "tall_exp", "Tensor x", _forward, _backward, _graph, resume=_resume, keeps=True
)
_tall_exp_at = FusedMap(
    "tall_exp_at",
    "Tensor x, Tensor base",
    _forward_at,
    _backward_at,
    _graph_at,
    resume=_resume_at,
    keeps=True,
)


def tall_exp(x: Tensor, left: Tensor | None = None) -> Tensor:
    """The first k columns of exp of [[L₁ - L₁ᵀ, -L₂ᵀ], [L₂, 0]], L₁ = tril(x[:k], -1), L₂ = x[k:].

    Arguments:
        x: [..., n, k], n > k, fp16, bf16, fp32 or fp64; the first two are computed in fp32, or
            in fp64 where that is not exact enough.
        left: a matrix to multiply on from the left, of the compute dtype; it has no gradient.

    Returns:
        A fresh contiguous tensor of x's shape and dtype, twice differentiable in x.
    """
    return _tall_exp.left(left, x)


def tall_exp_at(x: Tensor, base: Tensor) -> Tensor:
    """exp(B Ω Bᵀ + P Bᵀ - B Pᵀ) B with Ω = skew(Bᵀx), P = x - B Bᵀx: B where x = 0.

    Arguments:
        x: as for ``tall_exp``.
        base: B, of x's shape, with orthonormal columns, which is not checked; no gradient.

    Returns:
        As ``tall_exp``.
    """
    return _tall_exp_at(x, base)
