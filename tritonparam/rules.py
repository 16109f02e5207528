"""The table of what is fused, read from top to bottom: the first rule that matches wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm

from tritonparam.links import CayleyMap, MatrixExponential, Skew, Symmetric
from tritonparam.numerics import compute_dtype, same_device
from tritonparam.ops import (
    cayley,
    expm,
    householder,
    spectral_norm,
    tall_cayley,
    tall_expm,
    weight_norm,
)
from tritonparam.orthogonal import Orthogonal, OrthogonalGates
from tritonparam.orthogonal_maps import (
    TRAINED,
    at_base,
    from_left,
    from_left_declines,
    from_left_kernel_declines,
    from_left_launches,
    map_declines,
    measured_as,
)
from tritonparam.paths import no_kernel
from tritonparam.registry import Rule
from tritonparam.slices import norm_shape
from tritonparam.stepped import SteppedSpectralNorm

_NO_SIGNS = object()  # an alias has none
_NO_BASE = object()  # without trivialization


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
    if base is None or x.size(-1) == x.size(-2):
        return from_left(base, link.orthogonal_map, x)
    return at_base(base, link.orthogonal_map, x)


def _orthogonal_declines(links: Sequence[nn.Module], x: Tensor) -> str:
    link: Any = links[0]
    base = getattr(link, "base", None)
    if declined := map_declines(link.orthogonal_map, x):
        return declined
    if base is not None and (base.shape != x.shape or base.device != x.device):
        return "the base point does not fit the original"
    return TRAINED if base is not None and base.requires_grad else ""


def _orthogonal_kernel_declines(links: Sequence[nn.Module], x: Tensor) -> str:
    return from_left_kernel_declines(cast(Any, links[0]).orthogonal_map, x)


def _columns(x: Tensor) -> int:
    return min(x.shape[-2:])


def _orthogonal_launches(links: Sequence[nn.Module], x: Tensor) -> tuple[int, int] | None:
    link: Any = links[0]
    based = getattr(link, "base", None) is not None and x.size(-1) != x.size(-2)
    return from_left_launches(link.orthogonal_map, x, based=based)


def _base(link: Any) -> Any:
    # The module's own lookup is slower.
    for home in (link._buffers, link.__dict__, link._parameters):
        if "base" in home:
            return home["base"]
    return _NO_BASE


def _torch_orthogonal(links: Sequence[nn.Module], x: Tensor) -> Tensor:
    link: Any = links[0]
    base = _base(link)
    return from_left(None if base is _NO_BASE else base, link.orthogonal_map._name_, x)


def _torch_orthogonal_declines(links: Sequence[nn.Module], x: Tensor) -> str:
    link: Any = links[0]
    base, orthogonal_map = _base(link), link.orthogonal_map._name_
    if base is _NO_BASE:
        return map_declines(orthogonal_map, x)
    return from_left_declines(base, orthogonal_map, x)


def _torch_orthogonal_differs(links: Sequence[nn.Module], x: Tensor) -> str:
    if cast(Any, links[0]).orthogonal_map.name != "householder":
        return ""
    return "the signs of the original's diagonal count, where torch truncates it to integers"


def _gates(links: Sequence[nn.Module], x: Tensor) -> Tensor:
    return cast(OrthogonalGates, links[0]).split(x)


def _gates_decline(links: Sequence[nn.Module], x: Tensor) -> str:
    if not cast(OrthogonalGates, links[0]).fits(x):
        return "the original has no square gates"
    return _orthogonal_declines(links, _gates(links, x))


def _weight_norm_declines(links: Sequence[nn.Module], *xs: Tensor) -> str:
    if len(xs) != 2:
        return "weight norm is not the first link, which gets norms and directions"
    g, v = xs
    dim, dtype = weight_norm.dim_of(links[0], v), v.dtype
    if not -1 <= dim < v.dim() or g.dtype != dtype or not same_device(g, v):
        return "the norms do not fit the directions"
    if dim == -1 and compute_dtype(dtype) != dtype:
        # torch rounds this norm, and this one only, and so leaves a weight as it was registered.
        return "one norm for a whole tensor of 16 bits is rounded as torch does it"
    return "" if g.shape == norm_shape(v, dim) else "the norms have another shape"


def _shape_to_stack(links: Sequence[nn.Module], w: Tensor) -> tuple[int, ...] | None:
    # Beyond, one matrix keeps a GPU busy, and a stack of the intermediates takes memory.
    return tuple(w.shape) if w.size(-1) <= 512 else None


_SPECTRAL_NORM = Rule(
    name="spectral_norm",
    chain=(_SpectralNorm,),
    op=lambda links, w: spectral_norm.spectral_norm(links[0], w),
    declines=lambda links, w: spectral_norm.misfit(links[0], w),
    kernel_declines=lambda links, w: spectral_norm.kernel_declines(links[0], w),
    size=Tensor.numel,
    kernels=lambda n, dtype: "spectral_norm",
    launches=lambda links, w: spectral_norm.n_launches(links[0], w),
    alike=lambda links, w: spectral_norm.steps(links[0]),
    together=lambda chains: spectral_norm.spectral_norms([(x[0], w) for x, (w,) in chains]),
)

RULES = (  # those first that cost the least, of which looking up is the larger part
    _SPECTRAL_NORM,
    replace(_SPECTRAL_NORM, chain=(SteppedSpectralNorm,)),
    Rule(
        name="weight_norm",
        chain=(_WeightNorm,),
        op=lambda links, g, v: weight_norm.weight_norm(links[0], g, v),
        declines=_weight_norm_declines,
        kernel_declines=lambda links, g, v: weight_norm.kernel_declines(g, v),
        size=lambda g, v: v.numel(),
        kernels=lambda n, dtype: "weight_norm",
        launches=lambda links, g, v: weight_norm.n_launches(links[0], v),
        alike=lambda links, g, v: "any",
        together=lambda chains: weight_norm.weight_norms(
            [(links[0], g, v) for links, (g, v) in chains]
        ),
    ),
    Rule(
        name="cayley",
        chain=(Skew, CayleyMap),
        op=_skew_cayley,
        declines=_skew_cayley_declines,
        kernel_declines=lambda links, w: cayley.kernel_declines(w),
        kernels=cayley.kernel_file,
        launches=lambda links, w: cayley.n_launches(w),
        alike=_shape_to_stack,
        together=lambda chains: cayley.skew_cayleys(
            [(w, _signature(links, w)) for links, (w,) in chains]
        ),
    ),
    Rule(
        name="skew_exp",
        chain=(Skew, MatrixExponential),
        op=lambda links, w: expm.skew_exp(w),
        declines=_square_declines,
        kernel_declines=lambda links, w: expm.kernel_declines(w, "skew"),
        kernels=expm.kernel_file,
        launches=lambda links, w: expm.n_launches(w, "skew"),
        alike=_shape_to_stack,
        together=lambda chains: expm.skew_exps([w for _, (w,) in chains]),
    ),
    Rule(
        name="symmetric_exp",
        chain=(Symmetric, MatrixExponential),
        op=lambda links, w: expm.symmetric_exp(w),
        declines=_square_declines,
        kernel_declines=lambda links, w: expm.kernel_declines(w, "symmetric"),
        kernels=expm.kernel_file,
        launches=lambda links, w: expm.n_launches(w, "symmetric"),
        alike=_shape_to_stack,
        together=lambda chains: expm.symmetric_exps([w for _, (w,) in chains]),
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
        size=_columns,
        measured_as=lambda links, x: measured_as(cast(Any, links[0]).orthogonal_map, x),
        launches=_orthogonal_launches,
    ),
    Rule(
        name="torch_orthogonal",
        chain=(_Orthogonal,),
        op=_torch_orthogonal,
        declines=_torch_orthogonal_declines,
        kernel_declines=lambda links, x: from_left_kernel_declines(
            cast(Any, links[0]).orthogonal_map.name, x
        ),
        size=_columns,
        # By itself: what torch composes is n×n.
        measured_as=lambda links, x: (
            "torch_" + measured_as(cast(Any, links[0]).orthogonal_map.name, x)
        ),
        launches=lambda links, x: from_left_launches(cast(Any, links[0]).orthogonal_map.name, x),
        differs=_torch_orthogonal_differs,
    ),
    Rule(
        name="orthogonal",
        chain=(OrthogonalGates,),
        op=lambda links, x: _orthogonal(links, _gates(links, x)).flatten(0, 1),
        declines=_gates_decline,
        kernel_declines=lambda links, x: _orthogonal_kernel_declines(links, _gates(links, x)),
        measured_as=lambda links, x: measured_as(
            cast(Any, links[0]).orthogonal_map, _gates(links, x)
        ),
        launches=lambda links, x: _orthogonal_launches(links, _gates(links, x)),
    ),
)

# What tables call a chain, and the file whose launch configurations it is tuned with. The tall maps
# have no chain of their own: they are what an orthogonal weight is measured as.
KERNELS: dict[str, Callable[[int, torch.dtype], str]] = {
    **{rule.name: rule.kernels for rule in RULES if rule.kernels(1, torch.float32)},
    "tall_cayley": tall_cayley.kernel_file,
    "tall_exp": tall_expm.kernel_file,
    "householder": householder.kernel_file,
}
