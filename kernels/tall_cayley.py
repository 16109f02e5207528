"""Cayley map of tall matrices by one k x k system, and its gradient: nothing is waited for."""

import torch
from torch import Tensor

from tritonparam.kernels import curve
from tritonparam.kernels.curve import launches as launches
from tritonparam.kernels.elimination import inverse
from tritonparam.kernels.gemm import product
from tritonparam.kernels.launch import compute_dtype
from tritonparam.kernels.tall import Config, flat
from tritonparam.kernels.tall import candidates as candidates

Saved = tuple[Tensor, ...]


def tall_cayley_fwd(
    x: Tensor, base: Tensor | None, a: float, config: Config
) -> tuple[Tensor, Saved]:
    """W = B (2 M - I) + 2 a P M, M = (I - a Omega + a^2 P^T P)^{-1}; and what `prepare` returns.

    Omega, P and, for base None, B are those of `curve`; `x` and `base` are [..., n, k] of any
    strides. W is new and contiguous, in the compute dtype `torch.promote_types(x.dtype,
    torch.float32)`. Where x is not finite it is NaN.
    """
    saved = prepare(x, base, a, config)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=compute_dtype(x.dtype), device=x.device), saved
    m, c, _ = _present(saved)
    factors = {"scale": 2 * a, "alpha": 2.0, "gamma": -1.0}
    w = curve.value(*_flat(x, base), c, m, m, config, **factors)
    return w.view(x.shape), saved


def prepare(x: Tensor, base: Tensor | None, a: float, config: Config) -> Saved:
    """What `tall_cayley_bwd` needs: M, and for a base C and B^T B C - 2 C."""
    if x.numel() == 0:
        return (x,) if base is None else (x, x, x)
    gram, c, t = curve.moments(*_flat(x, base), config)
    if t is None:
        m = inverse(gram, c, "lower", a, a * a)
        return (m.view(*x.shape[:-2], *m.shape[1:]),)
    return inverse(gram, c, "skew", a / 2, a * a), c, t


def tall_cayley_bwd(
    g: Tensor, x: Tensor, base: Tensor | None, saved: Saved, a: float, config: Config
) -> Tensor:
    """The gradient of x from `g`, that of W, both [..., n, k]; contiguous in the compute dtype.

    With T = M^T 2 (B^T G + a P^T G) the gradient of I - a Omega + a^2 P^T P is H = -T M^T.
    """
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=g.dtype, device=g.device)
    m, c, t = _present(saved)
    x_flat, base_flat = _flat(x, base)
    g = flat(g, x.dtype)
    bg, pg = curve.gradient_moments(g, x_flat, base_flat, c, config)
    th = product(m.mT, bg.add(pg, alpha=a), config.small, alpha=2.0)
    v = product(th, m.mT, config.small, alpha=-a * a, form="sum")  # a^2 (H + H^T)
    d = product(th, m.mT, config.small, alpha=a, form="difference")  # a (H^T - H)
    at = (g, x_flat, base_flat, t, bg)
    return curve.gradient(*at, m, v, d, config, scale=2 * a).view(x.shape)


def _present(saved: Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
    m, c, t = (*saved, None, None)[:3]
    return m.reshape(-1, *m.shape[-2:]).double(), c, t


def _flat(x: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return flat(x, x.dtype), None if base is None else flat(base, x.dtype)


def n_launches(k: int, *, based: bool) -> tuple[int, int]:
    """Of `tall_cayley_fwd` and `tall_cayley_bwd`: beside the curve's an inverse, three products."""
    forward, backward = curve.N_LAUNCHES[based]
    return forward + 1, backward + 3
