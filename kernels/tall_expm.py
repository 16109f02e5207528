"""Exponential of tall matrices by one of 2k x 2k, and its gradient: nothing is waited for.

K = [[Omega, -P^T P / b], [b I, 0]] is not normal: `taylor`. For few columns, `tall_tile`, one
program computes all that is k x k; beyond, it is a sequence of products. All is in fp64.
"""

import torch
from torch import Tensor

from tritonparam.kernels import curve, tall_blocks, tall_tile, taylor
from tritonparam.kernels.curve import launches as launches
from tritonparam.kernels.launch import compute_dtype
from tritonparam.kernels.tall import Config, flat
from tritonparam.kernels.tall import candidates as candidates

Saved = tuple[Tensor, ...]


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
    u, argument, b, *scheduled, c, t = saved if base is not None else (*saved, None, None)
    x_flat, base_flat = _flat(x, base)
    g = flat(g, x.dtype)
    bg, pg = curve.gradient_moments(g, x_flat, base_flat, c, config)
    if x.size(-1) <= tall_tile.MAX_K_BWD:
        d, v = tall_tile.exp_bwd(bg, pg, argument, b, *scheduled)
    else:
        both = tall_blocks.twice(argument, bg, pg, b)
        ys, _ = taylor.exp(both, config.small, scheduled=tuple(scheduled))
        d, v = tall_blocks.gradients(ys, scheduled[1], b)
    at = (g, x_flat, base_flat, t, bg, u)
    return curve.gradient(*at, v, d, config).view(x.shape)


def _factors(x: Tensor, base: Tensor | None, config: Config) -> tuple[Tensor, Saved]:
    """E_top, and what `prepare` returns."""
    pp, c, t = curve.moments(*_flat(x, base), config)
    if x.size(-1) <= tall_tile.MAX_K:
        top, saved = tall_tile.exp(pp, c, lower=base is None)
    else:
        argument, b, squares = tall_blocks.small(pp, c, lower=base is None)
        ys, scheduled = taylor.exp(argument, config.small, squares=squares)
        top, u = tall_blocks.columns(ys, scheduled[1], b)
        saved = (u, argument, b, *scheduled)
    return top, saved if t is None else (*saved, c, t)


def _flat(x: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return flat(x, x.dtype), None if base is None else flat(base, x.dtype)


def n_launches(k: int, *, based: bool) -> tuple[int, int]:
    """Of `tall_expm_fwd` and `tall_expm_bwd`."""
    in_steps = taylor.N_LAUNCHES + 2  # one makes the argument, one takes the result apart
    forward, backward = curve.N_LAUNCHES[based]
    forward += 1 if k <= tall_tile.MAX_K else in_steps
    return forward, backward + (1 if k <= tall_tile.MAX_K_BWD else in_steps)
