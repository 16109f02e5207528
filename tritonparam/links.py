"""The links that chains are made of, in plain torch: what every fused path must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritonparam import logm
from tritonparam.numerics import as_batch, compute_dtype, identity_like, inv_ex, no_autocast, solve
from tritonparam.preimage import (
    NoPreimage,
    max_abs,
    off_manifold,
    orthogonality_defect,
    require_finite,
    require_float,
    require_square,
    tolerance,
)


class Symmetric(nn.Module):
    """The symmetric matrix whose upper triangle is that of X: ``triu(X) + triu(X, 1)ᵀ``.

    X has shape [..., n, n] and any dtype; the result has the same. What is not symmetric cannot be
    assigned.

    >>> Symmetric()(torch.tensor([[1., 2.], [0., 3.]]))
    tensor([[1., 2.],
            [2., 3.]])
    """

    def __init__(self) -> None:  # nn.Module's own has a signature of any arguments
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Map any square matrix to a symmetric one."""
        require_square("Symmetric", x)
        return x.triu() + x.triu(1).mT

    def right_inverse(self, a: Tensor) -> Tensor:
        """The upper triangle of a symmetric matrix; raises NoPreimage if `a` is not symmetric."""
        require_square("Symmetric", a)
        require_finite("Symmetric", a)
        off = off_manifold(max_abs(a - a.mT), max_abs(a), a)
        if off is not None and off_manifold(max_abs(a + a.mT), max_abs(a), a) is None:
            raise NoPreimage(
                "Symmetric: the assigned matrix must equal its transpose, got a skew one, as the "
                "logarithm of a rotation is, and -I of even size is a rotation; before a "
                "MatrixExponential, assign a matrix whose eigenvalues are all positive."
            )
        if off is not None:
            raise NoPreimage(
                "Symmetric: the assigned matrix must equal its transpose, got "
                f"max|A - Aᵀ| = {off:.1e} max|A|; assign (A + A.mT) / 2."
            )
        return a.triu()


class Skew(nn.Module):
    """The skew-symmetric matrix whose upper triangle is that of X: ``triu(X, 1) - triu(X, 1)ᵀ``.

    X has shape [..., n, n] and any dtype; the result has the same. What is not skew-symmetric
    cannot be assigned.

    >>> Skew()(torch.tensor([[1., 2.], [0., 3.]]))
    tensor([[ 0.,  2.],
            [-2.,  0.]])
    """

    def __init__(self) -> None:  # nn.Module's own has a signature of any arguments
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Map any square matrix to a skew-symmetric one."""
        require_square("Skew", x)
        upper = x.triu(1)
        return upper - upper.mT

    def right_inverse(self, a: Tensor) -> Tensor:
        """The strict upper triangle of a skew matrix; raises NoPreimage if `a` is not skew."""
        require_square("Skew", a)
        require_finite("Skew", a)
        off = off_manifold(max_abs(a + a.mT), max_abs(a), a)
        if off is not None:
            raise NoPreimage(
                "Skew: the assigned matrix must equal minus its transpose, got "
                f"max|A + Aᵀ| = {off:.1e} max|A|; assign (A - A.mT) / 2."
            )
        return a.triu(1)


class CayleyMap(nn.Module):
    """The Cayley map of a skew matrix, an orthogonal one: ``(I + X)(I - X)⁻¹ diag(d)``.

    The signs d are the persistent buffer `signature`, shape ``X.shape[:-1]``: ones, unless an
    assigned matrix has an eigenvalue -1, which no Cayley map without signs reaches. They are
    not trained, so that the determinant keeps its sign. X has shape [..., n, n] and a
    floating-point or complex dtype; fp16 and bf16 are computed in fp32. Any orthogonal matrix can
    be assigned.

    Arguments:
        n: the size of the matrices; without it the map takes the size of the first tensor that
            it is shown, which registration does.

    >>> w = CayleyMap()(torch.tensor([[0., 1.], [-1., 0.]]))
    >>> torch.allclose(w, torch.tensor([[0., 1.], [-1., 0.]]))
    True
    """

    signature: Tensor | None

    def __init__(self, n: int | None = None) -> None:
        super().__init__()
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 0):
            raise ValueError(f"CayleyMap: n must be a non-negative integer or None, got {n!r}.")
        self.register_buffer("signature", None if n is None else torch.ones(n))

    def materialize(self, like: Tensor) -> Tensor:
        """The signature for a tensor of shape [..., n, n], created or expanded where needed."""
        d = self.signature
        if d is None:
            self.signature = d = torch.ones(like.shape[:-1], dtype=like.dtype, device=like.device)
        elif d.shape != like.shape[:-1]:
            if d.shape != like.shape[-1:]:
                raise ValueError(
                    f"CayleyMap: the tensor must have shape {[*d.shape, d.size(-1)]} as its "
                    f"signature was made for, got {list(like.shape)}; use a new CayleyMap()."
                )
            self.signature = d = d.to(like).expand(like.shape[:-1]).contiguous()
        elif d.device != like.device or d.dtype != like.dtype:
            self.signature = d = d.to(like)
        return d

    def forward(self, x: Tensor) -> Tensor:
        """Map a skew matrix to an orthogonal one."""
        require_square("CayleyMap", x)
        require_float("CayleyMap", x)
        d = self.materialize(x)
        with no_autocast(x):
            y = x.to(compute_dtype(x.dtype))
            eye = identity_like(y)
            q = solve(eye - y, eye + y) * d.unsqueeze(-2)
        return q.to(x.dtype)

    def right_inverse(self, q: Tensor) -> Tensor:
        """The skew matrix of an orthogonal one, of either determinant.

        Computed in fp64. The signs stay one where max|2(I + Q)⁻¹| < 1/√eps, and are chosen
        otherwise so that every pivot of an unpivoted LU of I + Q diag(d) is at least one.
        Raises NoPreimage if `q` is not orthogonal.
        """
        require_square("CayleyMap", q)
        require_float("CayleyMap", q)
        if q.is_complex():
            raise NoPreimage("CayleyMap: only real matrices can be assigned, got a complex one.")
        require_finite("CayleyMap", q)
        q64 = q.detach().to(torch.float64)
        ones = torch.ones(q.shape[:-1], dtype=q64.dtype, device=q.device)
        off = off_manifold(orthogonality_defect(q64), q64.new_ones(()), q)
        if off is not None:
            raise NoPreimage(
                "CayleyMap: the assigned matrix must be orthogonal, got "
                f"max|QᵀQ - I| = {off:.1e}; project it first, for example with torch.linalg.qr."
            )
        limit = torch.finfo(q.dtype).eps ** -0.5
        plain = max_abs(_twice_inverse(q64, ones)) < limit
        d = torch.where(plain.unsqueeze(-1), ones, _signs(q64))
        x = identity_like(q64) - _twice_inverse(q64, d)
        x = ((x - x.mT) / 2).to(q.dtype)
        self.materialize(q).copy_(d)
        return x

    def default_state(self) -> dict[str, Tensor]:
        """The state of a bare Cayley map, which has no signs: all ones."""
        return {} if self.signature is None else {"signature": torch.ones_like(self.signature)}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # `Id` is the buffer of the map in PyTorch's tutorial, and a map without a signature is
        # not short of anything.
        state_dict.pop(prefix + "Id", None)
        key = prefix + "signature"
        if key in state_dict and self.signature is None:
            self.signature = torch.ones_like(state_dict[key])
        elif key not in state_dict and self.signature is not None:
            state_dict[key] = self.signature
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _twice_inverse(q: Tensor, d: Tensor) -> Tensor:
    """2(I + Q diag(d))⁻¹, with infinity where singular."""
    inverse, info = inv_ex(identity_like(q) + q * d.unsqueeze(-2))
    return torch.where((info == 0)[..., None, None], 2 * inverse, torch.inf)


def _signs(q: Tensor) -> Tensor:
    """d = ±1 such that an unpivoted LU of I + Q diag(d) has pivots 1 + |s_k| >= 1."""
    s = q.clone()
    d = torch.ones(q.shape[:-1], dtype=q.dtype, device=q.device)
    for k in range(q.size(-1)):
        d[..., k] = torch.where(s[..., k, k] < 0, -1.0, 1.0)
        pivot = 1 + s[..., k, k].abs()
        column = s[..., k + 1 :, k] * (d[..., k] / pivot).unsqueeze(-1)
        s[..., k + 1 :, k + 1 :] -= column.unsqueeze(-1) * s[..., k, k + 1 :].unsqueeze(-2)
    return d


class MatrixExponential(nn.Module):
    """The matrix exponential ``exp(X)``: orthogonal for skew X, positive definite for symmetric X.

    X has shape [..., n, n] and a floating-point or complex dtype; fp16 and bf16 are computed in
    fp32. The right inverse is the principal logarithm; what has none cannot be assigned.

    >>> MatrixExponential()(torch.zeros(2, 2))
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self) -> None:  # nn.Module's own has a signature of any arguments
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Map any square matrix to its exponential."""
        require_square("MatrixExponential", x)
        require_float("MatrixExponential", x)
        with no_autocast(x):
            y = as_batch(x.to(compute_dtype(x.dtype)))
            if y.size(0) == 1:
                # torch takes a lone matrix through a wrong coefficient (pytorch #196592); beside
                # a zero matrix, which costs no product, it takes the right ones.
                e = torch.matrix_exp(torch.cat((y, torch.zeros_like(y))))[:1]
            else:
                e = torch.matrix_exp(y)
        return e.reshape(x.shape).to(x.dtype)

    def right_inverse(self, a: Tensor) -> Tensor:
        """The principal logarithm, computed in fp64.

        Exactly symmetric for a positive definite matrix, and exactly skew for a rotation, which
        may turn planes by π, the way of which is then arbitrary. Raises NoPreimage where no real
        principal logarithm exists: an eigenvalue of any other matrix that is zero or negative.
        """
        require_square("MatrixExponential", a)
        require_float("MatrixExponential", a)
        if a.is_complex():
            raise NoPreimage(
                "MatrixExponential: only real matrices can be assigned, got a complex one."
            )
        require_finite("MatrixExponential", a)
        if a.numel() == 0:
            return a.clone()
        flat = as_batch(a.detach().double())
        allowed = tolerance(a)
        asymmetry = max_abs(flat - flat.mT) / max_abs(flat)
        defect = orthogonality_defect(flat)
        indefinite = torch.linalg.cholesky_ex(flat)[1] > 0  # if symmetric: it turns planes by π
        logs = torch.zeros_like(flat)
        try:
            for i, ai in enumerate(flat):
                if defect[i] <= allowed and (asymmetry[i] > defect[i] or indefinite[i]):
                    logs[i] = logm.orthogonal(ai)
                elif asymmetry[i] <= allowed:
                    logs[i] = logm.symmetric(ai)
                else:
                    logs[i] = logm.general(ai, allowed)
        except ValueError as error:
            raise NoPreimage(
                f"MatrixExponential: the assigned matrix must have a real principal logarithm, got "
                f"{error}; assign a rotation, or a matrix without zero or negative real "
                "eigenvalues."
            ) from None
        return logs.reshape(a.shape).to(a.dtype)


class Pruning(nn.Module):
    """Keeps the entries of X where the mask is one: ``X * mask``.

    Assignment takes any finite tensor and keeps its unmasked entries, as in PyTorch's tutorial.

    Arguments:
        mask: a tensor that broadcasts to X's shape, of ones and zeros.

    >>> Pruning(torch.tensor([1., 0.]))(torch.tensor([5., 6.]))
    tensor([5., 0.])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"Pruning: mask must be a tensor, got {type(mask).__name__}; "
                "Pruning.random(like, p_drop) draws one."
            )
        self.register_buffer("mask", mask.detach().clone())

    @classmethod
    def random(cls, like: Tensor, p_drop: float = 0.2) -> Pruning:
        """A mask of the shape, dtype and device of `like`, each entry zero with p_drop."""
        if not 0 <= p_drop <= 1:
            raise ValueError(f"Pruning.random: p_drop must be between 0 and 1, got {p_drop}.")
        return cls(torch.bernoulli(torch.full_like(like, 1.0 - p_drop, requires_grad=False)))

    def forward(self, x: Tensor) -> Tensor:
        """Set the masked entries to zero."""
        return x * self.mask

    def right_inverse(self, a: Tensor) -> Tensor:
        """A copy of the assigned tensor."""
        require_finite("Pruning", a)
        return a.clone()
