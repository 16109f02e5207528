"""Launches that many tensors share: planned once for their shapes, then only handed pointers.

What is planned is kept by the shapes alone, so that a call costs the host little more than asking
where the tensors are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, NamedTuple

import torch
import triton

from tritonparam.kernels.launch import NAME, TRITON_DTYPE, compute_dtype
from tritonparam.kernels.launch import launch as launch_one
from tritonparam.kernels.slices import dots_kernel

# Triton specializes on the integers in a tuple, whatever do_not_specialize says: a 1, and any
# multiple of 16. As multiples of 16 they are all alike, and a model's sizes compile nothing new.
UNIT = 16
_LENGTHS = (1, 4, 16)  # of the tuples, the last repeated to fill one up: few to compile
PLANS = 1024  # that are kept, of each kind
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """Launch numbers for all sizes of one dtype.

    Attributes:
        elements: in a tile.
        num_warps: for a tile of whole contiguous rows that begin at multiples of 16, or of parts
            of columns.
        more_warps: for any other; with fewer its addresses do not fit into the registers.
        max_row: the longest contiguous row that one program holds on chip; others end at
            `elements`.
        max_odd_row: the same of rows whose length is no multiple of 16.
        max_programs: over which a tensor is spread where its programs leave partial sums.
        max_tensors: in one launch.
    """

    elements: int = 4096
    num_warps: int = 4
    more_warps: int = 8
    max_row: int = 16384
    max_odd_row: int = 8192
    max_programs: int = 512
    max_tensors: int = 16


@dataclass(frozen=True)
class Blocks:
    """What tensors have in common that share a launch.

    `whole` says that a tile holds whole rows; `unit` divides the size along which memory is
    contiguous.
    """

    layout: str
    unit: int
    rows: int
    cols: int
    num_warps: int
    whole: bool


@dataclass(frozen=True)
class Member:
    """A tensor's share of a launch: its place in the lists, its sizes and its programs.

    `aligned` says that every pointer is a multiple of 16 bytes.
    """

    index: int
    blocks: Blocks
    n_rows: int
    n_cols: int
    after: int
    programs: int
    span: int
    scratch: int = 0
    count: int = 0
    aligned: bool = True


class Launch(NamedTuple):
    """A launch but for the pointers: which tensors it takes, their sizes, its programs."""

    blocks: Blocks
    taken: tuple[int, ...]
    sizes: tuple[int, ...]
    grid: tuple[int]


def default_config(dtype: torch.dtype) -> Config:
    """The default for tensors of this dtype."""
    if dtype == torch.float64:
        return Config(num_warps=8, max_row=4096, max_odd_row=64)
    return Config()


def default_of_size(n: int, dtype: torch.dtype) -> Config:
    """The default for tensors of n numbers, whatever n."""
    return default_config(dtype)


def candidates(phase: str, n: int, dtype: torch.dtype, backend: str = "cuda") -> list[Config]:
    """Configurations to measure for "fwd" or "bwd" of tensors of n numbers, the default first."""
    default = default_config(dtype)
    tiles = itertools.product((default.elements // 2, default.elements), (4, 8), (8, 16))
    others = [
        replace(default, elements=e, num_warps=w, more_warps=m)
        for e, w, m in tiles
        if w * default.max_row // e <= 16  # warps of the longest row
    ]
    others += [replace(default, max_row=n) for n in (default.elements, default.max_row // 2)]
    others.append(replace(default, max_odd_row=default.elements))
    others += [replace(default, max_programs=n) for n in (128, 256, 1024)]
    return list(dict.fromkeys([default, *others]))


def typical_shapes(n: int) -> list[Shape]:
    """Tensors of about n numbers in every layout: of a linear map, transposed, of 3 x 3 filters."""
    rows = max(isqrt(n), 1)
    cols = max(n // rows, 1)
    return [(1, rows, cols), (cols, rows, 1), (max(cols // 9, 2), rows, 9)]


def blocks(shape: Sequence[int], config: Config, *, whole: bool) -> Blocks:
    """The tile for a tensor [before, n, after]; with `whole`, of whole rows if they fit."""
    before, n, after = shape
    layout = "rows" if before == 1 else "columns" if after == 1 else "mixed"
    n_cols = before * after
    inner = {"rows": n_cols, "columns": n, "mixed": 1}[layout]
    unit = UNIT if inner % UNIT == 0 else 1
    size = config.elements
    longest = {"rows": config.max_row, "columns": 64, "mixed": size}[layout]
    odd = layout == "rows" and unit == 1
    if odd:
        longest = config.max_odd_row
    whole = whole and n_cols <= longest
    few = (layout, whole) in (("rows", True), ("columns", False)) and not odd
    warps = config.num_warps if few else config.more_warps
    if layout == "columns" or n_cols <= 64:
        rows, cols = size // 64, 64
    elif n_cols <= size // 8 or (n >= 8 and not whole):
        rows, cols = 8, size // 8
    else:
        rows, cols = 1, size
    if whole and cols < n_cols:
        cols, warps = longest, warps * longest // size
    return Blocks(layout, unit, rows, cols, warps, whole)


def member(
    index: int,
    shape: Shape,
    config: Config,
    *,
    whole: bool = False,
    scratch: int = 0,
    count: int = 0,
    aligned: bool = True,
) -> Member:
    """The share of a tensor [before, n, after].

    Each program takes one block of rows and, of rows that are not whole, a span of columns.
    """
    before, n, after = shape
    block = blocks(shape, config, whole=whole)
    n_blocks = triton.cdiv(n, block.rows)
    tiles = triton.cdiv(before * after, block.cols)
    wanted = min(tiles, max(config.max_programs // n_blocks, 1))
    span = triton.cdiv(tiles, wanted) * block.cols
    programs = n_blocks * triton.cdiv(before * after, span)
    return Member(index, block, n, before * after, after, programs, span, scratch, count, aligned)


def parts(m: Member) -> int:
    """Into how many spans a member's columns are cut."""
    return triton.cdiv(m.n_cols, m.span)


def shapes_of(xs: Iterable[torch.Tensor]) -> tuple[Shape, ...]:
    """What plans are kept by."""
    return tuple([x.shape for x in xs])


def aligned(*lists: Sequence[torch.Tensor]) -> tuple[bool, ...]:
    """Of the tensors at each place of the lists, whether all begin at a multiple of 16 bytes."""
    return tuple([not any([x.data_ptr() % 16 for x in xs]) for xs in zip(*lists, strict=True)])


def plan(members: Sequence[Member], config: Config) -> tuple[Launch, ...]:
    """As few launches as possible for members that take the same kernel.

    What is not aligned is alone: Triton compiles for every pattern of alignment in a tuple.
    """
    groups: dict[Any, list[Member]] = {}
    for m in members:
        groups.setdefault(m.blocks if m.aligned else (m.blocks, m.index), []).append(m)
    most = config.max_tensors
    return tuple(
        _launch(group[i : i + most])
        for group in groups.values()
        for i in range(0, len(group), most)
    )


def _launch(members: Sequence[Member]) -> Launch:
    block = members[0].blocks
    length = next(n for n in _LENGTHS if n >= len(members))
    filled = [members[min(i, len(members) - 1)] for i in range(length)]
    starts = list(itertools.accumulate((m.programs for m in members), initial=0))
    starts += [starts[-1]] * (length - len(members))
    sizes = starts[:length]
    row_unit = block.unit if block.layout == "columns" else 1
    col_unit = block.unit if block.layout == "rows" else 1
    sizes += [m.n_rows // row_unit for m in filled]
    sizes += [m.n_cols // col_unit for m in filled]
    sizes += [m.after for m in filled] + [m.span for m in filled]
    sizes += [m.scratch for m in filled] + [m.count for m in filled]
    multiples = tuple([UNIT * size for size in sizes])
    return Launch(block, tuple([m.index for m in filled]), multiples, (starts[-1],))


def launch(
    kernel: Any,
    planned: Sequence[Launch],
    pointers: Sequence[Sequence[torch.Tensor]],
    scratch: torch.Tensor,
    **options: Any,
) -> None:
    """The launches of kernel(*pointers, scratch, sizes, **constants).

    `pointers` has a list for every kernel argument that differs by tensor.
    """
    for block, taken, sizes, grid in planned:
        lists = [tuple([xs[i] for i in taken]) for xs in pointers]
        launch_one(kernel, grid, *lists, scratch, sizes, **constants(kernel, block), **options)


def constants(kernel: Any, block: Blocks) -> dict:
    """The constants and options of a launch."""
    values = {"LAYOUT": block.layout, "UNIT": block.unit}
    values |= {"BLOCK_ROWS": block.rows, "BLOCK_COLS": block.cols}
    if "WHOLE" in kernel.arg_names:
        values["WHOLE"] = block.whole
    return values | {"num_warps": block.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def dots(
    xs: Sequence[torch.Tensor],
    ys: Sequence[torch.Tensor],
    planned: Sequence[Launch],
    sums: torch.Tensor,
) -> None:
    """Partial sums of x y along the rows: sums[m.scratch:] is [parts(m), m.n_rows]."""
    launch(dots_kernel, planned, (xs, ys), sums, ACC=TRITON_DTYPE[sums.dtype])


def vectors(sizes: Sequence[int], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """New vectors in the compute dtype of a tensor, in one storage, each aligned."""
    rounded = [part for n in sizes for part in (n, -n % UNIT)]
    storage = torch.empty(sum(rounded), dtype=compute_dtype(like.dtype), device=like.device)
    return storage.split_with_sizes(rounded)[::2]


def shipped_row(
    kernel: Any,
    name: str,
    block: Blocks,
    dtype: torch.dtype,
    length: int,
    lists: str,
    flat: str = "",
    **options: Any,
) -> tuple:
    """One launch for compiling ahead of time, as `launch` makes it for `length` tensors.

    `lists` names the pointers that differ by tensor and `flat` those that do not; those marked
    with a star are in the compute dtype, the others in `dtype`, and flat ones always in it.
    """
    compute = compute_dtype(dtype)
    low, acc = f"*{NAME[dtype]}", f"*{NAME[compute]}"
    types: dict[str, Any] = {}
    for pointer in lists.split():
        types[pointer.rstrip("*")] = (acc if pointer.endswith("*") else low,) * length
    types |= dict.fromkeys(flat.split(), acc)
    types["sizes"] = ("i32",) * (7 * length)
    options = constants(kernel, block) | {"ACC": TRITON_DTYPE[compute]} | options
    whole = "_whole" if block.whole else ""
    where = f"{block.layout}_{block.rows}x{block.cols}{whole}_{length}_{NAME[dtype]}"
    return (f"{name}_{where}", kernel, types, options)


def dots_row(block: Blocks, dtype: torch.dtype, length: int) -> tuple:
    """The partial sums of x y, for compiling ahead of time."""
    return shipped_row(dots_kernel, "dots", block, dtype, length, "x_ptrs y_ptrs", "sums_ptr")


def shipped_shapes() -> list[tuple[torch.dtype, tuple[int, int, int], int]]:
    """Shapes, with a number of tensors, that meet nearly every tile in fp32, some in others."""
    fp32 = [(1, 64, n) for n in (27, 8191, 16384, 32768)]
    fp32 += [(1, 1, 32768), (128, 64, 1), (4096, 64, 16)]
    rows = [(torch.float32, shape, 1) for shape in fp32]
    rows += [(torch.float32, (1, 64, 32768), 16), (torch.float16, (1, 64, 500), 1)]
    rows += [(torch.bfloat16, (1, 64, 32768), 1)]
    return rows + [(torch.float64, (1, 64, n), 1) for n in (27, 4096, 32768)]
