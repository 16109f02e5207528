"""Sums over the rows of tall matrices, A^T B, in fp64."""

import torch
import triton
import triton.language as tl

from tritonparam.kernels.launch import NAME, compute_dtype, launch
from tritonparam.kernels.tall import Config, config, launch_options, load_part, strides


@triton.jit
def _gram_kernel(
    a_ptr,
    a2_ptr,
    b_ptr,
    b2_ptr,
    out_ptr,
    n_rows,
    n_cols,
    n_splits,
    split_rows,
    a_stride,
    a_stride_row,
    a_stride_col,
    a2_stride,
    a2_stride_row,
    a2_stride_col,
    b_stride,
    b_stride_row,
    b_stride_col,
    b2_stride,
    b2_stride_row,
    b2_stride_col,
    PART_A: tl.constexpr,
    PART_B: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One tile of A^T B over split_rows rows; A is a or a2, B is b or b2, in every pair.

    out is [matrices, splits, pairs, n_cols, n_cols], the pair of a with b first, then a with b2.
    """
    n_tiles = tl.cdiv(n_cols, BLOCK)
    N_RIGHT: tl.constexpr = 1 if b2_ptr is None else 2
    N_PAIRS: tl.constexpr = N_RIGHT if a2_ptr is None else 2 * N_RIGHT
    index = tl.program_id(0)
    i = index % n_tiles * BLOCK + tl.arange(0, BLOCK)[None, :]
    j = index // n_tiles % n_tiles * BLOCK + tl.arange(0, BLOCK)[None, :]
    index = index // (n_tiles * n_tiles)
    pair = index % N_PAIRS
    split = index // N_PAIRS % n_splits
    matrix = (index // (N_PAIRS * n_splits)).to(tl.int64)
    a_ptr += matrix * a_stride
    b_ptr += matrix * b_stride
    if a2_ptr is not None:
        second = pair >= N_RIGHT
        a_ptr = tl.where(second, a2_ptr + matrix * a2_stride, a_ptr)
        a_stride_row = tl.where(second, a2_stride_row, a_stride_row)
        a_stride_col = tl.where(second, a2_stride_col, a_stride_col)
    if b2_ptr is not None:
        second = pair % 2 == 1
        b_ptr = tl.where(second, b2_ptr + matrix * b2_stride, b_ptr)
        b_stride_row = tl.where(second, b2_stride_row, b_stride_row)
        b_stride_col = tl.where(second, b2_stride_col, b_stride_col)
    end = tl.minimum((split + 1) * split_rows, n_rows)
    acc = tl.zeros([BLOCK, BLOCK], tl.float64)
    for row0 in range(split * split_rows, end, BLOCK_ROWS):
        row = row0 + tl.arange(0, BLOCK_ROWS)[:, None]
        a = load_part(a_ptr, row, i, end, n_cols, a_stride_row, a_stride_col, PART_A)
        b = load_part(b_ptr, row, j, end, n_cols, b_stride_row, b_stride_col, PART_B)
        acc = tl.dot(tl.trans(a), b, acc=acc, input_precision="ieee", out_dtype=tl.float64)
    i = tl.trans(i)
    out_ptr += index.to(tl.int64) * n_cols * n_cols
    tl.store(out_ptr + (i * n_cols + j), acc, mask=(i < n_cols) & (j < n_cols))


_PROGRAMS = 128  # that a sum over rows is split into, of no fewer rows than one tile has each
_MIN_ROWS = 64


def gram(
    lefts: tuple[torch.Tensor, ...],
    rights: tuple[torch.Tensor, ...],
    config: Config,
    *,
    parts: tuple[str, str] = ("all", "all"),
) -> tuple[torch.Tensor, ...]:
    """A^T B in fp64, [matrices, k, k], for every A of lefts, with every B of rights.

    One or two of each, [matrices, n, k] of any strides, `parts` of which count. The rows are split
    among programs, and their sums are added in a fixed order.
    """
    n_matrices, n_rows, n_cols = lefts[0].shape
    n_pairs = len(lefts) * len(rights)
    n_splits = max(1, min(triton.cdiv(n_rows, _MIN_ROWS), _PROGRAMS // n_matrices))
    split_rows = triton.cdiv(triton.cdiv(n_rows, n_splits), config.block_rows) * config.block_rows
    n_splits = triton.cdiv(n_rows, split_rows)
    shape = (n_matrices, n_splits, n_pairs, n_cols, n_cols)
    out = torch.empty(shape, dtype=torch.float64, device=lefts[0].device)
    operands = (*_two(lefts), *_two(rights))
    grid = (n_matrices * n_splits * n_pairs * triton.cdiv(n_cols, config.block) ** 2,)
    launch(
        _gram_kernel,
        grid,
        *operands,
        out,
        n_rows,
        n_cols,
        n_splits,
        split_rows,
        *strides(*operands),
        **_options(config, parts),
    )
    return (out[:, 0] if n_splits == 1 else out.sum(1)).unbind(1)


def _two(xs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
    return (*xs, None)[:2]


def _options(config: Config, parts: tuple[str, str]) -> dict:
    options = {"PART_A": parts[0], "PART_B": parts[1]}
    options |= {"BLOCK": config.block, "BLOCK_ROWS": config.block_rows}
    return options | launch_options(config)


def launches(
    label: str, dtype: torch.dtype, config: Config, *parts: tuple[str, str]
) -> list[tuple]:
    """Sums of these parts, as in `cayley.launches`."""
    name = NAME[compute_dtype(dtype)]
    rows: list[tuple] = []
    types = dict.fromkeys(("a_ptr", "a2_ptr", "b_ptr", "b2_ptr"), f"*{name}")
    for pair in parts:
        row = f"tall_gram_{'_'.join(pair)}_{label}_{name}"
        options = _options(config, pair)
        if pair != ("all", "all"):  # one sum at a time, of contiguous rows as a rule
            options |= {"a2_ptr": None, "b2_ptr": None, "a_stride_col": 1, "b_stride_col": 1}
        rows.append((row, _gram_kernel, types | {"out_ptr": "*fp64"}, options))
    return rows


def shipped(backend: str) -> list[tuple]:
    """Launches of every default configuration."""
    parts = [("all", "all"), ("below", "below"), ("unit", "unit"), ("unit", "all")]
    return [
        row
        for dtype in (torch.float32, torch.float64)
        for k in (32, 64)
        for row in launches(str(k), dtype, config(k, dtype, backend), *parts)
    ]
