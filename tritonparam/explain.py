"""Which path each parametrized tensor of a model takes, and why."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tritonparam import constraints, legacy, paths
from tritonparam.fuse import (
    FusedParametrizationList,
    decline_reason,
    links_of,
    originals,
    parametrized_tensors,
    require_module,
)

_WIDTH = 80


class Row(NamedTuple):
    """One parametrized tensor."""

    name: str
    chain: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str
    reason: str
    launches: tuple[int, int] | None = None
    error: float | None = None


class Explanation(Sequence[Row]):
    """The rows of ``explain(model)``, in the model's order; prints as a table of 80 columns."""

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
        reasons = list(dict.fromkeys(row.reason for row in self._rows if row.reason))
        number = {reason: f" [{i}]" for i, reason in enumerate(reasons, 1)}
        cells = [["weight", "chain", "shape", "dtype", "path"]]
        for row in self._rows:
            shape = "×".join(map(str, row.shape)) or "scalar"
            path = row.path + number.get(row.reason, "")
            dtype = str(row.dtype).removeprefix("torch.")
            cells.append([row.name, "→".join(row.chain), shape, dtype, path])
        for heading, column in (
            ("launches", ["{} + {}".format(*r.launches) if r.launches else "" for r in self]),
            ("error", ["" if r.error is None else f"{r.error:.1g}" for r in self]),
        ):
            if any(column):
                for line, cell in zip(cells, [heading, *column], strict=True):
                    line.append(cell or "–")
        lines = _columns(cells)
        if max(map(len, lines)) > _WIDTH:
            lines = _in_pairs(cells)
        for reason, label in number.items():
            label = label.strip() + " "
            indent = " " * len(label)
            lines += textwrap.wrap(label + reason, _WIDTH, subsequent_indent=indent)
        return "\n".join(lines)

    __repr__ = __str__


def _columns(cells: Sequence[Sequence[str]]) -> list[str]:
    """The cells of lines as text, padded to columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    ]


def _in_pairs(cells: Sequence[Sequence[str]]) -> list[str]:
    """Each line as two: name and chain, then the other cells in columns."""
    lines = []
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    for line, rest in zip(cells, _columns([line[2:] for line in cells]), strict=True):
        lines += textwrap.wrap("  ".join(line[:2]), _WIDTH, subsequent_indent="    ", **options)
        lines.append(f"    {rest}")
    return lines


def explain(model: nn.Module, *, errors: bool = False) -> Explanation:
    """Say for every parametrized tensor of a model which path it takes and why.

    It computes nothing, unless for `errors`, and leaves the model as it is.

    Arguments:
        model: any module.
        errors: evaluate every weight, on a copy of its chain in eval mode, and measure how far it
            is from its constraint, in fp64. It takes time, most for a spectral norm, and waits for
            a GPU; the reads count in ``stats()``.

    Returns:
        A sequence of rows, which prints as a table. A row has

        - `.name`, `.chain` (class names), `.shape` and `.dtype` (of the largest original);
        - `.path`: "kernel", "closed" or "composed", and `.reason`: why not the path before it in
          this list, and what differs from composed on purpose;
        - `.launches`: how many Triton kernels a forward and a backward pass launch, where the path
          is "kernel"; torch's own operators, there and on other paths, are not counted;
        - `.error`, with `errors`: max|QᵀQ - I| of an orthogonal weight, max|W - Wᵀ| of a symmetric
          one, with W + Wᵀ of a skew one, |σ - 1| of a spectral norm, max|‖w‖ - |g|| of a weight
          norm, max|W| under the mask of a pruned one; None of any other.

    Raises:
        TypeError: `model` is not an ``nn.Module``.

    >>> import tritonparam as tp
    >>> layer = tp.register_parametrization(nn.Linear(3, 3), "weight", tp.Skew(), tp.CayleyMap())
    >>> print(tp.explain(layer))
    weight  chain           shape  dtype    path
    weight  Skew→CayleyMap  3×3    float32  closed [1]
    [1] the original is on the cpu
    >>> tp.explain(layer, errors=True)[0].error < 1e-6
    True
    """
    require_module("explain", model)
    rows = []
    for _, name, plist in parametrized_tensors(model):
        tensors, links = originals(plist), links_of(plist)
        largest = max(tensors, key=Tensor.numel)
        path, reason, launches = "composed", decline_reason(plist), None
        if not reason:
            path, reason, launches = _fused_path(plist, tensors)
        chain = tuple(type(link).__name__ for link in links)
        error = _error(plist) if errors else None
        shape, dtype = tuple(largest.shape), largest.dtype
        rows.append(Row(name, chain, shape, dtype, path, reason, launches, error))
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


def _fused_path(
    plist: ParametrizationList, tensors: Sequence[Tensor]
) -> tuple[str, str, tuple[int, int] | None]:
    """The path of a chain that is fused at least in part, why not a better one, and launches."""
    closed, composed, differs, launches = [], [], [], []
    largest = max(tensors, key=Tensor.numel)
    for i, (rule, links, why) in enumerate(cast(FusedParametrizationList, plist).plan()):
        if rule is None:
            composed.append(f"{type(links[0]).__name__} is composed: {why}")
            continue
        xs = tensors if i == 0 else (largest,)
        declined = rule.kernel_declines(links, *xs)
        if paths.override() == "closed":
            declined = declined or "the path is set to closed"
        if declined:
            closed.append(declined)
        if difference := rule.differs(links, *xs):
            differs.append(difference)
        launches.append(None if declined or not rule.launches else rule.launches(links, *xs))
    reason = "; ".join(dict.fromkeys(closed + composed + differs))
    path = "closed" if closed else "kernel"
    known = [pair for pair in launches if pair is not None]
    if len(known) < len(launches):
        return path, reason, None
    return path, reason, (sum(f for f, _ in known), sum(b for _, b in known))


@torch.no_grad()
def _error(plist: ParametrizationList) -> float | None:
    """How far the weight is from its constraint: of a copy, so that nothing is advanced."""
    tensors = originals(plist)
    if any(x.is_meta for x in tensors):
        return None
    devices = sorted({x.device.index or 0 for x in tensors if x.is_cuda})
    with torch.random.fork_rng(devices):
        replica = copy.deepcopy(plist).eval()
        weight = replica()
    return constraints.defect(links_of(replica), tensors, weight)
