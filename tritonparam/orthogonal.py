"""The link of ``orthogonal()``: tall, wide and square matrices with orthonormal columns or rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritonparam.numerics import compute_dtype, identity_like, no_autocast, solve
from tritonparam.preimage import NoPreimage, off_manifold, orthogonality_defect, require_finite

MAPS = ("matrix_exp", "cayley", "householder")


class Orthogonal(nn.Module):
    """The matrix with orthonormal columns (rows, if it is wide) that a map makes of any matrix X.

    The maps are those of ``torch.nn.utils.parametrizations.orthogonal``. For a square X they are
    B exp(A) and B (I - A/2)⁻¹ (I + A/2) with A = L - Lᵀ, L = tril(X, -1), and
    B H(X) diag(sign(X_ii)) with H the product of the Householder reflectors below X's diagonal; B
    is the base point. For a tall X, [n, k], nothing n × n is made or kept: without a base point
    they are the first k columns for X padded with zeros. With one, exp and Cayley are taken along
    the geodesic, or the Cayley curve, through the n × k base point in the direction X (Wen & Yin
    2013, Lezcano-Casado 2019), and `base` of the Householder map holds the reflectors and signs of
    the orthogonal matrix that stands to the left. A wide X is transposed. fp16 and bf16 are
    computed in fp32.

    Arguments:
        orthogonal_map: "matrix_exp", "cayley" or "householder".
        use_trivialization: keep a base point, the buffer `base`: what was assigned last, which is
            where training starts from (dynamic trivialization, Lezcano-Casado 2019).

    >>> q = Orthogonal("cayley", use_trivialization=False)(torch.ones(4, 2))
    >>> torch.allclose(q.T @ q, torch.eye(2), atol=1e-6)
    True
    """

    base: Tensor | None

    def __init__(self, orthogonal_map: str, *, use_trivialization: bool = True) -> None:
        super().__init__()
        self.orthogonal_map = require_map("Orthogonal", orthogonal_map)
        self.use_trivialization = use_trivialization
        if use_trivialization:
            self.register_buffer("base", None)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.orthogonal_map!r}, use_trivialization={self.use_trivialization}"

    def forward(self, x: Tensor) -> Tensor:
        """Map any matrix [..., n, k] to one with orthonormal columns, or rows if n < k."""
        require_matrix("Orthogonal", x)
        if x.numel() == 0:
            return x.clone()
        base = getattr(self, "base", None)
        with no_autocast(x):
            y = tall(x.to(compute_dtype(x.dtype)))
            b = None if base is None else tall(base.to(y.dtype))
            q = _MAPS[self.orthogonal_map](y, b)
        return (q if x.size(-2) >= x.size(-1) else q.mT).to(x.dtype)

    @torch.no_grad()
    def right_inverse(self, q: Tensor) -> Tensor:
        """The original of `q`, which becomes the base point; projected by QR if not orthonormal.

        Raises NoPreimage for entries that are not finite, and for the exponential and Cayley map
        without a base point; ValueError for another shape than the base point's.
        """
        require_matrix("Orthogonal", q)
        base = getattr(self, "base", None)
        if base is not None and base.shape != q.shape:
            raise ValueError(
                f"Orthogonal: the tensor must have shape {list(base.shape)} as the base point has, "
                f"got {list(q.shape)}; use a new Orthogonal()."
            )
        require_finite("Orthogonal", q)
        if not self.use_trivialization and self.orthogonal_map != "householder":
            raise NoPreimage(
                f"Orthogonal: nothing can be assigned to the {self.orthogonal_map} map without a "
                "base point; register it with use_trivialization=True."
            )
        t = tall(q.detach().double())
        t = t if is_orthonormal(t, q.dtype) else _projected(t)
        square = t.size(-1) == t.size(-2)
        if self.orthogonal_map == "householder" and not (square and self.use_trivialization):
            t = reflectors(t)
        t = (t if q.size(-2) >= q.size(-1) else t.mT).to(q.dtype)
        t = t.clone(memory_format=torch.contiguous_format)
        if not self.use_trivialization:
            return t
        self.base = t
        original = torch.zeros_like(q, memory_format=torch.contiguous_format)
        if square or self.orthogonal_map == "householder":
            original.diagonal(dim1=-2, dim2=-1).fill_(-1)
        return original

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        base = state_dict.get(prefix + "base")
        if base is not None and self.use_trivialization:
            expected = list(base.shape) if self.base is None else list(self.base.shape)
            orthonormal = base.is_meta or self._is_base(base)
            if list(base.shape) != expected or not orthonormal:
                want = f"of shape {expected}" if list(base.shape) != expected else "orthonormal"
                args[-1].append(
                    f"Orthogonal: {prefix}base must be {want}, got shape {list(base.shape)}; "
                    "checkpoints of torch's orthogonal() for tall weights hold an n×n base and "
                    "load into a model that torch constrained, which fuse() then speeds up."
                )
                state_dict.pop(prefix + "base")
            elif self.base is None:
                self.base = torch.empty_like(base)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _is_base(self, base: Tensor) -> bool:
        t = tall(base.double())
        if self.orthogonal_map == "householder" and t.size(-1) != t.size(-2):
            return bool(t.isfinite().all())  # any reflectors will do
        return is_orthonormal(t, base.dtype)


class OrthogonalGates(Orthogonal):
    """``Orthogonal`` for every one of the square gates that stand on one another in a weight.

    X is [gates·h, h], and so is the result; `base` is [gates, h, h].

    Arguments:
        gates: how many there are.
        orthogonal_map, use_trivialization: those of ``Orthogonal``.

    >>> w = OrthogonalGates(2, "cayley", use_trivialization=False)(torch.ones(6, 3))
    >>> torch.allclose(w[:3].T @ w[:3], torch.eye(3), atol=1e-6)
    True
    """

    def __init__(self, gates: int, orthogonal_map: str, *, use_trivialization: bool = True) -> None:
        super().__init__(orthogonal_map, use_trivialization=use_trivialization)
        self.gates = gates

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.gates}, {super().extra_repr()}"

    def forward(self, x: Tensor) -> Tensor:
        """Map any [gates·h, h] to one whose gates are orthogonal."""
        return super().forward(self.split(x)).flatten(0, 1)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """The original of `w`, whose gates become the base point; projected by QR as above."""
        return super().right_inverse(self.split(w)).flatten(0, 1)

    def fits(self, x: Tensor) -> bool:
        """Whether x has the shape [gates·h, h]."""
        return x.dim() == 2 and x.size(0) == self.gates * x.size(1)

    def split(self, x: Tensor) -> Tensor:
        """The gates of x, [gates, h, h]."""
        if not self.fits(x):
            raise ValueError(
                f"OrthogonalGates: the tensor must have shape [{self.gates}·h, h], got "
                f"{list(x.shape)}; the gates of other shapes are not square."
            )
        return x.unflatten(0, (self.gates, x.size(1)))


def require_map(who: str, orthogonal_map: str) -> str:
    """Raise ValueError if there is no such map; return its name."""
    if orthogonal_map not in MAPS:
        raise ValueError(
            f"{who}: orthogonal_map must be one of {', '.join(MAPS)}, got {orthogonal_map!r}."
        )
    return orthogonal_map


def require_matrix(who: str, x: Tensor) -> None:
    """Raise if x is not a real floating-point tensor of at least two dimensions."""
    if x.dim() < 2:
        raise ValueError(
            f"{who}: the tensor must have shape [..., n, k], got {list(x.shape)}; "
            "vectors and scalars have no orthonormal form, reshape it."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"{who}: the tensor must have a real floating-point dtype, got {x.dtype}; "
            "for complex weights use torch.nn.utils.parametrizations.orthogonal."
        )


def tall(x: Tensor) -> Tensor:
    """x, transposed if it is wide."""
    n, k = x.shape[-2:]  # asking for one size takes longer
    return x if n >= k else x.mT


def is_orthonormal(q: Tensor, dtype: torch.dtype) -> bool:
    """Whether q, tall and in fp64, has orthonormal columns up to rounding in `dtype`."""
    defect = orthogonality_defect(q)
    like = q.new_empty((0, q.size(-1)), dtype=dtype)
    return bool(q.isfinite().all()) and off_manifold(defect, q.new_ones(()), like) is None


def _projected(q: Tensor) -> Tensor:
    """The Q factor whose R has a diagonal that is not negative, as in torch's orthogonal()."""
    q, r = torch.linalg.qr(q)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


def reflectors(q: Tensor) -> Tensor:
    """Householder reflectors below the diagonal and signs on it, whose product is q, in fp64.

    q is [..., n, k], n >= k, with orthonormal columns; of another matrix with independent columns
    the product is the factor Q in q = QR with a positive diagonal of R.
    """
    a, tau = torch.geqrf(q.double())
    signs = torch.where(a.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(a.dtype)
    # LAPACK's tau = 0 is no reflection at all; ours with v = eᵢ reflects eᵢ.
    signs = torch.where(tau == 0, -signs, signs)
    x = a.tril(-1)
    x.diagonal(dim1=-2, dim2=-1).copy_(signs)
    return x


def _lower(x: Tensor) -> tuple[Tensor, Tensor]:
    """The skew k × k part L - Lᵀ of a tall X, L = tril(X[:k], -1), and what is below it."""
    k = x.size(-1)
    lower = x[..., :k, :].tril(-1)
    return lower - lower.mT, x[..., k:, :]


def _tangent(x: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Ω and P of the tangent vector B Ω + P at B in the direction X."""
    c = base.mT @ x
    return (c - c.mT) / 2, x - base @ c


def _cayley(x: Tensor, base: Tensor | None) -> Tensor:
    square = x.size(-1) == x.size(-2)
    omega, p = _lower(x) if base is None or square else _tangent(x, base)
    eye = identity_like(omega)
    # The n × n system has this Schur complement; its symmetric part is at least I.
    m = solve(eye - omega / 2 + p.mT @ p / 4, eye.expand_as(omega))
    top = 2 * m - eye
    if base is None:
        return torch.cat((top, p @ m), -2)
    return base @ top if square else base @ top + p @ m


def _matrix_exp(x: Tensor, base: Tensor | None) -> Tensor:
    square = x.size(-1) == x.size(-2)
    omega, p = _lower(x) if base is None or square else _tangent(x, base)
    if square:
        e = torch.matrix_exp(torch.stack((omega, torch.zeros_like(omega))))[0]  # pytorch #196592
        return e if base is None else base @ e
    k, eye = x.size(-1), identity_like(omega).expand_as(omega)
    c = p.mT @ p
    b = (c.detach().diagonal(dim1=-2, dim2=-1).mean(-1) if k else c.sum((-1, -2))).sqrt()
    b = torch.where(b > 0, b, 1.0)[..., None, None]
    rows = torch.cat((omega, -c / b), -1), torch.cat((b * eye, torch.zeros_like(c)), -1)
    e = torch.cat(rows, -2)
    e = torch.matrix_exp(torch.stack((e, torch.zeros_like(e))))[0][..., :k]
    top, bottom = e[..., :k, :], p @ (e[..., k:, :] / b)
    return torch.cat((top, bottom), -2) if base is None else base @ top + bottom


def _householder(x: Tensor, base: Tensor | None) -> Tensor:
    square = x.size(-1) == x.size(-2)
    q = _product(x) * _signs(x)
    if base is None:
        return q
    if square:
        return base @ q
    a = base.tril(-1)
    signs = torch.cat((_signs(base).mT, torch.ones_like(q[..., base.size(-1) :, :1])), -2)
    return torch.ormqr(a, _tau(a), signs * q)


def _tau(a: Tensor) -> Tensor:
    return 2 / (1 + a.square().sum(-2))


def _product(x: Tensor) -> Tensor:
    a = x.tril(-1)
    return torch.linalg.householder_product(a, _tau(a))


def _signs(x: Tensor) -> Tensor:
    """±1, [..., 1, k]: where torch truncates the diagonal, so that weight decay zeroes it."""
    return torch.where(x.detach().diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(x).unsqueeze(-2)


_MAPS = {"cayley": _cayley, "matrix_exp": _matrix_exp, "householder": _householder}
