"""Spectral norm of many tensors and its gradient.

Three launches where it iterates once: the parts of W^T t, their sum, the division. Without a
barrier across the grid and with sums in a fixed order two are not enough: a program that divides
would have to add up the parts itself, up to a quarter of W; and of sigma^2, the sum of <p, p'> over
all pairs of parts, the kernel that makes the parts knows those with p = p' only. The last program
to arrive could add them up; but its counter has to be zeroed by one more launch, or is kept from
one call to the next and counts wrongly where two streams use it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from tritonparam.kernels.grouped import (
    PLANS,
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
from tritonparam.kernels.power_iteration import (
    BLOCK_Q,
    SUM,
    VECTORS,
    clamped_root,
    places,
    power_blocks,
    power_iteration,
    power_kernel,
    power_sum_kernel,
    vectors_kernel,
)
from tritonparam.kernels.slices import pick, quotient, share, sum_all, tile


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
    t_ptr, q_ptr, q_parts_ptr, t_parts_ptr, _ = places(
        scratch_ptr + scratch, n_rows, n_cols, n_sums, BLOCK_Q
    )
    v_copy_ptr = saved_ptr + (n_rows + 15) // 16 * 16
    v_norm = tl.full([], 1.0, ACC)
    if TRAINING:
        square = sum_all(q_parts_ptr, (n_cols + BLOCK_Q - 1) // BLOCK_Q, 64)
        v_norm = clamped_root(square, EPS, ACC)
        sigma = quotient(square, v_norm)
    else:
        sigma = sum_all(t_parts_ptr, n_sums, 64)
    if (block == 0) & (part == 0):
        tl.store(v_copy_ptr + (n_cols + 15) // 16 * 16, sigma)
    if part == 0:
        if TRAINING:
            u = tl.load(t_ptr + row, mask=row < n_rows, other=0.0)
            u = quotient(u, clamped_root(sum_all(t_parts_ptr, n_sums, 64), EPS, ACC))
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
    ys = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in ws]
    sizes = [n for w, v in zip(ws, vs, strict=True) for n in (w.size(1), v.numel(), 1)]
    saved = vectors(sizes, ws[0])
    planned, scratch, options = power_iteration(ws, us, vs, steps, eps, config)
    lists = (ws, us, vs, ys, saved[::3])
    options["TRAINING"] = steps > 0
    launch(_spectral_norm_fwd_kernel, planned.divide, lists, scratch, **options)
    sigmas = [sigma.view(()) for sigma in saved[2::3]]
    return list(zip(ys, saved[::3], saved[1::3], sigmas, strict=True))


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
    flat_planned, planned, size = _plan_bwd(shapes_of(ws), aligned(gs, ws, us, vs, sigmas), config)
    sums = torch.empty(size, dtype=sigmas[0].dtype, device=ws[0].device)
    dots(gs, ws, flat_planned, sums)
    lists = (gs, us, vs, sigmas, dws)
    launch(_spectral_norm_bwd_kernel, planned, lists, sums, ACC=TRITON_DTYPE[sums.dtype])
    return dws


def n_launches(steps: int) -> tuple[int, int]:
    """Of `spectral_norm_fwd`, and of `spectral_norm_bwd`, for one tensor."""
    return max(2 * steps, 1) + 1, 2


@lru_cache(PLANS)
def _plan_bwd(
    shapes: tuple[Shape, ...], whether_aligned: tuple[bool, ...], config: Config
) -> tuple[tuple[Launch, ...], tuple[Launch, ...], int]:
    """The launches of <G, W>, each tensor one row, those of dW, and how many sums there are."""
    dot, backward = [], []
    size = 0
    for i, (before, n, after) in enumerate(shapes):
        row = (1, 1, before * n * after)
        m = member(i, row, config, scratch=size, aligned=whether_aligned[i])
        dot.append(m)
        m = member(i, shapes[i], config, scratch=size, count=parts(m), aligned=whether_aligned[i])
        backward.append(m)
        size += m.count
    return plan(dot, config), plan(backward, config), size


def launches(phase: str, chain: str, n: int, dtype: torch.dtype, config: Config) -> list[tuple]:
    """What a phase launches for tensors of n numbers, in every layout, compiled ahead of time.

    Of the forward a first iteration in training, and the rest.
    """
    rows = [dots_row(blocks((1, 1, n), config, whole=False), dtype, 1)] if phase == "bwd" else []
    for shape in typical_shapes(n):
        rows += _rows(shape, dtype, 1, config)[phase]
    return rows


_LISTS = "w_ptrs u_ptrs v_ptrs"
_LISTS_FWD = f"{_LISTS} y_ptrs saved_ptrs*"
_LISTS_BWD = "g_ptrs u_ptrs* v_ptrs* sigma_ptrs* dw_ptrs"
_EPS = {"EPS": 1e-12}
_TRAIN = _EPS | {"TRAINING": True, "BLOCK_Q": BLOCK_Q}
_EVAL = _EPS | {"TRAINING": False, "BLOCK_Q": BLOCK_Q}


def _rows(shape: Shape, dtype: torch.dtype, length: int, config: Config) -> dict[str, list]:
    """The launches of both phases for a shape."""
    power = (power_kernel, "spectral_norm_power", power_blocks(shape, config))
    block = blocks(shape, config, whole=False)
    fwd = (_spectral_norm_fwd_kernel, "spectral_norm_fwd", block)
    bwd = (_spectral_norm_bwd_kernel, "spectral_norm_bwd", block)
    scratch, first = "scratch_ptr", _TRAIN | {"FIRST": True}
    return {
        "fwd": [
            shipped_row(*power, dtype, length, _LISTS, scratch, **first),
            shipped_row(*fwd, dtype, length, _LISTS_FWD, scratch, **_TRAIN),
        ],
        "bwd": [shipped_row(*bwd, dtype, length, _LISTS_BWD, "sums_ptr")],
    }


def shipped(backend: str) -> list[tuple]:
    """What compiles ahead of time: training in every tile, the other phases in some."""
    found: list[tuple] = []
    for dtype, shape, length in shipped_shapes():
        rows = _rows(shape, dtype, length, default_config(dtype))
        found += rows["fwd"] + rows["bwd"]
    scratch, again = "scratch_ptr", _TRAIN | {"FIRST": False}
    for dtype in (torch.float32, torch.float64):
        config = default_config(dtype)
        block = blocks((1, 64, 32768), config, whole=False)
        whole = blocks((1, 64, 4096), config, whole=True)
        total = (power_sum_kernel, "spectral_norm_sum", SUM)
        kept = (vectors_kernel, "spectral_norm_vectors", VECTORS)
        found.append(shipped_row(*total, dtype, 1, "", scratch, **_EPS))
        options = _EPS | {"BLOCK_Q": BLOCK_Q}
        found.append(shipped_row(*kept, dtype, 1, "u_ptrs v_ptrs", scratch, **options))
        for tile_again in (block, whole):
            power = (power_kernel, "spectral_norm_power_again", tile_again)
            found.append(shipped_row(*power, dtype, 1, _LISTS, scratch, **again))
        power = (power_kernel, "spectral_norm_power_eval", block)
        found.append(shipped_row(*power, dtype, 1, _LISTS, scratch, FIRST=True, **_EVAL))
        fwd = (_spectral_norm_fwd_kernel, "spectral_norm_fwd_eval", block)
        found.append(shipped_row(*fwd, dtype, 1, _LISTS_FWD, scratch, **_EVAL))
    return list({row[0]: row for row in found}.values())
