"""Spectral norm of many tensors and its gradient: one read of W for each power iteration.

A program that holds row i of W on chip for t_i = W_i v adds t_i W_i to its part of W^T t at once.
The parts of all programs are added up by a second small kernel, not by whichever program happens
to arrive last: that needs no counters to clear, spreads the sum over the device, and runs in
Triton's interpreter. Sums are in a fixed order throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from tritonparam.kernels.launch import TRITON_DTYPE, compute_dtype
from tritonparam.kernels.slices import (
    Blocks,
    Config,
    Member,
    blocks,
    default_config,
    dots,
    launch,
    locate,
    member,
    parts,
    pick,
    quotient,
    share,
    shipped_row,
    shipped_shapes,
    square_root,
    sum_all,
    sum_parts,
    tile,
)

_BLOCK_Q = 64  # columns of W^T t for one program of the second kernel


@triton.jit
def _clamped_root(square, EPS: tl.constexpr, ACC: tl.constexpr):
    """max(sqrt(square), EPS), NaN where it is NaN."""
    norm = square_root(square)
    eps = tl.full([], EPS, ACC)
    return tl.where(norm < eps, eps, norm)


@triton.jit
def _scratch(scratch_ptr, n_rows, n_cols, n_parts, BLOCK_Q: tl.constexpr):
    """Where a tensor's t, q, parts of <q, q>, parts of <t, t> and parts of W^T t are."""
    q_ptr = scratch_ptr + n_rows
    q_parts_ptr = q_ptr + n_cols
    t_parts_ptr = q_parts_ptr + (n_cols + BLOCK_Q - 1) // BLOCK_Q
    return scratch_ptr, q_ptr, q_parts_ptr, t_parts_ptr, t_parts_ptr + n_parts


@triton.jit
def _power_kernel(
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
    t_ptr, q_ptr, q_parts_ptr, t_parts_ptr, parts_ptr = _scratch(
        scratch_ptr + scratch, n_rows, n_cols, n_parts, BLOCK_Q
    )
    parts_ptr += place.to(tl.int64) * n_cols
    norm = tl.full([], 1.0, ACC)
    if not FIRST:
        norm = _clamped_root(sum_all(q_parts_ptr, (n_cols + BLOCK_Q - 1) // BLOCK_Q, 64), EPS, ACC)
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
def _power_sum_kernel(
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
    _, q_ptr, q_parts_ptr, t_parts_ptr, parts_ptr = _scratch(
        scratch_ptr + scratch, n_rows, n_cols, n_parts, BLOCK_COLS
    )
    norm = _clamped_root(sum_all(t_parts_ptr, n_parts, 64), EPS, ACC)
    col = place * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    q = sum_parts(parts_ptr, n_parts, n_cols, col, col < n_cols, BLOCK_ROWS)
    q = quotient(q, norm)
    tl.store(q_ptr + col, q, mask=col < n_cols)
    tl.store(q_parts_ptr + place, tl.sum(q * q, axis=0))


@triton.jit
def _spectral_norm_fwd_kernel(
    w_ptrs,
    u_ptrs,
    v_ptrs,
    y_ptrs,
    saved_ptrs,
    scratch_ptr,
    sizes,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = W/sigma, 0 where W is 0; the new u and v, and copies of u, v and sigma.

    sigma = u^T W v, which is q^T v after an iteration, as torch's _SpectralNorm. The copies are
    at 0, at n_rows and at n_rows + n_cols of `saved`, each rounded up to a multiple of 16.
    """
    which, block, part, row, n_rows, n_cols, after, span, scratch, n_sums = share(
        sizes, LAYOUT, UNIT, BLOCK_ROWS
    )
    w_ptr, u_ptr, v_ptr = pick((w_ptrs, u_ptrs, v_ptrs), which)
    y_ptr, saved_ptr = pick((y_ptrs, saved_ptrs), which)
    t_ptr, q_ptr, q_parts_ptr, t_parts_ptr, _ = _scratch(
        scratch_ptr + scratch, n_rows, n_cols, n_sums, BLOCK_Q
    )
    v_copy_ptr = saved_ptr + (n_rows + 15) // 16 * 16
    v_norm = tl.full([], 1.0, ACC)
    if TRAINING:
        square = sum_all(q_parts_ptr, (n_cols + BLOCK_Q - 1) // BLOCK_Q, 64)
        v_norm = _clamped_root(square, EPS, ACC)
        sigma = quotient(square, v_norm)
    else:
        sigma = sum_all(t_parts_ptr, n_sums, 64)
    if (block == 0) & (part == 0):
        tl.store(v_copy_ptr + (n_cols + 15) // 16 * 16, sigma)
    if part == 0:
        if TRAINING:
            u = tl.load(t_ptr + row, mask=row < n_rows, other=0.0)
            u = quotient(u, _clamped_root(sum_all(t_parts_ptr, n_sums, 64), EPS, ACC))
            tl.store(u_ptr + row, u.to(u_ptr.dtype.element_ty), mask=row < n_rows)
        else:
            u = tl.load(u_ptr + row, mask=row < n_rows, other=0.0).to(ACC)
        tl.store(saved_ptr + row, u, mask=row < n_rows)
    divisor = tl.where(sigma == 0.0, 1.0, sigma)
    for col0 in range(part * span, tl.minimum((part + 1) * span, n_cols), BLOCK_COLS):
        col = col0 + tl.arange(0, BLOCK_COLS)
        if block == 0:
            if TRAINING:
                v = quotient(tl.load(q_ptr + col, mask=col < n_cols, other=0.0), v_norm)
                tl.store(v_ptr + col, v.to(v_ptr.dtype.element_ty), mask=col < n_cols)
            else:
                v = tl.load(v_ptr + col, mask=col < n_cols, other=0.0).to(ACC)
            tl.store(v_copy_ptr + col, v, mask=col < n_cols)
        offset, mask = tile(row, col, n_rows, n_cols, after, LAYOUT)
        w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(ACC)  # [BLOCK_ROWS, BLOCK_COLS]
        y = quotient(w, tl.where(w == 0.0, divisor, sigma))
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _spectral_norm_bwd_kernel(
    g_ptrs,
    u_ptrs,
    v_ptrs,
    sigma_ptrs,
    dw_ptrs,
    sums_ptr,
    sizes,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """dW = (G - (<G, W>/sigma) u v^T)/sigma, 0 where sigma is 0, from the partial sums of G W."""
    which, _, part, row, n_rows, n_cols, after, span, scratch, n_sums = share(
        sizes, LAYOUT, UNIT, BLOCK_ROWS
    )
    g_ptr, u_ptr, v_ptr = pick((g_ptrs, u_ptrs, v_ptrs), which)
    sigma_ptr, dw_ptr = pick((sigma_ptrs, dw_ptrs), which)
    sigma = tl.load(sigma_ptr)
    sigma = tl.where(sigma == 0.0, float("inf"), sigma)
    scale = quotient(tl.full([], 1.0, ACC), sigma)
    slope = quotient(sum_all(sums_ptr + scratch, n_sums, 64), sigma) * scale
    u = (tl.load(u_ptr + row, mask=row < n_rows, other=0.0) * slope)[:, None]
    for col0 in range(part * span, tl.minimum((part + 1) * span, n_cols), BLOCK_COLS):
        col = col0 + tl.arange(0, BLOCK_COLS)
        v = tl.load(v_ptr + col, mask=col < n_cols, other=0.0)[None, :]
        offset, mask = tile(row, col, n_rows, n_cols, after, LAYOUT)
        g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(ACC)  # [BLOCK_ROWS, BLOCK_COLS]
        dw = g * scale - u * v
        tl.store(dw_ptr + offset, dw.to(dw_ptr.dtype.element_ty), mask=mask)


Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def spectral_norm_fwd(
    ws: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    steps: int,
    eps: float,
    dtype: torch.dtype,
    config: Config,
) -> list[Result]:
    """(W/sigma, u, v, sigma) of every weight, after `steps` power iterations.

    A weight [before, n, after] is the matrix of n rows and before * after columns; all are of one
    dtype and none is empty. us and vs are the buffers, contiguous; they are updated in place, at
    steps = 0 left as they are. The results are new: W/sigma contiguous in `dtype`, u, v and sigma
    in the compute dtype.
    """
    ws = [w.contiguous() for w in ws]
    compute = compute_dtype(ws[0].dtype)
    ys = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in ws]
    saved = [
        torch.empty(_up(w.size(1)) + _up(v.numel()) + 1, dtype=compute, device=w.device)
        for w, v in zip(ws, vs, strict=True)
    ]
    power, total, forward = [], [], []
    size = 0
    for i, w in enumerate(ws):
        m = _power_member(i, (w, us[i], vs[i]), config, size)
        n_tiles = triton.cdiv(m.n_cols, _BLOCK_Q)
        power.append(m)
        total.append(replace(m, blocks=_SUM, programs=n_tiles, count=m.programs))
        tensors = (w, us[i], vs[i], ys[i], saved[i])
        forward.append(member(i, tensors, config, scratch=size, count=m.programs))
        size += m.n_rows + m.n_cols + n_tiles + m.programs * (1 + (m.n_cols if steps else 0))
    scratch = torch.empty(size, dtype=compute, device=ws[0].device)
    options = {"EPS": eps, "ACC": TRITON_DTYPE[compute]}
    for step in range(max(steps, 1)):
        phase = options | {"FIRST": step == 0, "TRAINING": steps > 0, "BLOCK_Q": _BLOCK_Q}
        launch(_power_kernel, power, (ws, us, vs), (scratch,), config, **phase)
        if steps:
            launch(_power_sum_kernel, total, (), (scratch,), config, **options)
    options |= {"TRAINING": steps > 0, "BLOCK_Q": _BLOCK_Q}
    lists = (ws, us, vs, ys, saved)
    launch(_spectral_norm_fwd_kernel, forward, lists, (scratch,), config, **options)
    results = []
    for y, v, buffer in zip(ys, vs, saved, strict=True):
        n = y.size(1)
        copy = buffer[_up(n) : _up(n) + v.numel()]
        results.append((y, buffer[:n], copy, buffer[-1]))
    return results


def spectral_norm_bwd(
    gs: Sequence[torch.Tensor],
    ws: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    sigmas: Sequence[torch.Tensor],
    config: Config,
) -> list[torch.Tensor]:
    """dW of every weight, from G of W's shape and the u, v and sigma that the forward returned.

    The results are new and contiguous, in the dtype of W.
    """
    gs = [g.contiguous() for g in gs]
    ws = [w.contiguous() for w in ws]
    dws = [torch.empty_like(w) for w in ws]
    flat_g, flat_w = ([x.view(1, 1, -1) for x in xs] for xs in (gs, ws))
    dot, backward = [], []
    size = 0
    for i in range(len(ws)):
        m = member(i, (flat_g[i], flat_w[i]), config, scratch=size)
        dot.append(m)
        tensors = (gs[i], us[i], vs[i], sigmas[i], dws[i])
        backward.append(member(i, tensors, config, scratch=size, count=parts(m)))
        size += parts(m)
    compute = compute_dtype(ws[0].dtype)
    sums = torch.empty(size, dtype=compute, device=ws[0].device)
    dots(flat_g, flat_w, dot, sums, config)
    lists = (gs, us, vs, sigmas, dws)
    options = {"ACC": TRITON_DTYPE[compute]}
    launch(_spectral_norm_bwd_kernel, backward, lists, (sums,), config, **options)
    return dws


def n_launches(steps: int) -> tuple[int, int]:
    """Of `spectral_norm_fwd`, and of `spectral_norm_bwd`, for one tensor."""
    return max(2 * steps, 1) + 1, 2


_SUM = Blocks("rows", 1, 32, _BLOCK_Q, 4, False)


def _up(n: int) -> int:
    return triton.cdiv(n, 16) * 16


def _power_blocks(block: Blocks, config: Config) -> Blocks:
    """A single row is held whole or not at all."""
    if block.whole or block.rows > 1:
        return block
    return replace(block, rows=8, cols=config.elements // 8)


def _power_member(index: int, xs: Sequence[torch.Tensor], config: Config, scratch: int) -> Member:
    """Rows that are whole are shared out over half of the programs, at least four to each: more
    programs leave more parts to add up."""
    m = member(index, xs, config, whole=True, scratch=scratch)
    m = replace(m, blocks=_power_blocks(m.blocks, config))
    rows = m.blocks.rows
    if m.blocks.whole:
        wanted = max(triton.cdiv(m.n_rows, config.max_programs // 2), 4)
        rows = triton.cdiv(wanted, rows) * rows
    return replace(m, span=rows, programs=triton.cdiv(m.n_rows, rows))


def shipped(backend: str) -> list[tuple]:
    """What compiles ahead of time: training in every tile, the other phases in some."""
    rows: dict[str, tuple] = {}

    def add(kernel, name, block, dtype, length, lists, flat, **options):
        row = shipped_row(kernel, name, block, dtype, length, lists, flat, **options)
        rows.setdefault(row[0], row)

    lists = "w_ptrs u_ptrs v_ptrs"
    lists_fwd = f"{lists} y_ptrs saved_ptrs*"
    lists_bwd = "g_ptrs u_ptrs* v_ptrs* sigma_ptrs* dw_ptrs"
    eps = {"EPS": 1e-12}
    train = eps | {"TRAINING": True, "BLOCK_Q": _BLOCK_Q}
    test = eps | {"TRAINING": False, "BLOCK_Q": _BLOCK_Q}
    power = (_power_kernel, "spectral_norm_power")
    forward = (_spectral_norm_fwd_kernel, "spectral_norm_fwd")
    backward = (_spectral_norm_bwd_kernel, "spectral_norm_bwd")
    for dtype, shape, length in shipped_shapes():
        config = default_config(dtype)
        block = blocks(shape, config, whole=False)
        row_block = _power_blocks(blocks(shape, config, whole=True), config)
        add(*power, row_block, dtype, length, lists, "scratch_ptr", FIRST=True, **train)
        add(*forward, block, dtype, length, lists_fwd, "scratch_ptr", **train)
        add(*backward, block, dtype, length, lists_bwd, "sums_ptr")
    for dtype in (torch.float32, torch.float64):
        config = default_config(dtype)
        total = (_power_sum_kernel, "spectral_norm_sum")
        add(*total, _SUM, dtype, 1, "", "scratch_ptr", **eps)
        block = blocks((1, 64, 32768), config, whole=False)
        again = (_power_kernel, "spectral_norm_power_again")
        for row_block in (block, blocks((1, 64, 4096), config, whole=True)):
            add(*again, row_block, dtype, 1, lists, "scratch_ptr", FIRST=False, **train)
        power = (_power_kernel, "spectral_norm_power_eval")
        add(*power, block, dtype, 1, lists, "scratch_ptr", FIRST=True, **test)
        forward = (_spectral_norm_fwd_kernel, "spectral_norm_fwd_eval")
        add(*forward, block, dtype, 1, lists_fwd, "scratch_ptr", **test)
    return list(rows.values())
