"""exp of a batch of small skew or symmetric matrices, n <= 32, and its gradient, one launch each.

Scaling and squaring, each matrix with its own number of squarings; the polynomial between the two
is that of `paterson_stockmeyer`. A tensor core truncates its sums, and squarings double what that
makes of a symmetric matrix, so there they are sums in fp32.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from tritonparam.kernels.even_odd import EVEN_ODD
from tritonparam.kernels.launch import NAME, flatten, launch, packing, slot
from tritonparam.kernels.paterson_stockmeyer import argument, load, polynomial, scaled
from tritonparam.kernels.tile import choose, growth_of, max_of, places, power_of_two, product


@triton.jit(
    do_not_specialize=["n_matrices", "n_cols", "w_stride", "w_stride_row", "w_stride_col"],
    do_not_specialize_on_alignment=["w_ptr", "y_ptr"],
)
def _expm_fwd_kernel(
    w_ptr,
    y_ptr,
    n_matrices,
    n_cols,
    w_stride,
    w_stride_row,
    w_stride_col,
    SIGN: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOT: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """exp(A), A = triu(w, 1) - triu(w, 1)^T (SIGN = -1) or triu(w) + triu(w, 1)^T (SIGN = 1).

    The matrices of a program are squared as often as the one of them that needs it most; those
    that are done stay as they are.
    """
    place = places(n_matrices, n_cols, BLOCK, SLOT, TILES)
    matrix, row, col, same, diagonal, mask = place
    strides = (w_stride, w_stride_row, w_stride_col)
    a, mu = argument(w_ptr, strides, place, n_cols, SIGN, BLOCK, SLOT, TILES)
    a, b, b2, left = scaled(a, n_cols, same, SLOT, SIGN, PRECISION)
    y = polynomial(a, b, b2, diagonal, same, SLOT, EVEN, ODD, PRECISION)
    # e^mu is multiplied on before the last three squarings at most: earlier its rounding would be
    # amplified, later exp(A - mu I) could have overflown.
    SQUARES: tl.constexpr = "ieee" if SIGN == 1 else PRECISION
    last = tl.minimum(left, 3)
    if SIGN == 1:
        growth = growth_of(mu, last)
        y = y * tl.where(left == last, growth, 1.0)
    for done in range(0, max_of(left)):
        z = tl.dot(y, y, input_precision=SQUARES)
        if SIGN == 1:
            z = z * tl.where(left - 1 - done == last, growth, 1.0)
        y = choose(done < left, z, y, same, SLOT)
    if SIGN == 1:
        y = 0.5 * (y + tl.trans(y))
    y_ptr += matrix * n_cols * n_cols
    tl.store(y_ptr + (row * n_cols + col), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("n_matrices", "n_cols", "w_stride", "w_stride_row", "w_stride_col"),
        *("g_stride", "g_stride_row", "g_stride_col"),
    ],
    do_not_specialize_on_alignment=["w_ptr", "g_ptr", "dw_ptr"],
)
def _expm_bwd_kernel(
    w_ptr,
    g_ptr,
    dw_ptr,
    n_matrices,
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
    SLOT: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw from G: the triangle of H = int_0^1 exp(t A^T) G exp((1 - t) A^T) dt.

    With Z_h = exp(h A), h = 2^-s, H is made of factors that commute: s rounds Z <- Z^2,
    M <- M Z^T + Z^T M from Z_(h/2), and h Z_(h/2)^T sinhc(ad / 2) M Z_(h/2)^T, where
    ad(T) = h (A T - T A) and sinhc(x) = sinh(x) / x = s(x^2). A commutator with A of a skew or
    symmetric matrix is X - X^T or X + X^T with X = A T: one product. So nothing is kept over the
    rounds but Z and M, and nothing from the forward pass.
    """
    place = places(n_matrices, n_cols, BLOCK, SLOT, TILES)
    matrix, row, col, same, diagonal, mask = place
    strides = (w_stride, w_stride_row, w_stride_col)
    a, mu = argument(w_ptr, strides, place, n_cols, SIGN, BLOCK, SLOT, TILES)
    a, b, b2, left = scaled(a, n_cols, same, SLOT, SIGN, PRECISION)
    a = a * 0.5
    z = polynomial(a, b * 0.25, b2 * 0.0625, diagonal, same, SLOT, EVEN, ODD, PRECISION)
    m = load(g_ptr, (g_stride, g_stride_row, g_stride_col), place, mask, BLOCK)
    m = product(m, tl.trans(z), same, SLOT, PRECISION)
    m = product(tl.trans(z), m, same, SLOT, PRECISION)
    SQUARES: tl.constexpr = "ieee" if SIGN == 1 else PRECISION
    last = tl.minimum(left, 3)
    if SIGN == 1:
        growth = growth_of(mu, last)
        m = 0.5 * (m + tl.trans(m)) * tl.where(left == 0, growth, 1.0)
    for done in range(0, max_of(left)):
        z_next = tl.dot(z, z, input_precision=SQUARES)  # Z_h in the first round
        if SIGN == 1:
            grown = tl.where(left - done == last, growth, 1.0)
            z = choose(done < left, z_next * grown, z, same, SLOT)
            x = tl.dot(m, z, input_precision=SQUARES) * grown
            m = choose(done < left, x + tl.trans(x), m, same, SLOT)
        else:
            z = choose(done < left, z_next, z, same, SLOT)
            x = tl.dot(m, tl.trans(z), input_precision=PRECISION)
            x = tl.dot(tl.trans(z), m, acc=x, input_precision=PRECISION)
            m = choose(done < left, x, m, same, SLOT)
    t = m * power_of_two(-left)
    if SIGN == -1:
        t = t - tl.trans(t)
    h = t
    for i in range(1, len(ODD)):  # not unrolled: a fifth of the code, and fewer registers
        x = product(a, t, same, SLOT, PRECISION)
        x = x - tl.trans(x)
        t = product(a, x, same, SLOT, PRECISION)
        t = t + SIGN * tl.trans(t)
        factor = 0.0
        for j in tl.static_range(1, len(ODD)):
            factor = tl.where(i == j, ODD[j], factor)
        h += t * factor
    if SIGN == 1:
        dw = tl.where(row < col, 2.0 * h, tl.where(row == col, h, 0.0))
    else:
        dw = tl.where(row < col, h, 0.0)
    dw_ptr += matrix * n_cols * n_cols
    tl.store(dw_ptr + (row * n_cols + col), dw.to(dw_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """Launch numbers of the forward or the backward; `matrices` are those of one program."""

    block: int
    precision: str
    num_warps: int
    matrices: int = 1


def config(n: int, dtype: torch.dtype, backend: str = "cuda") -> Config:
    """The default for n x n matrices, which are computed in fp32, the only `dtype`.

    `tl.dot` starts at 16, so a tile is filled with as many matrices as fit on its diagonal. hip
    does not compile tf32x3, and a wave of 64 lanes has room for two tiles of 16.
    """
    precision = "ieee" if backend == "hip" else "tf32x3"
    if n > 16:
        return Config(32, precision, 2)
    return Config(16, precision, 1, 16 // slot(n) * (2 if backend == "hip" else 1))


def candidates(phase: str, n: int, dtype: torch.dtype, backend: str = "cuda") -> list[Config]:
    """Configurations to measure for "fwd" or "bwd" of n x n matrices, the default first."""
    default = config(n, dtype, backend)
    others = [replace(default, num_warps=warps) for warps in (1, 2, 4, 8)]
    if n <= 16:
        others.append(replace(default, matrices=1))
        others.append(replace(default, matrices=2 * default.matrices))
    return list(dict.fromkeys([default, *others]))


def prepare(w: torch.Tensor, sign: int, config: Config) -> tuple[()]:
    """What `expm_bwd` needs beside `w`: nothing."""
    return ()


def expm_fwd(
    w: torch.Tensor, sign: int, config: Config, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, tuple[()]]:
    """exp(A), A = triu(w, 1) - triu(w, 1)^T for sign -1, triu(w) + triu(w, 1)^T for sign 1.

    `w` is [..., n, n], n <= 32, in fp32, fp16 or bf16, of any strides. The result is new and
    contiguous, computed in fp32 and rounded to `dtype`; beside it stands what `prepare` returns.
    """
    y = torch.empty(w.shape, dtype=_stored(dtype, config), device=w.device)
    if y.numel() == 0:
        return y.to(dtype), ()
    w = _batch(w, config)
    options = _options(config, sign, w.size(1))
    grid = (triton.cdiv(w.size(0), config.matrices),)
    launch(_expm_fwd_kernel, grid, w, y, *w.shape[:2], *w.stride(), **options)
    return y.to(dtype), ()


def expm_bwd(
    g: torch.Tensor, w: torch.Tensor, saved: tuple[()], sign: int, config: Config
) -> torch.Tensor:
    """The gradient of `w`, in its dtype, from `g` [..., n, n], that of the result.

    `g` is in fp32 or in the dtype of `w`, of any strides.
    """
    dtype = w.dtype
    dw = torch.empty(w.shape, dtype=_stored(dtype, config), device=w.device)
    if dw.numel() == 0:
        return dw.to(dtype)
    g, w = _batch(g, config), _batch(w, config)
    options = _options(config, sign, w.size(1))
    grid = (triton.cdiv(w.size(0), config.matrices),)
    launch(_expm_bwd_kernel, grid, w, g, dw, *w.shape[:2], *w.stride(), *g.stride(), **options)
    return dw.to(dtype)


def _stored(dtype: torch.dtype, config: Config) -> torch.dtype:
    return torch.float32 if config.block > 16 else dtype


def n_launches(sign: int, dtype: torch.dtype, fwd: Config, bwd: Config) -> tuple[int, int]:
    """Of `expm_fwd` and `expm_bwd`."""
    return 1, 1


def _batch(x: torch.Tensor, config: Config) -> torch.Tensor:
    """[matrices, n, n]; for tiles above 16, which have no register to spare, in fp32 by rows."""
    return flatten(x.float(), 2) if config.block > 16 else x.reshape(-1, *x.shape[-2:])


def _options(config: Config, sign: int, n: int) -> dict:
    even, odd = EVEN_ODD[sign, torch.float32]
    options = {"SIGN": sign, "EVEN": even, "ODD": odd, "BLOCK": config.block}
    options |= {"PRECISION": config.precision, "num_warps": config.num_warps}
    options |= packing(n, config.block, config.matrices)
    if config.precision == "tf32x3" and config.num_warps == 1:
        options["maxnreg"] = 255  # ptxas would rather spill than pass 128
    return options | {"num_stages": 1, "enable_fp_fusion": True}


def launches(phase: str, chain: str, n: int, dtype: torch.dtype, config: Config) -> list[tuple]:
    """What a phase launches, for compiling ahead of time, as in `cayley.launches`."""
    options = _options(config, -1 if chain == "skew_exp" else 1, n)
    name = NAME[_stored(dtype, config)]
    row = f"{chain}_{phase}_{n}_{name}"
    if phase == "fwd":
        types = {"w_ptr": f"*{name}", "y_ptr": f"*{name}"}
        return [(row, _expm_fwd_kernel, types, options)]
    types = dict.fromkeys(("w_ptr", "g_ptr", "dw_ptr"), f"*{name}")
    return [(row, _expm_bwd_kernel, types, options)]


def shipped(backend: str) -> list[tuple]:
    """Default launches: with one and with several matrices to a tile, and what takes the most
    registers in 16 bits."""
    sizes = [(n, torch.float32, phase) for n in (4, 8, 16, 32) for phase in ("fwd", "bwd")]
    sizes += [(8, torch.bfloat16, "bwd"), (16, torch.bfloat16, "fwd")]
    return [
        row
        for n, dtype, phase in sizes
        for chain in ("skew_exp", "symmetric_exp")
        for row in launches(phase, chain, n, dtype, config(n, dtype, backend))
    ]
