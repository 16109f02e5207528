"""Many tensors in one launch, each read as the matrix of its slices along one dimension.

A tensor x of shape [before, n, after] is the matrix of n rows whose row i is x[:, i], of before *
after columns. Tensors that take the same code share a launch: their pointers and sizes are tuples
of kernel arguments, and a program finds its own tensor among them. So nothing is copied to the
device, a launch never waits and can be captured.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def dots_kernel(
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
