"""The table of what is fused, read from top to bottom: the first rule that matches wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm

from tritonparam.links import CayleyMap, MatrixExponential, Skew, Symmetric
from tritonparam.numerics import compute_dtype, no_autocast
from tritonparam.ops import (
    cayley,
    expm,
    householder,
    spectral_norm,
    tall_cayley,
    tall_expm,
    weight_norm,
)
from tritonparam.orthogonal import Orthogonal, tall
from tritonparam.registry import Rule, no_kernel

_NO_SIGNS = object()  # an alias has none


def _signature(links: Sequence[nn.Module], w: Tensor) -> Any:
    buffers = links[1]._buffers  # the module's own lookup is slower
    d = (
        buffers["signature"]
        if "signature" in buffers
        else getattr(links[1], "signature", _NO_SIGNS)
    )
    return w.new_ones(()).expand(w.shape[:-1]) if d is _NO_SIGNS else d


def _skew_cayley(links: Sequence[nn.Module], w: Tensor) -> Tensor:
    return cayley.skew_cayley(w, _signature(links, w))


def _skew_cayley_declines(links: Sequence[nn.Module], w: Tensor) -> str:
    shape = w.shape
    if len(shape) < 2 or shape[-1] != shape[-2]:
        return "the original is not square"
    d = _signature(links, w)
    if d is None or d.shape != shape[:-1] or d.device != w.device:
        return "the map's signature does not fit the original"
    return ""


def _square_declines(links: Sequence[nn.Module], w: Tensor) -> str:
    return "" if w.dim() >= 2 and w.size(-1) == w.size(-2) else "the original is not square"


def _orthogonal(links: Sequence[nn.Module], x: Tensor) -> Tensor:
    link: Any = links[0]
    base = getattr(link, "base", None)
    y = tall(x)
    if base is None:
        q = _FREE[link.orthogonal_map](y)
    elif y.size(-1) == y.size(-2):
        # The base stands to the left; 16-bit weights are rounded once.
        with no_autocast(x):
            q = tall(base).to(compute_dtype(x.dtype)) @ _FREE[link.orthogonal_map](
                y.to(compute_dtype(x.dtype))
            )
    else:
        q = _AT_BASE[link.orthogonal_map](y, tall(base))
    q = q if x.size(-2) >= x.size(-1) else q.mT
    return q.to(x.dtype)


def _exp(x: Tensor) -> Tensor:
    if x.size(-1) != x.size(-2):
        return tall_expm.tall_exp(x)
    return expm.skew_exp(-x.mT)  # of tril(X) - tril(X)ᵀ, where Skew keeps the upper triangle


_FREE = {
    "cayley": tall_cayley.tall_cayley,
    "matrix_exp": _exp,
    "householder": householder.householder,
}
_AT_BASE = {
    "cayley": tall_cayley.tall_cayley_at,
    "matrix_exp": tall_expm.tall_exp_at,
    "householder": householder.householder_at,
}


def _orthogonal_declines(links: Sequence[nn.Module], x: Tensor) -> str:
    base = getattr(links[0], "base", None)
    if x.dim() < 2:
        return "the original is not a matrix"
    if x.device.type == "mps" and cast(Any, links[0]).orthogonal_map != "matrix_exp":
        return "the map needs fp64 inside, which the device has not"
    if base is not None and (base.shape != x.shape or base.device != x.device):
        return "the base point does not fit the original"
    return ""


def _orthogonal_kernel_declines(links: Sequence[nn.Module], x: Tensor) -> str:
    if cast(Any, links[0]).orthogonal_map == "matrix_exp" and x.size(-1) == x.size(-2):
        return expm.kernel_declines(x, "skew")
    return no_kernel(x)


def _spectral_norm_declines(links: Sequence[nn.Module], w: Tensor) -> str:
    link: Any = links[0]
    if w.dim() < 2:
        return ""  # normalised without buffers
    rows = w.size(link.dim)
    sizes = ((link._u, rows), (link._v, w.numel() // max(rows, 1)))
    for buffer, size in sizes:
        if buffer.device != w.device or buffer.dtype != w.dtype or buffer.numel() != size:
            return "the power iteration's vectors do not fit the original"
    return ""


def _weight_norm_declines(links: Sequence[nn.Module], g: Tensor, v: Tensor) -> str:
    dim = cast(Any, links[0]).dim
    if not -1 <= dim < v.dim() or g.device != v.device or g.dtype != v.dtype:
        return "the norms do not fit the directions"
    return "" if g.shape == weight_norm.norm_shape(v, dim) else "the norms have another shape"


RULES = (
    Rule(
        name="cayley",
        chain=(Skew, CayleyMap),
        op=_skew_cayley,
        declines=_skew_cayley_declines,
        kernel_declines=lambda links, w: cayley.kernel_declines(w),
    ),
    Rule(
        name="skew_exp",
        chain=(Skew, MatrixExponential),
        op=lambda links, w: expm.skew_exp(w),
        declines=_square_declines,
        kernel_declines=lambda links, w: expm.kernel_declines(w, "skew"),
    ),
    Rule(
        name="symmetric_exp",
        chain=(Symmetric, MatrixExponential),
        op=lambda links, w: expm.symmetric_exp(w),
        declines=_square_declines,
        kernel_declines=lambda links, w: expm.kernel_declines(w, "symmetric"),
    ),
    Rule(
        name="matrix_exp",
        chain=(MatrixExponential,),
        op=lambda links, a: expm.matrix_exp(a),
        declines=_square_declines,
        kernel_declines=lambda links, a: no_kernel(a),
    ),
    Rule(
        name="orthogonal",
        chain=(Orthogonal,),
        op=_orthogonal,
        declines=_orthogonal_declines,
        kernel_declines=_orthogonal_kernel_declines,
    ),
    Rule(
        name="spectral_norm",
        chain=(_SpectralNorm,),
        op=lambda links, w: spectral_norm.spectral_norm(links[0], w),
        declines=_spectral_norm_declines,
        kernel_declines=lambda links, w: spectral_norm.kernel_declines(links[0], w),
        size=Tensor.numel,
    ),
    Rule(
        name="weight_norm",
        chain=(_WeightNorm,),
        op=lambda links, g, v: weight_norm.weight_norm(links[0], g, v),
        declines=_weight_norm_declines,
        kernel_declines=lambda links, g, v: weight_norm.kernel_declines(g, v),
        size=lambda g, v: v.numel(),
    ),
)
