"""What the tall maps along a curve share: W = B F + P U with k x k matrices F and U.

Those are functions of Omega and P^T P. With a base B, C = B^T X, Omega = (C - C^T) / 2 and
P = X - B C. Without one B is the first k columns of I, Omega = C - C^T for the part C of X below
the diagonal of its first k rows, and P the rows below those. P is never made: its products follow
from those of X and B, which are exact in fp64.
"""

import torch
from torch import Tensor

from tritonparam.kernels.gemm import launches as product_launches
from tritonparam.kernels.gemm import product
from tritonparam.kernels.tall import Config
from tritonparam.kernels.tall_combine import combine
from tritonparam.kernels.tall_combine import launches as combine_launches
from tritonparam.kernels.tall_gram import gram
from tritonparam.kernels.tall_gram import launches as gram_launches

_BELOW = ("below", "below")


def moments(x: Tensor, base: Tensor | None, config: Config) -> tuple[Tensor, Tensor, Tensor | None]:
    """P^T P, C and, with a base, B^T B C - 2 C, which is -C up to what B lacks in orthogonality.

    All are [matrices, k, k], for x and base [matrices, n, k]. Without a base C is x's first rows.
    """
    if base is None:
        return gram((x,), (x,), config, parts=_BELOW)[0], x[:, : x.size(2)], None
    xx, _, c, bb = gram((x, base), (x, base), config)
    t = product(bb, c, config.small, c=c, beta=-2.0)
    return product(c.mT, t, config.small, c=xx, form="symmetric"), c, t


def value(
    x: Tensor,
    base: Tensor | None,
    c: Tensor | None,
    top: Tensor,
    u: Tensor,
    config: Config,
    *,
    scale: float = 1.0,
    alpha: float = 1.0,
    gamma: float = 0.0,
) -> Tensor:
    """W for F = alpha top + gamma I and U = scale u, in x's dtype."""
    add = {"alpha": alpha, "gamma": gamma}
    numbers = {"dtype": x.dtype, "config": config, "scale": scale}
    if base is None:
        return combine((x, u), parts=_BELOW, top=top, **add, **numbers)
    v = product(c, u, config.small, alpha=-scale, c=top, beta=alpha, gamma=gamma)
    return combine((x, u), (base, v), **numbers)


def gradient_moments(
    g: Tensor, x: Tensor, base: Tensor | None, c: Tensor | None, config: Config
) -> tuple[Tensor, Tensor]:
    """B^T G and P^T G for the gradient G of W."""
    if base is None:
        return g[:, : g.size(2)], gram((x,), (g,), config, parts=_BELOW)[0]
    xg, bg = gram((x, base), (g,), config)
    return bg, product(c.mT, bg, config.small, alpha=-1.0, c=xg)


def gradient(
    g: Tensor,
    x: Tensor,
    base: Tensor | None,
    t: Tensor | None,
    bg: Tensor,
    u: Tensor,
    v: Tensor,
    d: Tensor,
    config: Config,
    *,
    scale: float = 1.0,
) -> Tensor:
    """The gradient of X for U = scale u, in x's dtype.

    `v` is that of P^T P plus its transpose, `d` that of Omega less its transpose, and `bg` B^T G.
    With dP = G U^T + P V it is dP + B (D / 2 - B^T dP).
    """
    numbers = {"dtype": x.dtype, "config": config, "scale": scale}
    if base is None:
        return combine((g, u.mT), (x, v), parts=_BELOW, top=d, lower=True, **numbers)
    w = product(t, v, config.small, c=d, beta=0.5)
    w = product(bg, u.mT, config.small, alpha=-scale, c=w)
    return combine((g, u.mT), (x, v), (base, w), **numbers)


# Of `moments` and `value`, and of `gradient_moments` and `gradient`, by whether there is a base.
N_LAUNCHES = {False: (2, 2), True: (5, 5)}


def launches(phase: str, chain: str, k: int, dtype: torch.dtype, config: Config) -> list[tuple]:
    """What a phase launches, with a base and without, as `cayley.launches`."""
    forms = [("full", "tnn"), ("symmetric", "tnt")]
    if phase == "bwd":
        forms = [("full", "ntn"), ("sum", "tnt"), ("difference", "tnt")]
    parts = (_BELOW, ("all", "all"))
    numbers = (f"{phase}_{k}", dtype, config)
    rows = gram_launches(*numbers, *parts) + combine_launches(*numbers)
    return rows + product_launches(config.small, torch.float64, forms)
