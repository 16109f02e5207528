"""What every map needs of torch: the compute dtype, autocast off, and LU that is right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

# Batched LU on the CPU with several threads raises or is silently wrong for n > 150
# (pytorch #142815); one matrix at a time is right, and from here on costs nothing.
_MAX_BATCHED_LU = 128
_NOTHING = nullcontext()
_T = TypeVar("_T")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that maps compute in: fp32 for fp16 and bf16, otherwise the dtype itself."""
    return dtype if dtype == torch.float32 else torch.promote_types(dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which costs as much as an operator even where it changes nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def dense(x: Tensor) -> Tensor:
    """A gradient as a strided tensor: an embedding's may be sparse, which kernels cannot read."""
    return x if x.layout == torch.strided else x.to_dense()


def same_device(x: Tensor, y: Tensor) -> bool:
    """``x.device == y.device``, for less of the host's time on the CPU."""
    return (x.is_cpu and y.is_cpu) or x.device == y.device


def no_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which products keep the dtype of their operands on x's device."""
    kind = x.device.type
    # torch.compile of torch 2.11 cannot trace that question.
    available = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    if available and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _NOTHING


def without_autocast(x: Tensor, function: Callable[..., _T], *args: Any) -> _T:
    """``function(*args)`` under ``no_autocast(x)``, whose cost is avoided where autocast is off."""
    kind = "cpu" if x.is_cpu else "cuda" if x.is_cuda else None
    if kind and not torch.is_autocast_enabled(kind):
        return function(*args)
    with no_autocast(x):
        return function(*args)


def identity_like(x: Tensor) -> Tensor:
    """The n×n identity of x's dtype and device, for x of shape [..., n, n]."""
    return torch.eye(x.size(-1), dtype=x.dtype, device=x.device)


def as_batch(x: Tensor) -> Tensor:
    """x of shape [..., n, n] as [b, n, n]."""
    return x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)


def _one_by_one(x: Tensor) -> bool:
    return x.dim() > 2 and x.size(-1) > _MAX_BATCHED_LU and x.is_cpu and x.numel() > 0


def solve(a: Tensor, b: Tensor) -> Tensor:
    """``torch.linalg.solve(a, b)`` for a and b of shape [..., n, n], right on large batches."""
    if not _one_by_one(a):
        return torch.linalg.solve(a, b)
    pairs = zip(as_batch(a), as_batch(b), strict=True)
    return torch.stack([torch.linalg.solve(ai, bi) for ai, bi in pairs]).reshape(a.shape)


def inv_ex(a: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.inv_ex(a)``, right on large batches: the inverse, by columns, and info."""
    if not _one_by_one(a):
        return torch.linalg.inv_ex(a)
    inverses, infos = zip(*[torch.linalg.inv_ex(ai) for ai in as_batch(a)], strict=True)
    by_rows = torch.stack([inverse.mT for inverse in inverses])
    return by_rows.reshape(a.shape).mT, torch.stack(infos).reshape(a.shape[:-2])


def inverse_definite(a: Tensor) -> Tensor:
    """a⁻¹, contiguous, for a contiguous [..., n, n] whose symmetric part is at least I."""
    leaf = _leaf(a)
    return _lapack_inverse(a) if leaf is None else eliminated(a, leaf)


def eliminated(a: Tensor, leaf: int) -> Tensor:
    """The same by elimination in 2×2 blocks down to a size, nearly all of it matrix products.

    Without pivots across blocks that loses digits as ‖a‖² grows (Golub & Van Loan, Matrix
    Computations, 4.2): the residual decides whether a Newton step follows, which squares it, or
    LAPACK after all.
    """
    m = _block_inverse(a, leaf)
    residual, rounding = _residual(a, m), 8 * torch.finfo(a.dtype).eps
    if residual <= rounding:
        return m
    if residual**2 <= rounding:
        return m + m @ (identity_like(a) - a @ m)
    return _lapack_inverse(a)


def _leaf(a: Tensor) -> int | None:
    """The size of block that LAPACK inverts, or None where it inverts the whole as fast."""
    n = a.size(-1)
    if n < 48 or not a.is_cpu or a.numel() == 0:
        return None
    if a.numel() >= 32 * n * n:
        return 16
    return 64 if n >= 768 else None


def _lapack_inverse(a: Tensor) -> Tensor:
    # LAPACK works on columns: given and read by rows, the transposes cost no copy.
    return inv_ex(a.mT)[0].mT


def _block_inverse(a: Tensor, leaf: int) -> Tensor:
    """[[P, B], [C, D]]⁻¹ with the Schur complement S = D - C P⁻¹ B, in six products."""
    n = a.size(-1)
    if n <= leaf:
        return _lapack_inverse(a)
    k = n // 2
    b, c = a[..., :k, k:], a[..., k:, :k]
    p = _block_inverse(a[..., :k, :k], leaf)
    pb, cp = p @ b, c @ p
    s = _block_inverse(a[..., k:, k:] - c @ pb, leaf)
    pbs = pb @ s
    out = a.new_empty(a.shape)
    torch.add(p, pbs @ cp, out=out[..., :k, :k])
    torch.neg(pbs, out=out[..., :k, k:])
    torch.neg(s @ cp, out=out[..., k:, :k])
    out[..., k:, k:] = s
    return out


def _residual(a: Tensor, m: Tensor) -> float:
    """About ‖I - a m‖_F / √n, worst over the batch, from its action on four vectors of signs."""
    n = a.size(-1)
    v = torch.arange(4 * n, device=a.device, dtype=torch.float64).square().cos().sign()
    v = v.reshape(n, 4).to(a.dtype)
    return float((v - a @ (m @ v)).square().mean((-2, -1)).sqrt().max())
