"""Products of Householder reflectors by compact WY, and their gradient: nothing is waited for."""

import torch
from torch import Tensor

from tritonparam.kernels.elimination import inverse
from tritonparam.kernels.gemm import launches as product_launches
from tritonparam.kernels.gemm import product
from tritonparam.kernels.launch import compute_dtype
from tritonparam.kernels.tall import Config, flat
from tritonparam.kernels.tall import candidates as candidates
from tritonparam.kernels.tall_combine import combine
from tritonparam.kernels.tall_combine import launches as combine_launches
from tritonparam.kernels.tall_gram import gram
from tritonparam.kernels.tall_gram import launches as gram_launches

Saved = tuple[Tensor, ...]

_OF_V = {"parts": ("unit", "all")}


def householder_fwd(x: Tensor, base: Tensor | None, config: Config) -> tuple[Tensor, Saved]:
    """Q = E D - V N^{-1} V_1^T D, N + N^T = V^T V; with a base H blockdiag(D, I) Q for its H.

    V is the unit lower trapezoid of x, V_1 its first k rows, D = diag(d) the signs of x's diagonal,
    E the first k columns of I, and H = I - V N^{-1} V^T. `x` and `base` are [..., n, k] of any
    strides. Q is new and contiguous, in the compute dtype `torch.promote_types(x.dtype,
    torch.float32)`; beside it stands what `prepare` returns.
    """
    saved = prepare(x, base, config)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=compute_dtype(x.dtype), device=x.device), saved
    x_flat = flat(x, x.dtype)
    numbers = {"dtype": x_flat.dtype, "config": config}
    _, y, d, *of_base = saved
    top = torch.diag_embed(d)
    if not of_base:
        return combine((x_flat, y.mT), **_OF_V, top=top, **numbers).view(x.shape), saved
    n_inverse, signs = of_base
    q = combine((x_flat, y.mT), **_OF_V, top=top, signs=signs, **numbers)
    v = flat(base, x.dtype)
    z = product(n_inverse, gram((v,), (q,), config, **_OF_V)[0], config.small, alpha=-1.0)
    return combine((v, z), **_OF_V, c=q, **numbers).view(x.shape), saved


def prepare(x: Tensor, base: Tensor | None, config: Config) -> Saved:
    """What `householder_bwd` needs: N^{-1}, -D V_1 N^{-T} and d; for a base its N^{-1} and d."""
    if x.numel() == 0:
        return (x, x, x) if base is None else (x, x, x, x, x)
    x_flat = flat(x, x.dtype)
    n_inverse, d = _factors(x_flat, config)
    v1 = x_flat[:, : x.size(-1)]
    numbers = {"dtype": torch.float64, "config": config, "scale": -1.0, "signs": d}
    y = combine((v1, n_inverse.mT), **_OF_V, **numbers)
    of_base = () if base is None else _factors(flat(base, x.dtype), config)
    return n_inverse, y, d, *of_base


def householder_bwd(
    g: Tensor, x: Tensor, base: Tensor | None, saved: Saved, config: Config
) -> Tensor:
    """The gradient of x from `g`, that of Q, both [..., n, k]; contiguous in the compute dtype.

    With U = N^{-T} V^T G and the symmetric T whose upper triangle is that of U Y^T,
    Y = N^{-1} V_1^T D, it is what V T - G Y^T, less D U^T in the first k rows, is below the
    diagonal.
    """
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=g.dtype, device=g.device)
    n_inverse, y, d, *of_base = saved
    x_flat, g = flat(x, x.dtype), flat(g, x.dtype)
    numbers = {"dtype": x_flat.dtype, "config": config}
    if of_base:
        v, (of_v, signs) = flat(base, x.dtype), of_base
        z = product(of_v.mT, gram((v,), (g,), config, **_OF_V)[0], config.small, alpha=-1.0)
        g = combine((v, z), **_OF_V, c=g, signs=signs, **numbers)
    vg = gram((x_flat,), (g,), config, **_OF_V)[0]
    u = product(n_inverse.mT, vg, config.small, alpha=-1.0)  # -U, and y is -Y^T
    t = product(u, y, config.small, form="symmetric")
    top = (u * d.unsqueeze(-2)).mT
    dx = combine((x_flat, t), (g, y), **_OF_V, top=top, lower=True, **numbers)
    return dx.view(x.shape)


def _factors(x: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """N^{-1} and d."""
    (vv,) = gram((x,), (x,), config, parts=("unit", "unit"))
    diagonal = x.diagonal(dim1=1, dim2=2)
    d = torch.where(diagonal < 0, -1.0, 1.0).double() + 0 * diagonal
    return inverse(vv, None, "triangle"), d.contiguous()  # not if x has its batch last


def n_launches(k: int, *, based: bool) -> tuple[int, int]:
    """Of `householder_fwd` and `householder_bwd`."""
    return (9, 7) if based else (4, 4)


def launches(phase: str, chain: str, k: int, dtype: torch.dtype, config: Config) -> list[tuple]:
    """What a phase launches with a configuration, as `cayley.launches`."""
    forms = [("full", "tnn")] if phase == "fwd" else [("full", "ntn"), ("symmetric", "tnt")]
    parts = [("unit", "all")] if phase == "bwd" else [("unit", "unit"), ("unit", "all")]
    numbers = (f"{phase}_{k}", dtype, config)
    rows = gram_launches(*numbers, *parts) + combine_launches(*numbers)
    return rows + product_launches(config.small, torch.float64, forms)
