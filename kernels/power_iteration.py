"""Power iteration of many tensors: one read of W for each, two launches.

A program that holds row i of W on chip for t_i = W_i v adds t_i W_i to its part of W^T t at once.
The parts of all programs are added up by a second small kernel, not by whichever program happens
to arrive last: that program would add up megabytes alone, and the counter that finds it would have
to be cleared between overlapping streams and the replays of a graph. Sums are in a fixed order
throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tritonparam.kernels.grouped import (
    PLANS,
    Blocks,
    Config,
    Launch,
    Member,
    Shape,
    aligned,
    blocks,
    launch,
    member,
    plan,
    shapes_of,
)
from tritonparam.kernels.launch import TRITON_DTYPE, compute_dtype
from tritonparam.kernels.slices import (
    locate,
    pick,
    quotient,
    square_root,
    sum_all,
    sum_parts,
    tile,
)

BLOCK_Q = 64  # columns of W^T t for one program of the second kernel


@triton.jit
def clamped_root(square, EPS: tl.constexpr, ACC: tl.constexpr):
    """max(sqrt(square), EPS), NaN where it is NaN."""
    norm = square_root(square)
    eps = tl.full([], EPS, ACC)
    return tl.where(norm < eps, eps, norm)


@triton.jit
def places(scratch_ptr, n_rows, n_cols, n_parts, BLOCK_Q: tl.constexpr):
    """Where a tensor's t, q, parts of <q, q>, parts of <t, t> and parts of W^T t are."""
    q_ptr = scratch_ptr + n_rows
    q_parts_ptr = q_ptr + n_cols
    t_parts_ptr = q_parts_ptr + (n_cols + BLOCK_Q - 1) // BLOCK_Q
    return scratch_ptr, q_ptr, q_parts_ptr, t_parts_ptr, t_parts_ptr + n_parts


@triton.jit
def power_kernel(
    w_ptrs,
    u_ptrs,
    v_ptrs,
    scratch_ptr,
    sizes,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    FIRST: tl.constexpr,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """t = W v, and the program's parts of <t, t> and W^T t; if not training its part of <u, t>.

    A program takes `span` rows. v is the buffer in the first iteration, then q/max(||q||, eps).
    Where a row does not fit on chip, the program reads its one block of rows twice.
    """
    which, place, n_rows, n_cols, after, span, scratch, _ = locate(sizes, LAYOUT, UNIT)
    w_ptr, u_ptr, v_ptr = pick((w_ptrs, u_ptrs, v_ptrs), which)
    n_parts = (n_rows + span - 1) // span
    t_ptr, q_ptr, q_parts_ptr, t_parts_ptr, parts_ptr = places(
        scratch_ptr + scratch, n_rows, n_cols, n_parts, BLOCK_Q
    )
    parts_ptr += place.to(tl.int64) * n_cols
    norm = tl.full([], 1.0, ACC)
    if not FIRST:
        norm = clamped_root(sum_all(q_parts_ptr, (n_cols + BLOCK_Q - 1) // BLOCK_Q, 64), EPS, ACC)
    row0 = place * span
    rows = tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    acc = tl.zeros([BLOCK_ROWS], ACC)
    if WHOLE:
        v = tl.load((v_ptr if FIRST else q_ptr) + cols, mask=cols < n_cols, other=0.0).to(ACC)
        if not FIRST:
            v = quotient(v, norm)
        v = v[None, :]
        q = tl.zeros([BLOCK_COLS], ACC)
        for row1 in range(row0, tl.minimum(row0 + span, n_rows), BLOCK_ROWS):
            row = row1 + rows
            offset, mask = tile(row, cols, n_rows, n_cols, after, LAYOUT)
            w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(ACC)  # [BLOCK_ROWS, BLOCK_COLS]
            t = tl.sum(w * v, axis=1)
            if TRAINING:
                tl.store(t_ptr + row, t, mask=row < n_rows)
                q += tl.sum(w * t[:, None], axis=0)
                acc += t * t
            else:
                acc += t * tl.load(u_ptr + row, mask=row < n_rows, other=0.0).to(ACC)
        if TRAINING:
            tl.store(parts_ptr + cols, q, mask=cols < n_cols)
    else:
        row = row0 + rows
        products = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
        for col0 in range(0, n_cols, BLOCK_COLS):
            c = col0 + cols
            v = tl.load((v_ptr if FIRST else q_ptr) + c, mask=c < n_cols, other=0.0).to(ACC)
            offset, mask = tile(row, c, n_rows, n_cols, after, LAYOUT)
            products += tl.load(w_ptr + offset, mask=mask, other=0.0).to(ACC) * v[None, :]
        t = quotient(tl.sum(products, axis=1), norm)
        if TRAINING:
            tl.store(t_ptr + row, t, mask=row < n_rows)
            acc = t * t
            for col0 in range(0, n_cols, BLOCK_COLS):
                offset, mask = tile(row, col0 + cols, n_rows, n_cols, after, LAYOUT)
                w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(ACC)
                q = tl.sum(w * t[:, None], axis=0)
                tl.store(parts_ptr + col0 + cols, q, mask=col0 + cols < n_cols)
        else:
            acc = t * tl.load(u_ptr + row, mask=row < n_rows, other=0.0).to(ACC)
    tl.store(t_parts_ptr + place, tl.sum(acc, axis=0))


@triton.jit
def power_sum_kernel(
    scratch_ptr,
    sizes,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """q = W^T u with u = t/max(||t||, eps), from the parts of W^T t; and its part of <q, q>."""
    _, place, n_rows, n_cols, _, _, scratch, n_parts = locate(sizes, LAYOUT, UNIT)
    _, q_ptr, q_parts_ptr, t_parts_ptr, parts_ptr = places(
        scratch_ptr + scratch, n_rows, n_cols, n_parts, BLOCK_COLS
    )
    norm = clamped_root(sum_all(t_parts_ptr, n_parts, 64), EPS, ACC)
    col = place * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    q = sum_parts(parts_ptr, n_parts, n_cols, col, col < n_cols, BLOCK_ROWS)
    q = quotient(q, norm)
    tl.store(q_ptr + col, q, mask=col < n_cols)
    tl.store(q_parts_ptr + place, tl.sum(q * q, axis=0))


@triton.jit
def vectors_kernel(
    u_ptrs,
    v_ptrs,
    scratch_ptr,
    sizes,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """u = t/max(||t||, eps) and v = q/max(||q||, eps) into the buffers, after an iteration."""
    which, place, n_rows, n_cols, _, _, scratch, n_parts = locate(sizes, LAYOUT, UNIT)
    u_ptr, v_ptr = pick((u_ptrs, v_ptrs), which)
    t_ptr, q_ptr, q_parts_ptr, t_parts_ptr, _ = places(
        scratch_ptr + scratch, n_rows, n_cols, n_parts, BLOCK_Q
    )
    i = place * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    norm = clamped_root(sum_all(t_parts_ptr, n_parts, 64), EPS, ACC)
    u = quotient(tl.load(t_ptr + i, mask=i < n_rows, other=0.0), norm)
    tl.store(u_ptr + i, u.to(u_ptr.dtype.element_ty), mask=i < n_rows)
    norm = clamped_root(sum_all(q_parts_ptr, (n_cols + BLOCK_Q - 1) // BLOCK_Q, 64), EPS, ACC)
    v = quotient(tl.load(q_ptr + i, mask=i < n_cols, other=0.0), norm)
    tl.store(v_ptr + i, v.to(v_ptr.dtype.element_ty), mask=i < n_cols)


class Plan(NamedTuple):
    """The launches of each kernel, the last those that divide by sigma; and how much scratch."""

    power: tuple[Launch, ...]
    total: tuple[Launch, ...]
    vectors: tuple[Launch, ...]
    divide: tuple[Launch, ...]
    size: int


def power_iteration(
    ws: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    steps: int,
    eps: float,
    config: Config,
) -> tuple[Plan, torch.Tensor, dict[str, Any]]:
    """t and q of every weight after `steps` iterations, in scratch; at 0 steps only <u, W v>.

    The arguments are those of `spectral_norm_fwd`; the buffers are not changed. Returned are the
    plan, the scratch, and the options of the kernel that comes after.
    """
    compute = compute_dtype(ws[0].dtype)
    planned = _plan(shapes_of(ws), aligned(ws, us, vs), steps > 0, config)
    scratch = torch.empty(planned.size, dtype=compute, device=ws[0].device)
    options = {"EPS": eps, "ACC": TRITON_DTYPE[compute]}
    after = options | {"BLOCK_Q": BLOCK_Q}
    for step in range(max(steps, 1)):
        phase = after | {"FIRST": step == 0, "TRAINING": steps > 0}
        launch(power_kernel, planned.power, (ws, us, vs), scratch, **phase)
        if steps:
            launch(power_sum_kernel, planned.total, (), scratch, **options)
    return planned, scratch, after


def advance(
    ws: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    steps: int,
    eps: float,
    config: Config,
) -> None:
    """`steps` iterations, at least one, of the buffers us and vs on ws, and nothing else.

    The arguments are those of `spectral_norm_fwd`, which changes the buffers to the same.
    """
    ws = [w.contiguous() for w in ws]
    planned, scratch, options = power_iteration(ws, us, vs, steps, eps, config)
    launch(vectors_kernel, planned.vectors, (us, vs), scratch, **options)


@lru_cache(PLANS)
def _plan(
    shapes: tuple[Shape, ...], whether_aligned: tuple[bool, ...], training: bool, config: Config
) -> Plan:
    power, total, vectors, divide = [], [], [], []
    size = 0
    for i, shape in enumerate(shapes):
        m = _power_member(member(i, shape, config, whole=True, scratch=size), config)
        n_tiles = triton.cdiv(m.n_cols, BLOCK_Q)
        n_entries = triton.cdiv(max(m.n_rows, m.n_cols), VECTORS.cols)
        power.append(replace(m, aligned=whether_aligned[i]))
        total.append(replace(m, blocks=SUM, programs=n_tiles, count=m.programs))
        vectors.append(replace(power[-1], blocks=VECTORS, programs=n_entries, count=m.programs))
        divide.append(
            member(i, shape, config, scratch=size, count=m.programs, aligned=whether_aligned[i])
        )
        size += m.n_rows + m.n_cols + n_tiles + m.programs * (1 + (m.n_cols if training else 0))
    return Plan(*(plan(ms, config) for ms in (power, total, vectors, divide)), size)


SUM = Blocks("rows", 1, 32, BLOCK_Q, 4, False)
VECTORS = Blocks("rows", 1, 1, 1024, 4, False)


def power_blocks(shape: Shape, config: Config) -> Blocks:
    """The tile of whole rows; a single row is held whole or not at all."""
    block = blocks(shape, config, whole=True)
    if block.whole or block.rows > 1:
        return block
    return replace(block, rows=8, cols=config.elements // 8)


def _power_member(m: Member, config: Config) -> Member:
    """Rows that are whole are shared out over half of the programs, at least four to each: more
    programs leave more parts to add up."""
    m = replace(m, blocks=power_blocks((m.n_cols // m.after, m.n_rows, m.after), config))
    rows = m.blocks.rows
    if m.blocks.whole:
        wanted = max(triton.cdiv(m.n_rows, config.max_programs // 2), 4)
        rows = triton.cdiv(wanted, rows) * rows
    return replace(m, span=rows, programs=triton.cdiv(m.n_rows, rows))
