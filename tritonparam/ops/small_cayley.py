"""base @ Cayley(X) of small matrices on the CPU, where the number of operators is what counts.

With A = L - Lᵀ, L = tril(X, -1), X padded with zeros to n × n, the value is the first k columns of
base @ Q, Q = (2I - A)⁻¹ (2I + A). That is the map of ``tall_cayley``, whose products of n × k need
three times as many operators.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonparam import registry
from tritonparam.autograd import EagerMap, Gradients, Saved
from tritonparam.numerics import cast, compute_dtype, no_autocast

_MAX_N = 32  # rows; beyond, the operators' own time counts


def is_small(x: Tensor) -> bool:
    """Whether of x, [..., n, k] with n ≥ k, n×n costs least: few rows, eager, and no kernel."""
    return (
        x.is_cpu
        and x.size(-2) <= _MAX_N
        and x.numel() > 0
        and registry.override() != "kernel"
        and not torch.compiler.is_compiling()
    )


def _forward(x: Tensor, k: int) -> tuple[Tensor, Saved]:
    """Q [..., n, n], by rows."""
    registry.count("closed")
    lower = x.tril(-1)
    if rest := x.size(-2) - k:
        lower = F.pad(lower, (0, rest))
    b = lower.mT - lower
    b.diagonal(0, -2, -1).fill_(2)
    # 2I - A is b and 2I + A its transpose; Qᵀ is solved for, whose columns are the rows of Q.
    q = torch.linalg.solve_ex(b.mT, b)[0].mT
    return q, (q,)  # and nothing of X, which may be written to before the backward pass


def _backward(g: Tensor, saved: Saved, dtype: torch.dtype, k: int) -> Gradients:
    # dL = tril(Z - Zᵀ, -1) with Z = E G E, E = (Q + I)ᵀ/2. Differentiable.
    (q,) = saved
    e = q / 2
    e.diagonal(0, -2, -1).add_(0.5)
    z = e.mT @ (g @ e.mT)
    dl = (z - z.mT).tril_(-1)
    return (dl if k == dl.size(-1) else dl[..., :k],)


_cayley = EagerMap(_forward, _backward, _backward, n_tensors=1)


def from_left(x: Tensor, base: Tensor | None) -> Tensor:
    """base @ Cayley(x) for an x for which ``is_small``; None stands for the identity.

    Arguments:
        x: [..., n, k], n ≥ k, fp16, bf16, fp32 or fp64; the first two are computed in fp32.
        base: [..., n, n], or None.

    Returns:
        A fresh contiguous tensor of x's shape and dtype, twice differentiable in x.

    >>> q = from_left(torch.ones(4, 2), None)
    >>> torch.allclose(q.T @ q, torch.eye(2), atol=1e-6)
    True
    """
    k = x.size(-1)
    q = _cayley(cast(x, compute_dtype(x.dtype)), k)
    if k != q.size(-1):
        q = q[..., :k]
    if base is None:
        return q.contiguous().to(x.dtype)
    with no_autocast(x):
        return cast(cast(base, q.dtype) @ q, x.dtype)
