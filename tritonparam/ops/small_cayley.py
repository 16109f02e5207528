"""base @ Cayley(X) of small matrices on the CPU, where the number of operators is what counts.

With A = L - Lᵀ, L = tril(X, -1), X padded with zeros to n × n, the value is the first k columns of
base @ Q, Q = (2I - A)⁻¹ (2I + A). That is the map of ``tall_cayley``, whose products of n × k need
three times as many operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonparam import registry
from tritonparam.autograd import EagerMap, Gradients
from tritonparam.numerics import cast, compute_dtype

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


def _map(x: Tensor) -> Tensor:
    """Q [..., n, n], by rows."""
    lower = x.tril(-1)
    if x.size(-2) != x.size(-1):
        lower = F.pad(lower, (0, x.size(-2) - x.size(-1)))
    b = lower.mT - lower
    b.diagonal(0, -2, -1).fill_(2)
    # 2I - A is b and 2I + A its transpose; Qᵀ is solved for, whose columns are the rows of Q.
    return torch.linalg.solve_ex(b.mT, b)[0].mT


def _forward(x: Tensor, base: Tensor | None) -> tuple[Tensor, tuple[Any, ...]]:
    registry.count("closed")
    q = _map(cast(x, compute_dtype(x.dtype)))
    k = x.size(-1)
    first = q if k == q.size(-1) else q[..., :k]
    y = first.contiguous() if base is None else cast(base, q.dtype) @ first
    return y, (x, base, q)


def _backward(g: Tensor, saved: tuple[Any, ...], dtype: torch.dtype) -> Gradients:
    # dL = tril(Z - Zᵀ, -1) with Z = E H E, E = (Q + I)ᵀ/2, H = [baseᵀ G, 0]. Differentiable.
    _, base, q = saved
    k = g.size(-1)
    e = q / 2
    e.diagonal(0, -2, -1).add_(0.5)
    e = e.mT
    h = cast(g, q.dtype) if base is None else cast(base, q.dtype).mT @ cast(g, q.dtype)
    if k == q.size(-1):
        z = e @ (h @ e)
        return ((z - z.mT).tril_(-1),)
    z = e @ (h @ e[..., :k, :])
    return ((z[..., :k] - z[..., :k, :].mT).tril_(-1),)


def _graph(g: Tensor, saved: tuple[Any, ...], dtype: torch.dtype) -> Gradients:
    x, base, _ = saved
    return _backward(g, (x, base, _map(cast(x, compute_dtype(x.dtype)))), dtype)


_from_left = EagerMap(_forward, _backward, _graph, n_tensors=2)


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
    return _from_left(x, base)
