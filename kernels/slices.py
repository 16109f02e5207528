"""Many tensors in one launch, each read as the matrix of its slices along one dimension.

A tensor x of shape [before, n, after] is the matrix of n rows whose row i is x[:, i], of before *
after columns. Tensors that take the same code share a launch: their pointers and sizes are tuples
of kernel arguments, and a program finds its own tensor among them. So nothing is copied to the
device, a launch never waits and can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from tritonparam.kernels.launch import NAME, TRITON_DTYPE, compute_dtype

# Triton specializes on the integers in a tuple, whatever do_not_specialize says: a 1, and any
# multiple of 16. As multiples of 16 they are all alike, and a model's sizes compile nothing new.
_UNIT = 16
_LENGTHS = (1, 4, 16)  # of the tuples, the last repeated to fill one up: few to compile


@triton.jit
def pick(lists, index):
    """list[index] of each of these tuples, for an index known at run time only."""
    picked = ()
    for j in tl.static_range(len(lists)):
        x = lists[j][0]
        for i in tl.static_range(1, len(lists[j])):
            x = tl.where(index >= i, lists[j][i], x)
        picked = picked + (x,)
    return picked


@triton.jit
def locate(sizes, LAYOUT: tl.constexpr, UNIT: tl.constexpr):
    """The program's tensor, its place among that tensor's programs, and the tensor's sizes:
    rows, columns, after, the span of one program, where its scratch begins, and a count.

    `sizes` is one tuple: the first program of each tensor, the rows of each, and so on.
    """
    N: tl.constexpr = len(sizes) // 7
    program = tl.program_id(0)
    which = program * 0
    picked = ()
    for field in tl.static_range(7):
        x = sizes[field * N]
        for i in tl.static_range(1, N):
            x = tl.where(program * 16 >= sizes[i], sizes[field * N + i], x)
        picked = picked + (x // 16,)
    for i in tl.static_range(1, N):
        which += tl.where(program * 16 >= sizes[i], 1, 0)
    place = program - picked[0]
    n_rows = picked[1] * UNIT if LAYOUT == "columns" else picked[1]
    n_cols = picked[2] * UNIT if LAYOUT == "rows" else picked[2]
    scratch = picked[5].to(tl.int64)
    return which, place, n_rows, n_cols, picked[3], picked[4], scratch, picked[6]


@triton.jit
def share(sizes, LAYOUT: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """What a program takes of its tensor, where one block of rows goes to n_parts programs.

    The tensor, the block of rows, the part of the columns, the rows, and what `locate` returns
    after the place.
    """
    which, place, n_rows, n_cols, after, span, scratch, count = locate(sizes, LAYOUT, UNIT)
    n_parts = (n_cols + span - 1) // span
    block = place // n_parts
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = place % n_parts
    return which, block, part, row, n_rows, n_cols, after, span, scratch, count


@triton.jit
def tile(row, col, n_rows, n_cols, after, LAYOUT: tl.constexpr):
    """Offsets of x[p, row, q], col = p * after + q, in a contiguous [before, n_rows, after], and
    the mask: [rows, cols] for row and col in one dimension each.

    The layout is "rows" where before is 1, "columns" where after is 1, otherwise "mixed".
    """
    row = row[:, None]
    col = col[None, :]
    if LAYOUT == "rows":
        offset = row.to(tl.int64) * n_cols + col
    elif LAYOUT == "columns":
        offset = col.to(tl.int64) * n_rows + row
    else:
        offset = (col // after).to(tl.int64) * (n_rows * after) + (row * after + col % after)
    return offset, (row < n_rows) & (col < n_cols)


@triton.jit
def sum_parts(parts_ptr, n_parts, stride, row, mask, BLOCK_PARTS: tl.constexpr):
    """Sum over p < n_parts of parts[p * stride + row], in a fixed order: as `row`, [BLOCK]."""
    part = tl.arange(0, BLOCK_PARTS)[:, None]
    acc = tl.load(
        parts_ptr + (part.to(tl.int64) * stride + row[None, :]),
        mask=(part < n_parts) & mask[None, :],
        other=0.0,
    )
    for part0 in range(BLOCK_PARTS, n_parts, BLOCK_PARTS):
        p = part0 + part
        acc += tl.load(
            parts_ptr + (p.to(tl.int64) * stride + row[None, :]),
            mask=(p < n_parts) & mask[None, :],
            other=0.0,
        )
    return tl.sum(acc, axis=0)


@triton.jit
def sum_all(parts_ptr, n_parts, BLOCK_PARTS: tl.constexpr):
    """Sum of parts[:n_parts], in a fixed order."""
    part = tl.arange(0, BLOCK_PARTS)
    acc = tl.load(parts_ptr + part, mask=part < n_parts, other=0.0)
    for part0 in range(BLOCK_PARTS, n_parts, BLOCK_PARTS):
        acc += tl.load(parts_ptr + (part0 + part), mask=part0 + part < n_parts, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def square_root(x):
    """The correctly rounded root."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def quotient(x, y):
    """The correctly rounded quotient."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _dots_kernel(
    x_ptrs,
    y_ptrs,
    sums_ptr,
    sizes,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """sums[part, row] = sum of x y over the part's columns."""
    which, _, part, row, n_rows, n_cols, after, span, scratch, _ = share(
        sizes, LAYOUT, UNIT, BLOCK_ROWS
    )
    x_ptr, y_ptr = pick((x_ptrs, y_ptrs), which)
    last = tl.minimum((part + 1) * span, n_cols)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    for col0 in range(part * span, last, BLOCK_COLS):
        col = col0 + tl.arange(0, BLOCK_COLS)
        offset, mask = tile(row, col, n_rows, n_cols, after, LAYOUT)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(ACC)
        y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(ACC)
        acc += x * y
    sums_ptr += scratch + part.to(tl.int64) * n_rows
    tl.store(sums_ptr + row, tl.sum(acc, axis=1), mask=row < n_rows)


@dataclass(frozen=True)
class Config:
    """Launch numbers for all sizes of one dtype.

    Attributes:
        elements: in a tile.
        num_warps: for a tile of whole contiguous rows, or of parts of columns.
        more_warps: for any other; with fewer its addresses do not fit into the registers.
        max_row: the longest contiguous row that one program holds on chip; others end at
            `elements`.
        max_programs: over which a tensor is spread where its programs leave partial sums.
        max_tensors: in one launch.
    """

    elements: int = 4096
    num_warps: int = 4
    more_warps: int = 8
    max_row: int = 16384
    max_programs: int = 512
    max_tensors: int = 16


@dataclass(frozen=True)
class Blocks:
    """What tensors have in common that share a launch.

    `whole` says that a tile holds whole rows; `unit` divides the size along which memory is
    contiguous; `aligned` says that every pointer is a multiple of 16 bytes.
    """

    layout: str
    unit: int
    rows: int
    cols: int
    num_warps: int
    whole: bool
    aligned: bool = True


@dataclass(frozen=True)
class Member:
    """A tensor's share of a launch: its place in the lists, its sizes and its programs."""

    index: int
    blocks: Blocks
    n_rows: int
    n_cols: int
    after: int
    programs: int
    span: int
    scratch: int = 0
    count: int = 0


def default_config(dtype: torch.dtype) -> Config:
    """The default for tensors of this dtype."""
    return Config(num_warps=8, max_row=4096) if dtype == torch.float64 else Config()


def blocks(shape: Sequence[int], config: Config, *, whole: bool) -> Blocks:
    """The tile for a tensor [before, n, after]; with `whole`, of whole rows if they fit."""
    before, n, after = shape
    layout = "rows" if before == 1 else "columns" if after == 1 else "mixed"
    n_cols = before * after
    inner = {"rows": n_cols, "columns": n, "mixed": 1}[layout]
    unit = _UNIT if inner % _UNIT == 0 else 1
    size = config.elements
    longest = {"rows": config.max_row, "columns": 64, "mixed": size}[layout]
    whole = whole and n_cols <= longest
    few = (layout, whole) in (("rows", True), ("columns", False))
    warps = config.num_warps if few else config.more_warps
    if layout == "columns" or n_cols <= 64:
        rows, cols = size // 64, 64
    elif n_cols <= size // 8 or (n >= 8 and not whole):
        rows, cols = 8, size // 8
    else:
        rows, cols = 1, size
    if whole and cols < n_cols:
        cols, warps = config.max_row, warps * config.max_row // size
    return Blocks(layout, unit, rows, cols, warps, whole)


def member(
    index: int,
    xs: Sequence[torch.Tensor],
    config: Config,
    *,
    whole: bool = False,
    scratch: int = 0,
    count: int = 0,
) -> Member:
    """The share of xs[0], [before, n, after]; xs are all that the kernel gets of this tensor.

    Each program takes one block of rows and, of rows that are not whole, a span of columns.
    """
    before, n, after = xs[0].shape
    block = blocks(xs[0].shape, config, whole=whole)
    if any(x.data_ptr() % 16 for x in xs):
        block = replace(block, aligned=False)
    n_blocks = triton.cdiv(n, block.rows)
    tiles = triton.cdiv(before * after, block.cols)
    wanted = min(tiles, max(config.max_programs // n_blocks, 1))
    span = triton.cdiv(tiles, wanted) * block.cols
    programs = n_blocks * triton.cdiv(before * after, span)
    return Member(index, block, n, before * after, after, programs, span, scratch, count)


def parts(m: Member) -> int:
    """Into how many spans a member's columns are cut."""
    return triton.cdiv(m.n_cols, m.span)


def launch(
    kernel: Any,
    members: Sequence[Member],
    pointers: Sequence[Sequence[torch.Tensor]],
    arguments: Sequence[Any],
    config: Config,
    **options: Any,
) -> None:
    """As few launches as possible of kernel(*pointers, *arguments, sizes, **constants).

    `pointers` has a list for every kernel argument that differs by tensor. What is not aligned is
    alone: Triton compiles for every pattern of alignment in a tuple.
    """
    groups: dict[Any, list[Member]] = {}
    for m in members:
        key = m.blocks if m.blocks.aligned else (m.blocks, m.index)
        groups.setdefault(key, []).append(m)
    for group in groups.values():
        for i in range(0, len(group), config.max_tensors):
            _launch(kernel, group[i : i + config.max_tensors], pointers, arguments, options)


def _launch(
    kernel: Any,
    members: Sequence[Member],
    pointers: Sequence[Sequence[torch.Tensor]],
    arguments: Sequence[Any],
    options: dict,
) -> None:
    block = members[0].blocks
    length = next(n for n in _LENGTHS if n >= len(members))
    filled = [members[min(i, len(members) - 1)] for i in range(length)]
    tuples = [tuple([xs[m.index] for m in filled]) for xs in pointers]
    starts = [0]
    for m in members:
        starts.append(starts[-1] + m.programs)
    starts += [starts[-1]] * (length - len(members))
    sizes = starts[:length]
    row_unit = block.unit if block.layout == "columns" else 1
    col_unit = block.unit if block.layout == "rows" else 1
    sizes += [m.n_rows // row_unit for m in filled]
    sizes += [m.n_cols // col_unit for m in filled]
    sizes += [m.after for m in filled] + [m.span for m in filled]
    sizes += [m.scratch for m in filled] + [m.count for m in filled]
    sizes = tuple([_UNIT * size for size in sizes])
    kernel[(starts[-1],)](*tuples, *arguments, sizes, **constants(kernel, block), **options)


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
    members: Sequence[Member],
    sums: torch.Tensor,
    config: Config,
) -> None:
    """Partial sums of x y along the rows: sums[m.scratch:] is [parts(m), m.n_rows]."""
    options = {"ACC": TRITON_DTYPE[sums.dtype]}
    launch(_dots_kernel, members, (xs, ys), (sums,), config, **options)


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
    return shipped_row(_dots_kernel, "dots", block, dtype, length, "x_ptrs y_ptrs", "sums_ptr")


def shipped_shapes() -> list[tuple[torch.dtype, tuple[int, int, int], int]]:
    """Shapes, with a number of tensors, that meet nearly every tile in fp32, some in others."""
    fp32 = [(1, 64, n) for n in (32, 4096, 16384, 32768)]
    fp32 += [(1, 1, 32768), (128, 64, 1), (4096, 64, 16)]
    rows = [(torch.float32, shape, 1) for shape in fp32]
    rows += [(torch.float32, (1, 64, 32768), 16), (torch.float16, (1, 64, 512), 1)]
    rows += [(torch.bfloat16, (1, 64, 32768), 1)]
    return rows + [(torch.float64, (1, 64, n), 1) for n in (4096, 32768)]
