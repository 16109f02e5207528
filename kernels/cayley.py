"""Cayley map of a batch of small matrices, n <= 64, and its gradient, one launch each.

The kernels of the forward are those of `gauss_jordan`.
"""

import itertools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from tritonparam.kernels.gauss_jordan import cayley_fwd_kernel, cayley_fwd_tile_kernel
from tritonparam.kernels.launch import (
    NAME,
    TRITON_DTYPE,
    compute_dtype,
    flatten,
    launch,
    packing,
    slot,
)
from tritonparam.kernels.tile import places, product


@triton.jit(
    do_not_specialize=["n_cols", "g_stride", "g_stride_row", "d_stride"],
    do_not_specialize_on_alignment=["g_ptr", "q_ptr", "d_ptr", "dw_ptr"],
)
def _cayley_bwd_kernel(
    g_ptr,
    q_ptr,
    d_ptr,
    dw_ptr,
    n_cols,
    g_stride,
    g_stride_row,
    d_stride,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """dw = triu(Z - Z^T, 1) / 2 with Z = D P^T G P^T, P = Q + D, D = diag(d).

    With C = Q D, the Cayley matrix itself, this is Z = (I + C)^T (G D) (I + C)^T. The sum over
    the rows of G runs in slices of BLOCK_K, so that neither G nor G P^T is held whole.
    """
    matrix = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_COLS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < n_cols) & (col < n_cols)
    g_ptr += matrix * g_stride
    q_ptr += matrix * n_cols * n_cols
    d_ptr += matrix * d_stride
    d_row = tl.load(d_ptr + row, mask=row < n_cols, other=0.0).to(ACC)
    d_col = tl.load(d_ptr + col, mask=col < n_cols, other=0.0).to(ACC)
    z = tl.zeros([BLOCK_COLS, BLOCK_COLS], ACC)
    for k0 in range(0, n_cols, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        t = tl.zeros([BLOCK_K, BLOCK_COLS], ACC)  # rows k of G P^T
        for j0 in range(0, n_cols, BLOCK_K):
            j = j0 + tl.arange(0, BLOCK_K)[None, :]
            g = tl.load(
                g_ptr + (k.to(tl.int64) * g_stride_row + j),
                mask=(k < n_cols) & (j < n_cols),
                other=0.0,
            )
            p = tl.load(q_ptr + (row * n_cols + j), mask=(row < n_cols) & (j < n_cols), other=0.0)
            p += tl.where(row == j, d_row, 0.0)
            t = tl.dot(g, tl.trans(p), acc=t, input_precision=PRECISION, out_dtype=ACC)
        inside = (k < n_cols) & (col < n_cols)
        p_k = tl.load(q_ptr + (k * n_cols + col), mask=inside, other=0.0)
        p_k += tl.where(k == col, d_col, 0.0)
        z = tl.dot(tl.trans(p_k), t, acc=z, input_precision=PRECISION, out_dtype=ACC)
    z *= d_row
    dw = tl.where(row < col, 0.5 * (z - tl.trans(z)), 0.0)
    offset = matrix * n_cols * n_cols + (row * n_cols + col)
    tl.store(dw_ptr + offset, dw.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("n_matrices", "n_cols", "g_stride", "g_stride_row", "g_stride_col", "d_stride"),
    ],
    do_not_specialize_on_alignment=["g_ptr", "q_ptr", "d_ptr", "dw_ptr"],
)
def _cayley_bwd_small_kernel(
    g_ptr,
    q_ptr,
    d_ptr,
    dw_ptr,
    n_matrices,
    n_cols,
    g_stride,
    g_stride_row,
    g_stride_col,
    d_stride,
    BLOCK: tl.constexpr,
    SLOT: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same for n <= 16, whole, of as many matrices as fit on the diagonals of the tiles."""
    matrix, row, col, same, diagonal, mask = places(n_matrices, n_cols, BLOCK, SLOT, TILES)
    d_mask = (row * 0 + matrix < n_matrices) & (row < n_cols)  # a tensor where matrix is none
    q_offset = matrix * n_cols * n_cols + (row * n_cols + col)
    p = tl.load(q_ptr + q_offset, mask=mask, other=0.0)
    d = tl.load(d_ptr + matrix * d_stride + row, mask=d_mask, other=0.0).to(p.dtype)
    p += tl.where(diagonal, d, 0.0)
    g_offset = row.to(tl.int64) * g_stride_row + col.to(tl.int64) * g_stride_col
    g = tl.load(g_ptr + matrix * g_stride + g_offset, mask=mask, other=0.0)
    t = product(g, tl.trans(p), same, SLOT, PRECISION)
    z = product(tl.trans(p), t, same, SLOT, PRECISION) * d
    dw = tl.where(row < col, 0.5 * (z - tl.trans(z)), 0.0)
    tl.store(dw_ptr + q_offset, dw.to(dw_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class FwdConfig:
    """Launch numbers of the forward; with more than one warp it is the tile kernel that runs."""

    block_cols: int
    block_lanes: int
    block_matrices: int
    num_warps: int = 1
    maxnreg: int | None = None


@dataclass(frozen=True)
class BwdConfig:
    """Launch numbers of the backward; `block_k` is that of n > 16, `block_matrices` of n <= 16."""

    block_cols: int
    block_k: int
    precision: str
    num_warps: int = 1
    maxnreg: int | None = None
    block_matrices: int = 1


def fwd_config(n: int, dtype: torch.dtype, backend: str = "cuda") -> FwdConfig:
    """The default for n x n matrices: one warp, and as many matrices as fill its lanes."""
    warp = 64 if backend == "hip" else 32
    cols = max(8, triton.next_power_of_2(n))
    if cols > warp and dtype == torch.float64:
        return FwdConfig(cols, cols, 1, num_warps=8)
    lanes = min(cols, warp)
    return FwdConfig(cols, lanes, warp // lanes)


def bwd_config(n: int, dtype: torch.dtype, backend: str = "cuda") -> BwdConfig:
    """The default for n x n matrices; `tl.dot` starts at 16, and hip does not compile tf32x3."""
    cols = max(16, triton.next_power_of_2(n))
    if cols == 16:
        wide = dtype == torch.float64 or backend == "hip"
        precision = "ieee" if wide else "tf32x3"
        return BwdConfig(cols, cols, precision, block_matrices=cols // slot(n))
    if dtype == torch.float64:
        num_warps = {32: 2, 64: 8}[cols]
        maxnreg = 192 if cols == 64 and backend == "cuda" else None
        return BwdConfig(cols, 16, "ieee", num_warps, maxnreg)
    precision = "ieee" if backend == "hip" else "tf32x3"
    return BwdConfig(cols, 16, precision, num_warps=4 if cols == 64 else 1)


def candidates(phase: str, n: int, dtype: torch.dtype, backend: str = "cuda") -> list:
    """Configurations to measure for "fwd" or "bwd" of n x n matrices, the default first."""
    if phase == "fwd":
        default = fwd_config(n, dtype, backend)
        others = [replace(default, block_matrices=1)]
        if default.num_warps == 1:
            others.append(replace(default, block_matrices=2 * default.block_matrices))
        cols = default.block_cols
        others += [FwdConfig(cols, cols, 1, num_warps=warps) for warps in (2, 4, 8) if cols >= 32]
        registers = (128, 168) if default.num_warps == 1 and cols == 64 else ()
    else:
        default = bwd_config(n, dtype, backend)
        depths = [k for k in (16, 32, 64) if k <= default.block_cols]
        numbers = itertools.product(depths, (1, 2, 4, 8))
        others = [replace(default, block_k=k, num_warps=warps) for k, warps in numbers]
        others.append(replace(default, block_matrices=1))
        registers = (128, 168, 192) if default.block_cols == 64 else ()
    if backend == "cuda":
        others += [replace(default, maxnreg=maxnreg) for maxnreg in registers]
    return list(dict.fromkeys([default, *others]))


def cayley_fwd(w: torch.Tensor, signature: torch.Tensor, config: FwdConfig) -> torch.Tensor:
    """Q = (I + X)(I - X)^{-1} diag(signature), X = triu(w, 1) - triu(w, 1)^T.

    `w` is [..., n, n] and `signature` [..., n], of any strides. Q is new and contiguous, in the
    compute dtype `torch.promote_types(w.dtype, torch.float32)`.
    """
    q = torch.empty(w.shape, dtype=compute_dtype(w.dtype), device=w.device)
    if q.numel() == 0:
        return q
    w, d = flatten(w, 2), flatten(signature, 1)
    n_matrices, n_cols, _ = w.shape
    strides = (w.stride(0), w.stride(1), d.stride(0))
    options = _fwd_options(config, q.dtype)
    if config.num_warps == 1:
        grid = (triton.cdiv(n_matrices, config.block_matrices),)
        launch(cayley_fwd_kernel, grid, w, d, q, n_matrices, n_cols, *strides, **options)
    else:
        launch(cayley_fwd_tile_kernel, (n_matrices,), w, d, q, n_cols, *strides, **options)
    return q


def cayley_bwd(
    g: torch.Tensor,
    q: torch.Tensor,
    signature: torch.Tensor,
    dtype: torch.dtype,
    config: BwdConfig,
) -> torch.Tensor:
    """The gradient of w from `g`, that of Q, both [..., n, n] in the compute dtype.

    `q` is what `cayley_fwd` returned; the result is new and contiguous, in `dtype`.
    """
    dw = torch.empty(q.shape, dtype=dtype, device=q.device)
    if dw.numel() == 0:
        return dw
    q, d = q.contiguous(), flatten(signature, 1)
    options = _bwd_options(config, q.dtype, q.size(-1))
    if config.block_cols == 16:
        g = g.reshape(-1, *g.shape[-2:])
        grid = (triton.cdiv(g.size(0), config.block_matrices),)
        sizes = (*g.shape[:2], *g.stride(), d.stride(0))
        launch(_cayley_bwd_small_kernel, grid, g, q, d, dw, *sizes, **options)
        return dw
    g = flatten(g, 2)
    n_matrices, n_cols, _ = g.shape
    strides = (g.stride(0), g.stride(1), d.stride(0))
    launch(_cayley_bwd_kernel, (n_matrices,), g, q, d, dw, n_cols, *strides, **options)
    return dw


def n_launches(config: FwdConfig) -> tuple[int, int]:
    """Of `cayley_fwd` with this configuration, and of `cayley_bwd`."""
    return 1, 1


def _fwd_options(config: FwdConfig, dtype: torch.dtype) -> dict:
    options = {"BLOCK_COLS": config.block_cols, "ACC": TRITON_DTYPE[dtype]}
    if config.num_warps == 1:
        options |= {"BLOCK_LANES": config.block_lanes, "BLOCK_MATRICES": config.block_matrices}
    return options | _launch_options(config)


def _bwd_options(config: BwdConfig, dtype: torch.dtype, n: int) -> dict:
    if config.block_cols == 16:
        options = {"BLOCK": 16, "PRECISION": config.precision}
        return options | packing(n, 16, config.block_matrices) | _launch_options(config)
    options = {"BLOCK_COLS": config.block_cols, "BLOCK_K": config.block_k}
    options |= {"PRECISION": config.precision, "ACC": TRITON_DTYPE[dtype]}
    return options | _launch_options(config)


def _launch_options(config: FwdConfig | BwdConfig) -> dict:
    # One stage: copies in flight cost registers and shared memory, and other programs hide them.
    options = {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg  # hip has no such option
    return options


def launches(
    phase: str, chain: str, n: int, dtype: torch.dtype, config: FwdConfig | BwdConfig
) -> list:
    """What a phase launches with a configuration, for compiling ahead of time.

    Rows (name, kernel, types of the pointers, constants and options), as the launchers above
    pass them; integers are i32.
    """
    name, compute = NAME[dtype], compute_dtype(dtype)
    low, acc = f"*{name}", f"*{NAME[compute]}"
    row = f"cayley_{phase}_{n}_{name}"
    if phase == "bwd":
        types = {"g_ptr": acc, "q_ptr": acc, "d_ptr": low, "dw_ptr": low}
        kernel = _cayley_bwd_small_kernel if config.block_cols == 16 else _cayley_bwd_kernel
        return [(row, kernel, types, _bwd_options(config, compute, n))]
    kernel = cayley_fwd_kernel if config.num_warps == 1 else cayley_fwd_tile_kernel
    types = {"w_ptr": low, "d_ptr": low, "q_ptr": acc}
    return [(row, kernel, types, _fwd_options(config, compute))]


def shipped(backend: str) -> list[tuple]:
    """Every default launch, for compiling ahead of time, as `launches`."""
    rows: list[tuple] = []
    for dtype in NAME:
        for n in (8, 16, 32, 64):
            rows += launches("fwd", "cayley", n, dtype, fwd_config(n, dtype, backend))
        for n in (4, 8, 16, 32, 64):
            rows += launches("bwd", "cayley", n, dtype, bwd_config(n, dtype, backend))
    return rows
