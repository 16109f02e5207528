"""Tall matrices, n x k: sums over their rows, and their products with k x k matrices, in fp64.

The Gram matrix of a tall matrix squares its condition, so that what is made of it needs fp64. Its
products of fp32 are exact there, and a GPU for computing has tensor cores for it.
"""

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
import triton.language as tl

from tritonparam.kernels import gemm
from tritonparam.kernels.launch import NAME, compute_dtype, launch

# What counts of an operand: all of it, what is below its first k rows, or, of reflectors, what is
# below the diagonal, with ones on it.
PARTS = ("all", "below", "unit")


@triton.jit
def load_part(ptr, row, col, n_rows, n_cols, stride_row, stride_col, PART: tl.constexpr):
    """One of the PARTS of a tall operand, in fp64."""
    mask = (row < n_rows) & (col < n_cols)
    if PART == "below":
        mask &= row >= n_cols
    if PART == "unit":
        mask &= row > col
    offset = row.to(tl.int64) * stride_row + col.to(tl.int64) * stride_col
    x = tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float64)
    if PART == "unit":
        x = tl.where((row == col) & (col < n_cols), 1.0, x)
    return x


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


@triton.jit
def _add_product(
    acc,
    a_ptr,
    u_ptr,
    matrix,
    row,
    col,
    n_rows,
    n_cols,
    a_stride,
    a_stride_row,
    a_stride_col,
    u_stride,
    u_stride_row,
    u_stride_col,
    PART: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + SCALE A U."""
    a_ptr += matrix * a_stride
    u_ptr += matrix * u_stride
    for k0 in range(0, n_cols, BLOCK_K):
        a_col = k0 + tl.arange(0, BLOCK_K)[None, :]
        a = load_part(a_ptr, row, a_col, n_rows, n_cols, a_stride_row, a_stride_col, PART)
        u_row = k0 + tl.arange(0, BLOCK_K)[:, None]
        u = load_part(u_ptr, u_row, col, n_cols, n_cols, u_stride_row, u_stride_col, "all")
        u *= tl.full([], SCALE, tl.float64)
        acc = tl.dot(a, u, acc=acc, input_precision="ieee", out_dtype=tl.float64)
    return acc


@triton.jit
def _combine_kernel(
    a_ptr,
    u_ptr,
    a2_ptr,
    u2_ptr,
    a3_ptr,
    u3_ptr,
    c_ptr,
    top_ptr,
    signs_ptr,
    out_ptr,
    n_rows,
    n_cols,
    a_stride,
    a_stride_row,
    a_stride_col,
    u_stride,
    u_stride_row,
    u_stride_col,
    a2_stride,
    a2_stride_row,
    a2_stride_col,
    u2_stride,
    u2_stride_row,
    u2_stride_col,
    a3_stride,
    a3_stride_row,
    a3_stride_col,
    u3_stride,
    u3_stride_row,
    u3_stride_col,
    c_stride,
    c_stride_row,
    c_stride_col,
    top_stride,
    top_stride_row,
    top_stride_col,
    PART: tl.constexpr,
    PART2: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    GAMMA: tl.constexpr,
    LOWER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = SCALE A U + A2 U2 + A3 U3 + C, plus TOP top + GAMMA I in the first n_cols rows.

    Those are then multiplied by signs. With LOWER only what is below the diagonal is kept.
    """
    n_col_tiles = tl.cdiv(n_cols, BLOCK)
    n_tiles = tl.cdiv(n_rows, BLOCK_ROWS) * n_col_tiles
    matrix = (tl.program_id(0) // n_tiles).to(tl.int64)
    index = tl.program_id(0) % n_tiles
    row = index // n_col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = index % n_col_tiles * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = (matrix, row, col, n_rows, n_cols)
    acc = tl.zeros([BLOCK_ROWS, BLOCK], tl.float64)
    strides = (a_stride, a_stride_row, a_stride_col, u_stride, u_stride_row, u_stride_col)
    acc = _add_product(acc, a_ptr, u_ptr, *at, *strides, PART, SCALE, BLOCK_K)
    if a2_ptr is not None:
        strides = (a2_stride, a2_stride_row, a2_stride_col, u2_stride, u2_stride_row, u2_stride_col)
        acc = _add_product(acc, a2_ptr, u2_ptr, *at, *strides, PART2, 1.0, BLOCK_K)
    if a3_ptr is not None:
        strides = (a3_stride, a3_stride_row, a3_stride_col, u3_stride, u3_stride_row, u3_stride_col)
        acc = _add_product(acc, a3_ptr, u3_ptr, *at, *strides, "all", 1.0, BLOCK_K)
    if c_ptr is not None:
        c_ptr += matrix * c_stride
        acc += load_part(c_ptr, row, col, n_rows, n_cols, c_stride_row, c_stride_col, "all")
    if top_ptr is not None:
        top_ptr += matrix * top_stride
        top = load_part(top_ptr, row, col, n_cols, n_cols, top_stride_row, top_stride_col, "all")
        acc += top * tl.full([], TOP, tl.float64) + tl.where(row == col, GAMMA, 0.0)
    if signs_ptr is not None:
        signs = tl.load(signs_ptr + (matrix * n_cols + row), mask=row < n_cols, other=1.0)
        acc *= signs
    if LOWER:
        acc = tl.where(row > col, acc, 0.0)
    out_ptr += matrix * n_rows * n_cols
    offset = row.to(tl.int64) * n_cols + col
    mask = (row < n_rows) & (col < n_cols)
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """Launch numbers of a tall map: of its sums and products, and of products of k x k matrices."""

    block: int
    block_rows: int
    num_warps: int
    small_block: int
    small_block_k: int
    small_num_warps: int
    small_num_stages: int

    @cached_property
    def small(self) -> gemm.Config:
        """That of the products of k x k matrices, in fp64."""
        numbers = (self.small_num_warps, self.small_num_stages)
        return gemm.Config(self.small_block, self.small_block_k, "ieee", *numbers)


def config(k: int, dtype: torch.dtype, backend: str = "cuda") -> Config:
    """The default for n x k matrices; everything is computed in fp64, whatever the dtype."""
    small = gemm.product_config(4 * k, torch.float64, backend)  # the exponential has 4k x 4k
    numbers = (small.block, small.block_k, small.num_warps, small.num_stages)
    if backend == "interpreter":  # one program after another: few and large ones
        return Config(min(max(triton.next_power_of_2(k), 16), 64), 64, 1, *numbers)
    # With 32 rows to a tile of 32 columns some sums spill, by triton 3.6 on sm_90.
    return Config(32, 16, 8, *numbers) if k <= 32 else Config(64, 32, 8, *numbers)


def candidates(phase: str, k: int, dtype: torch.dtype, backend: str = "cuda") -> list[Config]:
    """Configurations to measure for a phase of an n x k map, the default first."""
    default = config(k, dtype, backend)
    blocks = (32, 64) if k > 32 else (16, 32)
    of_tall = itertools.product(blocks, (16, 32, 64), (4, 8))
    others = [replace(default, block=b, block_rows=r, num_warps=w) for b, r, w in of_tall]
    names = ("small_block", "small_block_k", "small_num_warps")
    for numbers in itertools.product(blocks, (16, 32), (4, 8)):
        others.append(replace(default, **dict(zip(names, numbers, strict=True))))
    return list(dict.fromkeys([default, *others]))


def flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., n, k] -> [matrices, n, k], of any strides, in the compute dtype of `dtype`."""
    return x.to(compute_dtype(dtype)).reshape(-1, *x.shape[-2:])


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
        *_strides(*operands),
        **_gram_options(config, parts),
    )
    return (out[:, 0] if n_splits == 1 else out.sum(1)).unbind(1)


def combine(
    *terms: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    config: Config,
    parts: tuple[str, str] = ("all", "all"),
    scale: float = 1.0,
    c: torch.Tensor | None = None,
    top: torch.Tensor | None = None,
    alpha: float = 1.0,
    gamma: float = 0.0,
    signs: torch.Tensor | None = None,
    lower: bool = False,
) -> torch.Tensor:
    """The sum of A U over one to three terms, [matrices, n, k], contiguous, in `dtype`.

    Arguments:
        terms: A [matrices, n, k], and U [matrices, k, k] in fp64, of any strides.
        parts: of the first A, and of the second; the third counts whole.
        scale: multiplies the first term.
        c: [matrices, n, k], is added.
        top: [matrices, k, k]; to the first k rows alpha top + gamma I is added.
        signs: contiguous [matrices, k] in fp64; then multiply those rows.
        lower: keep what is below the diagonal, and write zeros for the rest.
    """
    n_matrices, n_rows, n_cols = terms[0][0].shape
    out = torch.empty((n_matrices, n_rows, n_cols), dtype=dtype, device=terms[0][0].device)
    operands = [x for term in terms for x in term] + [None] * (6 - 2 * len(terms))
    tiles = triton.cdiv(n_rows, config.block_rows) * triton.cdiv(n_cols, config.block)
    launch(
        _combine_kernel,
        (n_matrices * tiles,),
        *operands,
        c,
        top,
        signs,
        out,
        n_rows,
        n_cols,
        *_strides(*operands, c, top),
        **_combine_options(config, parts, scale, alpha, gamma, lower),
    )
    return out


def _two(xs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
    return (*xs, None)[:2]


def _strides(*xs: torch.Tensor | None) -> list[int]:
    return [stride for x in xs for stride in ((0, 0, 0) if x is None else x.stride())]


def _gram_options(config: Config, parts: tuple[str, str]) -> dict:
    options = {"PART_A": parts[0], "PART_B": parts[1]}
    return options | {"BLOCK": config.block, "BLOCK_ROWS": config.block_rows} | _launch(config)


def _combine_options(
    config: Config, parts: tuple[str, str], scale: float, alpha: float, gamma: float, lower: bool
) -> dict:
    options: dict = {"PART": parts[0], "PART2": parts[1], "SCALE": scale}
    options |= {"TOP": alpha, "GAMMA": gamma, "LOWER": lower}
    options |= {"BLOCK": config.block, "BLOCK_ROWS": config.block_rows, "BLOCK_K": 16}
    return options | _launch(config)


def _launch(config: Config) -> dict:
    return {"num_warps": config.num_warps, "num_stages": 2, "enable_fp_fusion": True}


def launches(
    label: str, dtype: torch.dtype, config: Config, *parts: tuple[str, str]
) -> list[tuple]:
    """Sums of these parts, and a product with every operand, as in `cayley.launches`."""
    name = NAME[compute_dtype(dtype)]
    rows: list[tuple] = []
    types = dict.fromkeys(("a_ptr", "a2_ptr", "b_ptr", "b2_ptr"), f"*{name}")
    for pair in parts:
        row = f"tall_gram_{'_'.join(pair)}_{label}_{name}"
        options = _gram_options(config, pair)
        if pair != ("all", "all"):  # one sum at a time, of contiguous rows as a rule
            options |= {"a2_ptr": None, "b2_ptr": None, "a_stride_col": 1, "b_stride_col": 1}
        rows.append((row, _gram_kernel, types | {"out_ptr": "*fp64"}, options))
    types = dict.fromkeys(("a_ptr", "a2_ptr", "a3_ptr", "c_ptr", "out_ptr"), f"*{name}")
    types |= dict.fromkeys(("u_ptr", "u2_ptr", "u3_ptr", "top_ptr", "signs_ptr"), "*fp64")
    options = _combine_options(config, ("unit", "below"), 2.0, 2.0, -1.0, True)
    return [*rows, (f"tall_combine_{label}_{name}", _combine_kernel, types, options)]


def shipped(backend: str) -> list[tuple]:
    """Launches of every default configuration."""
    parts = [("all", "all"), ("below", "below"), ("unit", "unit"), ("unit", "all")]
    return [
        row
        for dtype in (torch.float32, torch.float64)
        for k in (32, 64)
        for row in launches(str(k), dtype, config(k, dtype, backend), *parts)
    ]
