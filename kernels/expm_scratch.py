"""exp of a skew or symmetric matrix, n <= 64, and its gradient: one launch each, one program each.

The algorithms are those of `expm`, for what does not fit into registers as a whole: fp32 above
n = 32, and fp64. Every tile lies in memory of the program's own, which stays in the cache, and a
product reads its factors from there in slices of BLOCK_K, so that no tile but its sum is in
registers. What is alike is one product in a loop, with its tiles chosen by the turn: written out,
the addresses of all products live at once, and spill.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from tritonparam.kernels.even_odd import EVEN_ODD
from tritonparam.kernels.horner import argument, blocks, expm_fwd_kernel
from tritonparam.kernels.launch import NAME, compute_dtype, launch
from tritonparam.kernels.scratch import one_of, put, rows_of, times
from tritonparam.kernels.tile import growth_of, power_of_two


@triton.jit(
    do_not_specialize=[
        *("n_cols", "w_stride", "w_stride_row", "w_stride_col"),
        *("g_stride", "g_stride_row", "g_stride_col"),
    ],
    do_not_specialize_on_alignment=["w_ptr", "g_ptr", "dw_ptr"],
)
def _expm_bwd_kernel(
    w_ptr,
    g_ptr,
    dw_ptr,
    tile_ptr,
    n_cols,
    w_stride,
    w_stride_row,
    w_stride_col,
    g_stride,
    g_stride_row,
    g_stride_col,
    SIGN: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw from G: the triangle of H = int_0^1 exp(t A^T) G exp((1 - t) A^T) dt, as in `expm`.

    With Z = exp(A^T / 2^(s + 1)), by Horner, X = G Z and M = Z X; then s rounds of Z <- Z^2,
    X = M Z and M <- Z M + X; last the series of sinhc in commutators with A, by Horner too.
    """
    AREA: tl.constexpr = BLOCK * BLOCK
    STEPS: tl.constexpr = len(EVEN) // 2 - 1
    TERMS: tl.constexpr = len(ODD) - 1
    ACC: tl.constexpr = tile_ptr.dtype.element_ty
    matrix = tl.program_id(0).to(tl.int64)
    w_ptr += matrix * w_stride
    tile_ptr += matrix * ((STEPS + 5) * AREA)
    strides = (w_stride_row, w_stride_col)
    down, mu = argument(w_ptr, tile_ptr, n_cols, *strides, SIGN, BLOCK, BLOCK_K)
    # A^T / 2 = SIGN A / 2.
    left = blocks(tile_ptr, n_cols, down, 0.5 * SIGN, SIGN, EVEN, ODD, BLOCK, BLOCK_K, PRECISION)
    last = tl.minimum(left, 3)
    growth = growth_of(mu, last)
    # Z is tile STEPS + 2 or STEPS + 3, M is STEPS + 4 or 2, where A^4 was, and X is 1. Numbers of
    # tiles go from turn to turn: carried pointers take registers, and Triton 3.6 fails on them for
    # gfx942.
    z_at = STEPS + 2
    m_at = STEPS + 4
    g_ptr += matrix * g_stride
    for row0 in range(0, BLOCK, BLOCK_K):
        row, col, entry = rows_of(row0, BLOCK, BLOCK_K)
        inside = (row < n_cols) & (col < n_cols)
        offset = row.to(tl.int64) * g_stride_row + col.to(tl.int64) * g_stride_col
        g = tl.load(g_ptr + offset, mask=inside, other=0.0).to(ACC)
        tl.store(tile_ptr + (STEPS + 4) * AREA + entry, g)
    for i in range(STEPS + 2):
        polynomial = i < STEPS
        x_ptr = tile_ptr + tl.where(polynomial, 2, tl.where(i == STEPS, m_at, z_at)) * AREA
        y_ptr = tile_ptr + tl.where(i <= STEPS, z_at, 1) * AREA
        z, entry = times(x_ptr, y_ptr, n_cols, BLOCK, BLOCK_K, PRECISION)
        if SIGN == 1:
            z *= tl.where((i == STEPS + 1) & (left == 0), growth, 1.0)
        plus_ptr = tile_ptr + tl.where(i < STEPS - 1, STEPS + 1 - i, 1) * AREA
        z += tl.load(plus_ptr + entry, mask=entry < tl.where(polynomial, AREA, 0), other=0.0)
        z_at = tl.where(polynomial, 2 * STEPS + 5 - z_at, z_at)
        m_at = tl.where(i == STEPS + 1, 2, m_at)
        put(tile_ptr + tl.where(polynomial, z_at, tl.where(i == STEPS, 1, 2)) * AREA + entry, z)
    for i in range(3 * left):
        turn = i % 3  # of Z, X or M
        x_ptr = tile_ptr + one_of(turn, z_at, m_at, z_at) * AREA
        y_ptr = tile_ptr + one_of(turn, z_at, z_at, m_at) * AREA
        z, entry = times(x_ptr, y_ptr, n_cols, BLOCK, BLOCK_K, "ieee" if SIGN == 1 else PRECISION)
        if SIGN == 1:
            z *= tl.where(left - i // 3 == last, growth, 1.0)
        plus_ptr = tile_ptr + AREA  # X
        z += tl.load(plus_ptr + entry, mask=entry < tl.where(turn == 2, AREA, 0), other=0.0)
        z_at = tl.where(turn == 0, 2 * STEPS + 5 - z_at, z_at)
        m_at = tl.where(turn == 2, STEPS + 6 - m_at, m_at)
        put(tile_ptr + one_of(turn, z_at, 1, m_at) * AREA + entry, z)
    m_ptr = tile_ptr + m_at * AREA
    t_ptr = tile_ptr + (STEPS + 6 - m_at) * AREA
    for row0 in range(0, BLOCK, BLOCK_K):
        row, col, entry = rows_of(row0, BLOCK, BLOCK_K)
        t = tl.load(m_ptr + entry) + SIGN * tl.load(m_ptr + (col * BLOCK + row))
        tl.store(t_ptr + entry, t * power_of_two(-left) * (0.5 if SIGN == 1 else 1.0))
    tl.debug_barrier()
    for i in range(2 * TERMS):
        outer = i % 2 == 1
        h_ptr = tile_ptr + tl.where(outer, 1, tl.where(i == 0, STEPS + 6 - m_at, m_at)) * AREA
        factor = tl.full([], 1.0, ACC)
        for j in tl.static_range(TERMS):
            ratio = tl.full([], ODD[TERMS - j] / ODD[TERMS - j - 1], ACC)
            factor = tl.where(i == 2 * j + 1, ratio, factor)
        z, entry = times(tile_ptr, h_ptr, n_cols, BLOCK, BLOCK_K, PRECISION)
        z = (z + tl.trans(z) * tl.where(outer, SIGN, -1)) * factor
        z += tl.load(t_ptr + entry, mask=entry < tl.where(outer, AREA, 0), other=0.0)
        put(tile_ptr + tl.where(outer, m_at, 1) * AREA + entry, z)
    dw_ptr += matrix * n_cols * n_cols
    for row0 in range(0, n_cols, BLOCK_K):
        row, col, entry = rows_of(row0, BLOCK, BLOCK_K)
        dw = tl.load(m_ptr + entry)
        if SIGN == 1:
            dw = tl.where(row < col, 2.0 * dw, tl.where(row == col, dw, 0.0))
        else:
            dw = tl.where(row < col, dw, 0.0)
        mask = (row < n_cols) & (col < n_cols)
        tl.store(dw_ptr + (row * n_cols + col), dw.to(dw_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """Launch numbers of the forward or the backward."""

    block: int
    block_k: int
    precision: str
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None


def config(n: int, dtype: torch.dtype, backend: str = "cuda") -> Config:
    """The default of the forward for n x n matrices, computed in `dtype`, fp32 or fp64.

    hip does not compile tf32x3; the interpreter takes each product whole.
    """
    block = max(16, triton.next_power_of_2(n))
    block_k = block if backend == "interpreter" else 16
    wide = dtype == torch.float64 or backend == "hip"
    precision = "ieee" if wide else "tf32x3"
    if block <= 32 and backend == "cuda":  # where ptxas spills with 128 or 80 registers
        warps, maxnreg = (2, 168) if block == 16 else (4, 96)
        return Config(block, block_k, precision, warps, maxnreg=maxnreg)
    return Config(block, block_k, precision, 8 if block == 64 else 4)


def bwd_config(n: int, dtype: torch.dtype, backend: str = "cuda") -> Config:
    """The default of the backward, which at 32 spills with the forward's warps, and there and at 64
    with the registers that ptxas takes of itself."""
    default = config(n, dtype, backend)
    if default.block == 16 or backend != "cuda":
        return default
    return replace(default, num_warps=8, maxnreg=128 if default.precision == "tf32x3" else 168)


def candidates(phase: str, n: int, dtype: torch.dtype, backend: str = "cuda") -> list[Config]:
    """Configurations to measure for "fwd" or "bwd" of n x n matrices, the default first."""
    default = (bwd_config if phase == "bwd" else config)(n, dtype, backend)
    others = [replace(default, num_warps=warps) for warps in (1, 2, 4, 8)]
    others.append(replace(default, num_stages=2))
    if default.block > 16:
        others += [replace(default, block_k=32, num_warps=warps) for warps in (4, 8)]
    return list(dict.fromkeys([default, *others]))


def prepare(w: torch.Tensor, sign: int, config: Config) -> tuple[()]:
    """What `expm_bwd` needs beside `w`: nothing."""
    return ()


def expm_fwd(
    w: torch.Tensor, sign: int, config: Config, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, tuple[()]]:
    """exp(A), A = triu(w, 1) - triu(w, 1)^T for sign -1, triu(w) + triu(w, 1)^T for sign 1.

    `w` is [..., n, n], n <= 64, of any strides. The result is new and contiguous, computed in
    `torch.promote_types(w.dtype, torch.float32)` and rounded to `dtype`, None for that one; beside
    it stands what `prepare` returns.
    """
    y = torch.empty(w.shape, dtype=dtype or compute_dtype(w.dtype), device=w.device)
    if y.numel():
        w = w.reshape(-1, *w.shape[-2:])
        tiles, options = _tiles(w, 4, sign, config), _options(config, sign, compute_dtype(w.dtype))
        launch(expm_fwd_kernel, (w.size(0),), w, y, tiles, w.size(1), *w.stride(), **options)
    return y, ()


def expm_bwd(
    g: torch.Tensor, w: torch.Tensor, saved: tuple[()], sign: int, config: Config
) -> torch.Tensor:
    """The gradient of `w`, in its dtype, from `g` [..., n, n], that of the result.

    `g` is in the dtype of `w` or in that of computation, of any strides.
    """
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if dw.numel():
        w, g = w.reshape(-1, *w.shape[-2:]), g.reshape(-1, *g.shape[-2:])
        tiles, options = _tiles(w, 5, sign, config), _options(config, sign, compute_dtype(w.dtype))
        sizes = (w.size(1), *w.stride(), *g.stride())
        launch(_expm_bwd_kernel, (w.size(0),), w, g, dw, tiles, *sizes, **options)
    return dw


def n_launches(sign: int, dtype: torch.dtype, fwd: Config, bwd: Config) -> tuple[int, int]:
    """Of `expm_fwd` and `expm_bwd`."""
    return 1, 1


def _tiles(w: torch.Tensor, more: int, sign: int, config: Config) -> torch.Tensor:
    """Memory of each program: a tile for each step of Horner's scheme and some more.

    A matrix of n = 64 in fp32 takes 96 KiB forward and 112 KiB backward. A loop over several
    matrices in a program would need less, and spills.
    """
    dtype = compute_dtype(w.dtype)
    steps = len(EVEN_ODD[sign, dtype][0]) // 2 - 1
    shape = (w.size(0), steps + more, config.block, config.block)
    return torch.empty(shape, dtype=dtype, device=w.device)


def _options(config: Config, sign: int, dtype: torch.dtype) -> dict:
    even, odd = EVEN_ODD[sign, dtype]
    options = {"SIGN": sign, "EVEN": even, "ODD": odd, "BLOCK": config.block}
    options |= {"BLOCK_K": config.block_k, "PRECISION": config.precision}
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg  # hip has no such option
    return options | {"enable_fp_fusion": True}


def launches(phase: str, chain: str, n: int, dtype: torch.dtype, config: Config) -> list[tuple]:
    """What a phase launches, for compiling ahead of time, as in `cayley.launches`."""
    compute = compute_dtype(dtype)
    options = _options(config, -1 if chain == "skew_exp" else 1, compute)
    row = f"{chain}_{phase}_{n}_{NAME[dtype]}"
    kernel, pointers = expm_fwd_kernel, ("w_ptr", "y_ptr")
    if phase == "bwd":
        kernel, pointers = _expm_bwd_kernel, ("w_ptr", "g_ptr", "dw_ptr")
    types = dict.fromkeys(pointers, f"*{NAME[dtype]}") | {"tile_ptr": f"*{NAME[compute]}"}
    return [(row, kernel, types, options)]


def shipped(backend: str) -> list[tuple]:
    """Every default launch, for compiling ahead of time; of 16 bits one dtype for each kind, they
    convert alike."""
    rows: list[tuple] = []
    for chain, half in (("skew_exp", torch.bfloat16), ("symmetric_exp", torch.float16)):
        wide = [(n, torch.float64) for n in (16, 32, 64)]
        for n, dtype in (*wide, (64, torch.float32), (64, half)):
            for phase in ("fwd", "bwd"):
                default = candidates(phase, n, compute_dtype(dtype), backend)[0]
                rows += launches(phase, chain, n, dtype, default)
    return rows
