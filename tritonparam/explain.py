"""Which path each parametrized tensor of a model takes, and why."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast, overload

import torch
from torch import nn

from tritonparam import legacy, registry
from tritonparam.fuse import (
    FusedParametrizationList,
    decline_reason,
    originals,
    parametrized_tensors,
)


class Row(NamedTuple):
    """One parametrized tensor."""

    name: str
    chain: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str
    reason: str


class Explanation(Sequence[Row]):
    """The rows of ``explain(model)``, in the model's order; prints as a table."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:  # noqa: D105
        return self._rows[index]

    def __len__(self) -> int:  # noqa: D105
        return len(self._rows)

    def __str__(self) -> str:  # noqa: D105
        if not self._rows:
            return "no parametrized tensors"
        lines = []
        cells = [("weight", "chain", "shape", "dtype", "path")]
        for row in self._rows:
            shape = "×".join(map(str, row.shape)) or "scalar"
            dtype = str(row.dtype).removeprefix("torch.")
            cells.append((row.name, "→".join(row.chain), shape, dtype, row.path))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for cell, reason in zip(cells, ["", *(row.reason for row in self._rows)], strict=True):
            lines.append("  ".join(c.ljust(w) for c, w in zip(cell, widths, strict=True)).rstrip())
            if reason:
                lines += textwrap.wrap(reason, 78, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(lines)

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """Say for every parametrized tensor of a model which path it takes and why. Computes nothing.

    Arguments:
        model: any module.

    Returns:
        A sequence of rows with `.name`, `.chain` (class names), `.shape` and `.dtype` (of the
        largest original), `.path` ("kernel", "closed" or "composed") and `.reason` (why not the
        path before it in this list; empty for "kernel"). It prints as a table.

    >>> import tritonparam as tp
    >>> layer = tp.register_parametrization(nn.Linear(3, 3), "weight", tp.Skew(), tp.CayleyMap())
    >>> print(tp.explain(layer))
    weight  chain           shape  dtype    path
    weight  Skew→CayleyMap  3×3    float32  closed
        the original is on the cpu
    """
    rows = []
    for _, name, plist in parametrized_tensors(model):
        tensors = originals(plist)
        largest = max(tensors, key=torch.Tensor.numel)
        path, reason = "composed", decline_reason(plist)
        if not reason:
            path, reason = _fused_path(cast(FusedParametrizationList, plist).plan(), tensors)
        chain = tuple(type(link).__name__ for link in plist._modules.values())
        rows.append(Row(name, chain, tuple(largest.shape), largest.dtype, path, reason))
    return Explanation([*rows, *_legacy(model)])


def _legacy(model: nn.Module) -> Iterator[Row]:
    """The weights that torch's legacy hooks compute."""
    for module, name, hook in legacy.hooks(model):
        x, norm = legacy.original(module, hook), type(hook).__name__
        if x is not None:
            call = type(hook).__module__
            reason = (
                f"not parametrized: a hook of the legacy {call} computes it; "
                "fuse(model, legacy=True) converts it"
            )
            yield Row(name, (norm,), tuple(x.shape), x.dtype, "composed", reason)


def _fused_path(steps: list[registry.Step], tensors: Sequence[torch.Tensor]) -> tuple[str, str]:
    """The path of a chain that is fused at least in part, and why not a better one."""
    closed, composed = [], []
    largest = max(tensors, key=torch.Tensor.numel)
    for i, (rule, links, why) in enumerate(steps):
        if rule is None:
            composed.append(f"{type(links[0]).__name__} is composed: {why}")
            continue
        declined = rule.kernel_declines(links, *(tensors if i == 0 else (largest,)))
        if registry.override() == "closed":
            declined = declined or "the path is set to closed"
        if declined:
            closed.append(declined)
    return ("closed" if closed else "kernel"), "; ".join(dict.fromkeys(closed + composed))
