"""What a link may be given or assigned: the checks before it, and the errors they raise."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonparam.numerics import compute_dtype, identity_like


class NoPreimage(ValueError, NotImplementedError):
    """The assigned value is not in the image of the parametrization.

    It is a ``NotImplementedError`` so that ``register_parametrization`` keeps the tensor's own
    values as the original, and a ``ValueError`` so that assignment fails as users expect.

    >>> import tritonparam as tp
    >>> layer = tp.symmetric(torch.nn.Linear(2, 2))
    >>> try:
    ...     layer.weight = torch.tensor([[0., 1.], [-1., 0.]])
    ... except tp.NoPreimage as error:
    ...     print(str(error).partition(",")[0])
    Symmetric: the assigned matrix must equal its transpose
    """


def require_square(who: str, x: Tensor) -> None:
    """Raise ValueError if x is not a square matrix or a batch of them."""
    if x.dim() < 2 or x.size(-1) != x.size(-2):
        raise ValueError(
            f"{who}: the tensor must have shape [..., n, n], got {list(x.shape)}; "
            "only square matrices, or batches of them, have this structure."
        )


def require_float(who: str, x: Tensor) -> None:
    """Raise TypeError if x is neither of floating-point nor of complex dtype."""
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"{who}: the tensor must have a floating-point dtype, got {x.dtype}; "
            "convert it first, for example with .float()."
        )


def require_finite(who: str, x: Tensor) -> None:
    """Raise NoPreimage if x has entries that are not finite, or none at all."""
    if x.is_meta:
        raise NoPreimage(f"{who}: the assigned value is on the meta device and has no entries.")
    if not bool(torch.isfinite(x).all()):
        raise NoPreimage(
            f"{who}: the assigned value must be finite, got NaN or infinite entries; "
            "assign a finite tensor."
        )


def tolerance(x: Tensor) -> float:
    """How far x may be from its manifold, relative to its size, by rounding alone.

    Rounding the entries of an orthogonal matrix moves those of QᵀQ by at most eps
    (Cauchy-Schwarz). 16-bit matrices are only ever rounded; fp32 and fp64 ones have been
    computed in that precision, which 100·√n·eps has room for.
    """
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0
    eps = torch.finfo(x.dtype).eps
    if compute_dtype(x.dtype) != x.dtype:
        return 2 * eps
    return 100 * max(x.size(-1), 1) ** 0.5 * eps


def max_abs(x: Tensor) -> Tensor:
    """The largest absolute entry of each matrix of a batch, shape [...]; 0 for 0×0."""
    return x.abs().flatten(-2).amax(-1) if x.numel() else x.new_zeros(x.shape[:-2]).abs()


def off_manifold(defect: Tensor, size: Tensor, x: Tensor) -> float | None:
    """The largest relative defect of the batch x where it exceeds rounding, else None."""
    relative = torch.where(defect > 0, defect.double() / size.double(), 0.0).detach()
    worst = float(relative.max()) if relative.numel() else 0.0
    return worst if worst > tolerance(x) else None


def orthogonality_defect(q: Tensor) -> Tensor:
    """max|QᵀQ - I| of each matrix."""
    return max_abs(q.mT @ q - identity_like(q))
