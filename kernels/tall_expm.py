"""Exponential of tall matrices by one of 2k x 2k, and its gradient: nothing is waited for.

K = [[Omega, -P^T P / b], [b I, 0]] is not normal: Taylor's polynomial of degree 18 in five products
(Bader, Blanes & Casas 2019), and squarings, as many for each matrix as a schedule on the device
says, of which the first return at once. Everything k x k is in fp64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonparam.kernels import curve, gemm
from tritonparam.kernels.gemm import product
from tritonparam.kernels.launch import compute_dtype
from tritonparam.kernels.tall import Config, flat
from tritonparam.kernels.tile import exponent, power_of_two

Saved = tuple[Tensor, ...]

# Squarings that are launched, an even number: enough for norms of K up to THETA 2^ROUNDS = 17,900.
ROUNDS = 14
THETA = 1.091  # up to which the polynomial is exact to fp64 (the paper, table 1)

# L, B1, B2, B3 and R over I, A, A^2, A^3 and A^6: with Y = B3 + L R, exp(A) ~ B1 + (B2 + Y) Y.
TAYLOR = (
    *(0.0, -0.10036558103014462, -0.0080292464824115696, -0.00089213849804572998, 0.0),
    *(0.0, 0.39784974949964508, 1.3678377846041172, 0.49828962252538267, -0.00063789819459472328),
    *(-10.967639605296206, 1.6801581387890621, 0.05717798464788655, -0.0069821012248805206),
    *(3.3497501708607047e-05, -0.090431683239081062, -0.067640451907138188),
    *(0.067596130177045966, 0.029555257042931552, -1.3918025751606069e-05),
    *(0.0, 0.0, -0.092336461936711856, -0.016936493900208172, -1.4008679818203610e-05),
)


@triton.jit
def _sum_of_squares(ptr, n_entries, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_entries, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        x = tl.load(ptr + entry, mask=entry < n_entries, other=0.0)
        total += x * x
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["n_entries"])
def _schedule_kernel(
    a_ptr,
    a2_ptr,
    a3_ptr,
    sigma_ptr,
    first_ptr,
    n_entries,
    ROUNDS: tl.constexpr,
    THETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sigma = 2^-s with the least s for which THETA 2^s is above the norm, and the first round.

    The norm is max(||A^2||^(1/2), ||A^3||^(1/3)), which bounds the remainder (Al-Mohy & Higham
    2009, theorem 4.2), kept above ||A|| / 4, beyond which the polynomial cancels; by Frobenius.
    """
    matrix = tl.program_id(0).to(tl.int64)
    offset = matrix * n_entries
    norm = tl.sqrt(_sum_of_squares(a_ptr + offset, n_entries, BLOCK).to(tl.float32))
    square = _sum_of_squares(a2_ptr + offset, n_entries, BLOCK).to(tl.float32)
    cube = _sum_of_squares(a3_ptr + offset, n_entries, BLOCK).to(tl.float32)
    bound = tl.maximum(tl.sqrt(tl.sqrt(square)), tl.exp2(tl.log2(cube) / 6.0))
    bound = tl.minimum(tl.maximum(bound, norm * 0.25), norm) + (norm - norm)
    s = tl.maximum(exponent(bound * (1.0 / THETA)), 0)
    too_large = s > ROUNDS  # or not a number
    s = tl.minimum(s, ROUNDS)
    sigma = tl.where(too_large, float("nan"), power_of_two(-s))
    tl.store(sigma_ptr + matrix, sigma.to(tl.float64))
    tl.store(first_ptr + matrix, ROUNDS - s)


@triton.jit(do_not_specialize=["n_matrices", "n_entries", "n_cols"])
def _rows_kernel(
    a_ptr,
    a2_ptr,
    a3_ptr,
    a6_ptr,
    sigma_ptr,
    out_ptr,
    n_matrices,
    n_entries,
    n_cols,
    TAYLOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows of TAYLOR for A sigma, out[row]."""
    matrix = (tl.program_id(0) // tl.cdiv(n_entries, BLOCK)).to(tl.int64)
    entry = tl.program_id(0) % tl.cdiv(n_entries, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < n_entries
    offset = matrix * n_entries + entry
    sigma = tl.load(sigma_ptr + matrix)
    cubed = sigma * sigma * sigma
    a = tl.load(a_ptr + offset, mask=mask, other=0.0) * sigma
    a2 = tl.load(a2_ptr + offset, mask=mask, other=0.0) * (sigma * sigma)
    a3 = tl.load(a3_ptr + offset, mask=mask, other=0.0) * cubed
    a6 = tl.load(a6_ptr + offset, mask=mask, other=0.0) * (cubed * cubed)
    eye = tl.where(entry // n_cols == entry % n_cols, 1.0, 0.0).to(tl.float64)
    for i in tl.static_range(5):
        row = eye * tl.full([], TAYLOR[5 * i], tl.float64)
        row += a * tl.full([], TAYLOR[5 * i + 1], tl.float64)
        row += a2 * tl.full([], TAYLOR[5 * i + 2], tl.float64)
        row += a3 * tl.full([], TAYLOR[5 * i + 3], tl.float64)
        row += a6 * tl.full([], TAYLOR[5 * i + 4], tl.float64)
        tl.store(out_ptr + (i * n_matrices * n_entries.to(tl.int64) + offset), row, mask=mask)


def tall_expm_fwd(x: Tensor, base: Tensor | None, config: Config) -> tuple[Tensor, Saved]:
    """W = B E_top + P E_bottom / b, E the first k columns of exp(K); and what `prepare` returns.

    Omega, P and, for base None, B are those of `curve`, and b = sqrt(trace(P^T P) / k) balances K;
    W does not depend on it. `x` and `base` are [..., n, k] of any strides. W is new and contiguous,
    in the compute dtype `torch.promote_types(x.dtype, torch.float32)`. Where x is not finite, or
    too large for ROUNDS squarings, it is NaN.
    """
    if x.numel() == 0:
        empty = torch.empty(x.shape, dtype=compute_dtype(x.dtype), device=x.device)
        return empty, prepare(x, base, config)
    top, saved = _factors(x, base, config)
    c = None if base is None else saved[5]
    w = curve.value(*_flat(x, base), c, top, saved[0], config)
    return w.view(x.shape), saved


def prepare(x: Tensor, base: Tensor | None, config: Config) -> Saved:
    """What `tall_expm_bwd` needs: E_bottom / b, K, b, sigma, the first round; for a base C, T."""
    if x.numel() == 0:
        return (x,) * (5 if base is None else 7)
    return _factors(x, base, config)[1]


def tall_expm_bwd(
    g: Tensor, x: Tensor, base: Tensor | None, saved: Saved, config: Config
) -> Tensor:
    """The gradient of x from `g`, that of W, both [..., n, k]; contiguous in the compute dtype.

    That of K is the block above the diagonal of exp([[K^T, G], [0, K^T]]), G = [B^T G, 0] over
    [P^T G / b, 0] (Al-Mohy & Higham 2009, equation 1.2). It is linear in G: the scaling is K's.
    """
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=g.dtype, device=g.device)
    u, argument, b, sigma, first, *of_base = saved
    c, t = of_base or (None, None)
    k = x.size(-1)
    x_flat, base_flat = _flat(x, base)
    g = flat(g, x.dtype)
    bg, pg = curve.gradient_moments(g, x_flat, base_flat, c, config)
    twice = argument.new_zeros(g.size(0), 4 * k, 4 * k)
    twice[:, : 2 * k, : 2 * k] = twice[:, 2 * k :, 2 * k :] = argument.mT
    twice[:, :k, 2 * k : 3 * k] = bg
    twice[:, k : 2 * k, 2 * k : 3 * k] = pg / b
    h = _exp(*_powers(twice, config.small), sigma, first, config.small)[:, :k, 2 * k :]
    d = h[:, :, :k] - h[:, :, :k].mT
    v = h[:, :, k:] / -b
    at = (g, x_flat, base_flat, t, bg, u)
    return curve.gradient(*at, v + v.mT, d, config).view(x.shape)


def _factors(x: Tensor, base: Tensor | None, config: Config) -> tuple[Tensor, Saved]:
    """E_top, and what `prepare` returns."""
    k = x.size(-1)
    pp, c, t = curve.moments(*_flat(x, base), config)
    b = pp.diagonal(dim1=1, dim2=2).mean(-1).sqrt()
    b = torch.where(b > 0, b, 1.0)[:, None, None]
    half = c.tril(-1) if t is None else c / 2
    argument = pp.new_zeros(pp.size(0), 2 * k, 2 * k)
    argument[:, :k, :k] = half - half.mT
    argument[:, :k, k:] = pp / -b
    argument[:, k:, :k].diagonal(dim1=1, dim2=2).copy_(b[:, 0])
    a, a2, a3 = _powers(argument, config.small)
    sigma = torch.empty(a.size(0), dtype=a.dtype, device=a.device)
    first = torch.empty(a.size(0), dtype=torch.int32, device=a.device)
    options = _schedule_options()
    _schedule_kernel[(a.size(0),)](a, a2, a3, sigma, first, 4 * k * k, **options)
    e = _exp(a, a2, a3, sigma, first, config.small)
    saved = (e[:, k:, :k] / b, argument, b, sigma, first)
    return e[:, :k, :k], saved if t is None else (*saved, c, t)


def _powers(a: Tensor, config: gemm.Config) -> tuple[Tensor, Tensor, Tensor]:
    a2 = product(a, a, config)
    return a, a2, product(a2, a, config)


def _exp(
    a: Tensor, a2: Tensor, a3: Tensor, sigma: Tensor, first: Tensor, config: gemm.Config
) -> Tensor:
    """exp(A), contiguous, from A, A^2, A^3, sigma and the first round that squares."""
    n_matrices, n, _ = a.shape
    a6 = product(a3, a3, config)
    rows = torch.empty((5, *a.shape), dtype=a.dtype, device=a.device)
    options = _rows_options()
    grid = (n_matrices * triton.cdiv(n * n, options["BLOCK"]),)
    _rows_kernel[grid](a, a2, a3, a6, sigma, rows, n_matrices, n * n, n, **options)
    left, b1, b2, b3, right = rows.unbind()
    y = product(left, right, config, c=b3)
    y = product(b2 + y, y, config, c=b1)
    ys = [y, y.clone()]
    for turn in range(ROUNDS):
        source, out = ys[turn % 2], ys[(turn + 1) % 2]
        product(source, source, config, out=out, first=first, turn=turn)
    return y


def _flat(x: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return flat(x, x.dtype), None if base is None else flat(base, x.dtype)


def _schedule_options() -> dict:
    options: dict = {"ROUNDS": ROUNDS, "THETA": THETA, "BLOCK": 4096}
    return options | {"num_warps": 8, "enable_fp_fusion": True}


def _rows_options() -> dict:
    return {"TAYLOR": TAYLOR, "BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}


def shipped(backend: str) -> list[tuple]:
    """What is launched beside products, for compiling ahead of time, as `cayley.shipped`."""
    powers = ("a_ptr", "a2_ptr", "a3_ptr", "a6_ptr", "sigma_ptr", "out_ptr")
    types = dict.fromkeys(powers, "*fp64")
    of_schedule = {key: types[key] for key in (*powers[:3], "sigma_ptr")} | {"first_ptr": "*i32"}
    return [
        ("tall_expm_schedule_fp64", _schedule_kernel, of_schedule, _schedule_options()),
        ("tall_expm_rows_fp64", _rows_kernel, types, _rows_options()),
    ]
