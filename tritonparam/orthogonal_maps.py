"""Orthogonal maps by name, of square, tall and wide matrices, with a base or without."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonparam.numerics import cast, compute_dtype, same_device
from tritonparam.ops import cayley, expm, householder, tall_cayley, tall_expm
from tritonparam.orthogonal import tall


def _exp(x: Tensor, left: Tensor | None) -> Tensor:
    if x.size(-1) != x.size(-2):
        return tall_expm.tall_exp(x, left)
    return expm.skew_exp(-x.mT, left)  # of tril(X) - tril(X)ᵀ, where Skew keeps the upper triangle


def _cayley(x: Tensor, left: Tensor | None) -> Tensor:
    if cayley.is_few(x):
        return cayley.cayley_of_few(x, left)
    if x.size(-1) != x.size(-2):
        return tall_cayley.tall_cayley(x, left=left)
    # (I - A/2)⁻¹ (I + A/2) with A = tril(X) - tril(X)ᵀ, where Skew keeps the upper triangle.
    return cayley.skew_cayley(x.mT / -2, x.new_ones(()).expand(x.shape[:-1]), left)


TRAINED = "the base requires a gradient"

_TALL = {"cayley": tall_cayley, "matrix_exp": tall_expm, "householder": householder}
_FREE = {
    "cayley": _cayley,
    "matrix_exp": _exp,
    "householder": householder.householder,
}
_AT_BASE = {
    "cayley": tall_cayley.tall_cayley_at,
    "matrix_exp": tall_expm.tall_exp_at,
    "householder": householder.householder_at,
}


def from_left(base: Tensor | None, orthogonal_map: str, x: Tensor) -> Tensor:
    """``base @ map(x)`` for a tall x, transposed for a wide one; None stands for the identity.

    The base is n×n with n the larger side of x; of the map only k columns are made. 16-bit
    originals are rounded once.
    """
    y, dtype = tall(x), x.dtype
    is_tall = y is x
    if base is not None:
        base = cast(base, compute_dtype(dtype))
        if torch.compiler.is_compiling():  # whose operators round what they return
            y = cast(y, compute_dtype(dtype))
    q = _FREE[orthogonal_map](y, base)
    return cast(q if is_tall else q.mT.contiguous(), dtype)


def at_base(base: Tensor, orthogonal_map: str, x: Tensor) -> Tensor:
    """The map of a tall x along ``base``, which is like x, transposed for a wide one."""
    q = _AT_BASE[orthogonal_map](tall(x), tall(base))
    return q if x.size(-2) >= x.size(-1) else q.mT.contiguous()


def map_declines(orthogonal_map: str, x: Tensor) -> str:
    """Why the map does not take x, or the empty string."""
    if x.dim() < 2:
        return "the original is not a matrix"
    if orthogonal_map != "matrix_exp" and x.device.type == "mps":
        return "the map needs fp64 inside, which the device has not"
    return ""


def from_left_declines(base: Tensor | None, orthogonal_map: str, x: Tensor) -> str:
    """Why ``from_left`` does not take a base, here not None, or x, or the empty string."""
    if declined := map_declines(orthogonal_map, x):
        return declined
    *batch, n, k = x.shape
    n = max(n, k)
    if base is None or base.shape != (*batch, n, n):
        return "the base does not fit the original"
    if not same_device(base, x) or base.dtype != x.dtype:
        return "the base has not the original's device and dtype"
    return TRAINED if base.requires_grad else ""


def from_left_kernel_declines(orthogonal_map: str, x: Tensor) -> str:
    """Why no Triton kernel computes the map of x, or the empty string."""
    if x.size(-1) == x.size(-2) and orthogonal_map != "householder":
        exponential = orthogonal_map == "matrix_exp"
        return expm.kernel_declines(x, "skew") if exponential else cayley.kernel_declines(x)
    return _TALL[orthogonal_map].kernel_declines(tall(x))


def measured_as(orthogonal_map: str, x: Tensor) -> str:
    """The name under which the table of measured paths has the map of x."""
    if x.size(-1) == x.size(-2) and orthogonal_map != "householder":
        return {"cayley": "cayley", "matrix_exp": "skew_exp"}[orthogonal_map]
    return {"cayley": "tall_cayley", "matrix_exp": "tall_exp"}.get(orthogonal_map, orthogonal_map)


def from_left_launches(
    orthogonal_map: str, x: Tensor, *, based: bool = False
) -> tuple[int, int] | None:
    """How many kernels the map launches, forward and backward; of a tall x perhaps along a base."""
    if x.size(-1) != x.size(-2) or orthogonal_map == "householder":
        return _TALL[orthogonal_map].n_launches(tall(x), based=based)
    return expm.n_launches(x, "skew") if orthogonal_map == "matrix_exp" else cayley.n_launches(x)
