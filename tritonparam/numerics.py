"""What every map needs of torch: the compute dtype, autocast off, and LU that is right."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Batched LU on the CPU with several threads raises or is silently wrong for n > 150
# (pytorch #142815); one matrix at a time is right, and from here on costs nothing.
_MAX_BATCHED_LU = 128


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that maps compute in: fp32 for fp16 and bf16, otherwise the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which products keep the dtype of their operands on x's device."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def identity_like(x: Tensor) -> Tensor:
    """The n×n identity of x's dtype and device, for x of shape [..., n, n]."""
    return torch.eye(x.size(-1), dtype=x.dtype, device=x.device)


def as_batch(x: Tensor) -> Tensor:
    """x of shape [..., n, n] as [b, n, n]."""
    return x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)


def _one_by_one(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dim() > 2 and x.size(-1) > _MAX_BATCHED_LU and x.numel() > 0


def solve(a: Tensor, b: Tensor) -> Tensor:
    """``torch.linalg.solve(a, b)`` for a and b of shape [..., n, n], right on large batches."""
    if not _one_by_one(a):
        return torch.linalg.solve(a, b)
    pairs = zip(as_batch(a), as_batch(b), strict=True)
    return torch.stack([torch.linalg.solve(ai, bi) for ai, bi in pairs]).reshape(a.shape)


def inv_t(a: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of the transpose of a, [..., n, n], and LAPACK's info, [...].

    LAPACK works on columns, so that the inverse of aᵀ comes by rows without a copy. Nothing is
    checked on the host; where info is not zero the matrix is singular and the inverse undefined.
    """
    if not _one_by_one(a):
        inverse, info = torch.linalg.inv_ex(a)
        return inverse.mT, info
    inverses, infos = zip(*[torch.linalg.inv_ex(ai) for ai in as_batch(a)], strict=True)
    out = torch.stack([inverse.mT for inverse in inverses])
    return out.reshape(a.shape), torch.stack(infos).reshape(a.shape[:-2])
