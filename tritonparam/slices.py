"""Tensors as slices of one dimension: their norms and inner products."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_shape(v: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of ‖v‖: one norm for every index of `dim`, one for all at -1 as in torch."""
    if dim == -1:
        return ()
    sizes = [1] * v.dim()
    sizes[dim] = v.shape[dim]  # sooner than v.size(dim)
    return tuple(sizes)


def slices(x: Tensor, dim: int) -> Tensor:
    """x as [before, n, after], n the size of `dim`; the whole as [1, 1, size] at -1."""
    if dim == -1:
        return x.reshape(1, 1, x.numel())
    return x.reshape(x.shape[:dim].numel(), x.size(dim), x.shape[dim + 1 :].numel())


def sums(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> per slice: [1, n, 1]."""
    if x.size(1) == 1:
        return torch.dot(x.flatten(), y.flatten()).view(1, 1, 1)
    products = x * y
    # The leading dimension alone, first: up to twice as fast as both at once.
    partial = products if x.size(0) == 1 else products.sum(0, keepdim=True)
    return partial.sum(2, keepdim=True)


def divisor(norm: Tensor) -> Tensor:
    """The norm, and infinity for one of 0: what is divided by it is 0 there."""
    return norm.masked_fill(norm == 0, torch.inf)


def norms(v: Tensor, dim: int) -> Tensor:
    """‖v‖ per slice to divide by: [1, n, 1]."""
    if v.numel() == 0:  # which torch's function refuses
        return divisor(sums(slices(v, dim), slices(v, dim)))
    return divisor(torch.norm_except_dim(v, 2, dim)).view(1, -1, 1)
