"""A random weight under each fused chain, by the chain's name: what is checked and timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm

from tritonparam.links import CayleyMap, MatrixExponential, Skew, Symmetric
from tritonparam.orthogonal import Orthogonal
from tritonparam.register import register_parametrization

SQUARE = ("cayley", "skew_exp", "symmetric_exp", "matrix_exp")
TALL = ("tall_cayley", "tall_exp", "householder")
LAYER = ("spectral_norm", "weight_norm")
NAMES = SQUARE + TALL + LAYER


def shape(chain: str, n: int, rows: int, batch: int = 1) -> tuple[int, ...]:
    """Of a weight of n columns; square ones have as many rows, and the norms' take no batch."""
    matrix = (n, n) if chain in SQUARE else (rows, n)
    return (batch, *matrix) if batch > 1 else matrix


def weight(chain: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> nn.Module:
    """A module whose `weight` of this shape is under a chain, the same one at every call.

    Raises ValueError where no chain has that name, or it takes no batch.

    >>> weight("cayley", (3, 3), torch.float32, "cpu").weight.shape
    torch.Size([3, 3])
    """
    if chain not in NAMES:
        raise ValueError(f"the chain must be one of {', '.join(NAMES)}, got {chain!r}.")
    if chain in LAYER and len(shape) > 2:
        raise ValueError(f"{chain} is of one weight, not of a batch; leave --batch at 1.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(shape) / max(shape[-2], 1) ** 0.5
        module: Any = nn.Module()
        # A matrix for which no link has a preimage, or one that is written over: the original is x.
        module.weight = nn.Parameter(x.clone() if chain in LAYER else torch.zeros_like(x))
        first, *more = _links(chain, x)
        register_parametrization(module, "weight", first, *more, unsafe=chain in LAYER)
    if chain not in LAYER:
        with torch.no_grad():
            module.parametrizations.weight.original.copy_(x)
    return module.to(device, dtype)


def _links(chain: str, x: Tensor) -> list[nn.Module]:
    made: dict[str, Callable[[], list[nn.Module]]] = {
        "cayley": lambda: [Skew(), CayleyMap()],
        "skew_exp": lambda: [Skew(), MatrixExponential()],
        "symmetric_exp": lambda: [Symmetric(), MatrixExponential()],
        "matrix_exp": lambda: [MatrixExponential()],
        "tall_cayley": lambda: [Orthogonal("cayley", use_trivialization=False)],
        "tall_exp": lambda: [Orthogonal("matrix_exp", use_trivialization=False)],
        "householder": lambda: [Orthogonal("householder", use_trivialization=False)],
        "spectral_norm": lambda: [_SpectralNorm(x)],
        "weight_norm": lambda: [_WeightNorm()],
    }
    return made[chain]()
