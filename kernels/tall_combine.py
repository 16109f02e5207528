"""Products of tall matrices with k x k matrices, summed, in fp64."""

import torch
import triton
import triton.language as tl

from tritonparam.kernels.launch import NAME, compute_dtype, launch
from tritonparam.kernels.tall import Config, config, launch_options, load_part, strides


@triton.jit
def _add_product(
    acc, a_ptr, u_ptr, at, strides, PART: tl.constexpr, SCALE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc + SCALE A U."""
    matrix, row, col, n_rows, n_cols = at
    a_stride, a_stride_row, a_stride_col, u_stride, u_stride_row, u_stride_col = strides
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
    acc = _add_product(acc, a_ptr, u_ptr, at, strides, PART, SCALE, BLOCK_K)
    if a2_ptr is not None:
        strides = (a2_stride, a2_stride_row, a2_stride_col, u2_stride, u2_stride_row, u2_stride_col)
        acc = _add_product(acc, a2_ptr, u2_ptr, at, strides, PART2, 1.0, BLOCK_K)
    if a3_ptr is not None:
        strides = (a3_stride, a3_stride_row, a3_stride_col, u3_stride, u3_stride_row, u3_stride_col)
        acc = _add_product(acc, a3_ptr, u3_ptr, at, strides, "all", 1.0, BLOCK_K)
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
        *strides(*operands, c, top),
        **_options(config, parts, scale, alpha, gamma, lower),
    )
    return out


def _options(
    config: Config, parts: tuple[str, str], scale: float, alpha: float, gamma: float, lower: bool
) -> dict:
    options: dict = {"PART": parts[0], "PART2": parts[1], "SCALE": scale}
    options |= {"TOP": alpha, "GAMMA": gamma, "LOWER": lower}
    options |= {"BLOCK": config.block, "BLOCK_ROWS": config.block_rows, "BLOCK_K": 16}
    return options | launch_options(config)


def launches(label: str, dtype: torch.dtype, config: Config) -> list[tuple]:
    """A product with every operand, as in `cayley.launches`."""
    name = NAME[compute_dtype(dtype)]
    types = dict.fromkeys(("a_ptr", "a2_ptr", "a3_ptr", "c_ptr", "out_ptr"), f"*{name}")
    types |= dict.fromkeys(("u_ptr", "u2_ptr", "u3_ptr", "top_ptr", "signs_ptr"), "*fp64")
    options = _options(config, ("unit", "below"), 2.0, 2.0, -1.0, True)
    return [(f"tall_combine_{label}_{name}", _combine_kernel, types, options)]


def shipped(backend: str) -> list[tuple]:
    """Launches of every default configuration."""
    return [
        row
        for dtype in (torch.float32, torch.float64)
        for k in (32, 64)
        for row in launches(str(k), dtype, config(k, dtype, backend))
    ]
