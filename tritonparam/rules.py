"""The table of what is fused, read from top to bottom: the first rule that matches wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tritonparam.links import CayleyMap, Skew
from tritonparam.ops import cayley
from tritonparam.registry import Rule


def _signature(links: Sequence[nn.Module], w: Tensor) -> Any:
    if hasattr(links[1], "signature"):
        return links[1].signature
    return w.new_ones(()).expand(w.shape[:-1])  # an alias, without signs


def _skew_cayley(links: Sequence[nn.Module], w: Tensor) -> Tensor:
    return cayley.skew_cayley(w, _signature(links, w))


def _skew_cayley_declines(links: Sequence[nn.Module], w: Tensor) -> str:
    if w.dim() < 2 or w.size(-1) != w.size(-2):
        return "the original is not square"
    d = _signature(links, w)
    if d is None or d.shape != w.shape[:-1] or d.device != w.device:
        return "the map's signature does not fit the original"
    return ""


RULES = (
    Rule(
        name="cayley",
        chain=(Skew, CayleyMap),
        op=_skew_cayley,
        declines=_skew_cayley_declines,
        kernel_declines=cayley.kernel_declines,
    ),
)
