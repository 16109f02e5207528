"""Weight norm of many tensors and its gradient: a launch each, two where rows are long."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from tritonparam.kernels.grouped import (
    PLANS,
    Blocks,
    Config,
    Launch,
    Shape,
    aligned,
    blocks,
    default_config,
    dots,
    dots_row,
    launch,
    member,
    parts,
    plan,
    shapes_of,
    shipped_row,
    shipped_shapes,
    typical_shapes,
    vectors,
)
from tritonparam.kernels.grouped import candidates as candidates
from tritonparam.kernels.grouped import default_of_size as default_of_size
from tritonparam.kernels.launch import TRITON_DTYPE
from tritonparam.kernels.slices import (
    pick,
    quotient,
    share,
    square_root,
    sum_parts,
    tile,
)


@triton.jit
def _weight_norm_fwd_kernel(
    g_ptrs,
    v_ptrs,
    w_ptrs,
    norm_ptrs,
    sums_ptr,
    sizes,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):
    """w = g v/||v|| by rows, as torch's _weight_norm; a norm of 0 is stored as infinity.

    Rows that are not whole in a tile come with the partial sums of v v.
    """
    which, _, part, row, n_rows, n_cols, after, span, scratch, _ = share(
        sizes, LAYOUT, UNIT, BLOCK_ROWS
    )
    n_parts = (n_cols + span - 1) // span
    inside = row < n_rows
    g_ptr, v_ptr, w_ptr, norm_ptr = pick((g_ptrs, v_ptrs, w_ptrs, norm_ptrs), which)
    if WHOLE:
        offset, mask = tile(row, tl.arange(0, BLOCK_COLS), n_rows, n_cols, after, LAYOUT)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(ACC)  # [BLOCK_ROWS, BLOCK_COLS]
        square = tl.sum(v * v, axis=1)
    else:
        square = sum_parts(sums_ptr + scratch, n_parts, n_rows, row, inside, 16)
    norm = square_root(square)
    norm = tl.where(norm == 0.0, float("inf"), norm)
    g = tl.load(g_ptr + row, mask=inside, other=0.0).to(ACC)
    scale = quotient(g, norm)[:, None]
    tl.store(norm_ptr + row, norm, mask=inside & (row * 0 + part == 0))
    if WHOLE:
        tl.store(w_ptr + offset, (v * scale).to(w_ptr.dtype.element_ty), mask=mask)
    else:
        for col0 in range(part * span, tl.minimum((part + 1) * span, n_cols), BLOCK_COLS):
            col = col0 + tl.arange(0, BLOCK_COLS)
            offset, mask = tile(row, col, n_rows, n_cols, after, LAYOUT)
            v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(ACC)
            tl.store(w_ptr + offset, (v * scale).to(w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_norm_bwd_kernel(
    dw_ptrs,
    g_ptrs,
    v_ptrs,
    norm_ptrs,
    dg_ptrs,
    dv_ptrs,
    sums_ptr,
    sizes,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):
    """dg = <dw, v>/||v||,  dv = g/||v|| (dw - dg v/||v||) by rows.

    Rows that are not whole in a tile come with the partial sums of dw v.
    """
    which, _, part, row, n_rows, n_cols, after, span, scratch, _ = share(
        sizes, LAYOUT, UNIT, BLOCK_ROWS
    )
    n_parts = (n_cols + span - 1) // span
    inside = row < n_rows
    dw_ptr, g_ptr, v_ptr = pick((dw_ptrs, g_ptrs, v_ptrs), which)
    norm_ptr, dg_ptr, dv_ptr = pick((norm_ptrs, dg_ptrs, dv_ptrs), which)
    if WHOLE:
        offset, mask = tile(row, tl.arange(0, BLOCK_COLS), n_rows, n_cols, after, LAYOUT)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(ACC)  # [BLOCK_ROWS, BLOCK_COLS]
        dw = tl.load(dw_ptr + offset, mask=mask, other=0.0).to(ACC)
        dot = tl.sum(dw * v, axis=1)
    else:
        dot = sum_parts(sums_ptr + scratch, n_parts, n_rows, row, inside, 16)
    g = tl.load(g_ptr + row, mask=inside, other=0.0).to(ACC)
    norm = tl.load(norm_ptr + row, mask=inside, other=1.0)
    dg = quotient(dot, norm)
    scale = quotient(g, norm)
    slope = quotient(scale * dg, norm)[:, None]
    scale = scale[:, None]
    first = inside & (row * 0 + part == 0)
    tl.store(dg_ptr + row, dg.to(dg_ptr.dtype.element_ty), mask=first)
    if WHOLE:
        dv = dw * scale - v * slope
        tl.store(dv_ptr + offset, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    else:
        for col0 in range(part * span, tl.minimum((part + 1) * span, n_cols), BLOCK_COLS):
            col = col0 + tl.arange(0, BLOCK_COLS)
            offset, mask = tile(row, col, n_rows, n_cols, after, LAYOUT)
            v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(ACC)
            dw = tl.load(dw_ptr + offset, mask=mask, other=0.0).to(ACC)
            dv = dw * scale - v * slope
            tl.store(dv_ptr + offset, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def weight_norm_fwd(
    gs: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    dtype: torch.dtype,
    config: Config,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(w, norm) of every pair: w = g v/||v||, one norm for every index of the middle dimension.

    A v is [before, n, after] and its g has n entries, all of one dtype and none empty. w is new
    and contiguous, in `dtype`; norm is [n] in the compute dtype, infinite where it is 0.
    """
    vs = [v.contiguous() for v in vs]
    gs = [g.contiguous() for g in gs]
    ws = [torch.empty(v.shape, dtype=dtype, device=v.device) for v in vs]
    norms = vectors([v.size(1) for v in vs], vs[0])
    planned, long, size = _plan(shapes_of(vs), aligned(gs, vs), config)
    sums = torch.empty(size, dtype=norms[0].dtype, device=vs[0].device)
    dots(vs, vs, long, sums)
    lists = (gs, vs, ws, norms)
    launch(_weight_norm_fwd_kernel, planned, lists, sums, ACC=TRITON_DTYPE[sums.dtype])
    return list(zip(ws, norms, strict=True))


def weight_norm_bwd(
    dws: Sequence[torch.Tensor],
    gs: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    config: Config,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(dg, dv) of every weight, from dw of v's shape and the norms that the forward returned.

    Both are new and contiguous, in the dtype of v; dg is [n].
    """
    dws = [dw.contiguous() for dw in dws]
    vs = [v.contiguous() for v in vs]
    gs = [g.contiguous() for g in gs]
    dgs = [torch.empty(v.size(1), dtype=v.dtype, device=v.device) for v in vs]
    dvs = [torch.empty_like(v) for v in vs]
    planned, long, size = _plan(shapes_of(vs), aligned(dws, gs, vs, norms), config)
    sums = torch.empty(size, dtype=norms[0].dtype, device=vs[0].device)
    dots(dws, vs, long, sums)
    lists = (dws, gs, vs, norms, dgs, dvs)
    launch(_weight_norm_bwd_kernel, planned, lists, sums, ACC=TRITON_DTYPE[sums.dtype])
    return list(zip(dgs, dvs, strict=True))


def n_launches(shape: Shape, config: Config) -> int:
    """Of `weight_norm_fwd`, and of `weight_norm_bwd`, for one tensor [before, n, after]."""
    return 1 if blocks(shape, config, whole=True).whole else 2


@lru_cache(PLANS)
def _plan(
    shapes: tuple[Shape, ...], whether_aligned: tuple[bool, ...], config: Config
) -> tuple[tuple[Launch, ...], tuple[Launch, ...], int]:
    """The launches for all, those of the partial sums of long rows, and how many sums there are."""
    members, size = [], 0
    for i, shape in enumerate(shapes):
        m = member(i, shape, config, whole=True, scratch=size, aligned=whether_aligned[i])
        size += 0 if m.blocks.whole else parts(m) * m.n_rows
        members.append(m)
    long = [m for m in members if not m.blocks.whole]
    return plan(members, config), plan(long, config), max(size, 1)


def launches(phase: str, chain: str, n: int, dtype: torch.dtype, config: Config) -> list[tuple]:
    """What a phase launches for tensors of n numbers, in every layout, compiled ahead of time."""
    rows = []
    for shape in typical_shapes(n):
        block = blocks(shape, config, whole=True)
        rows.append(_row(phase, block, dtype, 1))
        if not block.whole:
            rows.append(dots_row(block, dtype, 1))
    return rows


def _row(phase: str, block: Blocks, dtype: torch.dtype, length: int) -> tuple:
    kernel, lists = {
        "fwd": (_weight_norm_fwd_kernel, "g_ptrs v_ptrs w_ptrs norm_ptrs*"),
        "bwd": (_weight_norm_bwd_kernel, "dw_ptrs g_ptrs v_ptrs norm_ptrs* dg_ptrs dv_ptrs"),
    }[phase]
    return shipped_row(kernel, f"weight_norm_{phase}", block, dtype, length, lists, "sums_ptr")


def shipped(backend: str) -> list[tuple]:
    """What compiles ahead of time: one tensor in every tile, and a group."""
    rows = []
    for dtype, shape, length in shipped_shapes():
        block = blocks(shape, default_config(dtype), whole=True)
        rows += [_row(phase, block, dtype, length) for phase in ("fwd", "bwd")]
        if not block.whole:
            rows.append(dots_row(block, dtype, length))
    return rows
