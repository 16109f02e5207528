"""How far a weight is from what the last link of its chain promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm

from tritonparam import registry
from tritonparam.links import CayleyMap, MatrixExponential, Pruning, Skew, Symmetric
from tritonparam.orthogonal import Orthogonal, OrthogonalGates
from tritonparam.slices import norm_shape

_ORTHOGONAL = (CayleyMap, Orthogonal, OrthogonalGates, _Orthogonal)


def defect(links: Sequence[nn.Module], originals: Sequence[Tensor], w: Tensor) -> float | None:
    """The largest entry, in fp64, by which w misses its constraint; None where there is none, NaN
    where w is not finite.

    Orthogonal Q, of the Cayley map, the exponential after Skew, `Orthogonal`, each of
    `OrthogonalGates`, or torch's own:
    QᵀQ - I, or QQᵀ - I if Q is wide. Symmetric, with its exponential: W - Wᵀ. Skew: W + Wᵀ.
    Spectral norm: |σ - 1|, σ from an SVD. Weight norm: ‖w‖ - |g|. Pruning: what is left under the
    mask.
    """
    link: Any = links[-1]
    kinds: list[type] = [nn.Identity, *(registry.meaning(type(link)) for link in links)]
    is_exp = kinds[-1] is MatrixExponential
    kind = kinds[-2] if is_exp else kinds[-1]
    if is_exp and kind not in (Skew, Symmetric):
        return None
    # MPS has no fp64.
    w = w.detach().to("cpu" if w.device.type == "mps" else w.device).to(torch.float64)
    if not w.isfinite().all():
        return math.nan
    if kind is OrthogonalGates:
        w = link.split(w)
    if kind in _ORTHOGONAL or (is_exp and kind is Skew):
        q = w if w.size(-2) >= w.size(-1) else w.mT
        d = q.mT @ q - torch.eye(q.size(-1), dtype=q.dtype, device=q.device)
    elif kind is Symmetric:
        d = w - w.mT
    elif kind is Skew:
        d = w + w.mT
    elif issubclass(kind, _SpectralNorm):
        d = _spectral_norm(w, link.dim) - 1
    elif kind is _WeightNorm and len(links) == 1:
        g = originals[0].detach().to(w)
        d = _norms(w, link.dim).reshape(g.shape) - g.abs()
    elif kind is Pruning:
        d = w * (link.mask == 0).to(w)
    else:
        return None
    return float(d.abs().max()) if d.numel() else 0.0


def _spectral_norm(w: Tensor, dim: int) -> Tensor:
    return w.norm() if w.dim() == 1 else torch.linalg.matrix_norm(w.movedim(dim, 0).flatten(1), 2)


def _norms(w: Tensor, dim: int) -> Tensor:
    """Of w's entries at every index of `dim`, one of all at -1."""
    shape = norm_shape(w, dim if dim >= -1 else dim + w.dim())
    return w.square().sum_to_size(shape).sqrt()
