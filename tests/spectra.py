"""Skew matrices that are hard on elimination, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(n: int) -> Tensor:
    return torch.randn(n, n, dtype=torch.float64)


def zero_diagonal_blocks(n: int) -> Tensor:
    x = gaussian(n)
    half = (n + 1) // 2
    x[:half, :half] = 0
    x[half:, half:] = 0
    return x


def low_rank(n: int) -> Tensor:
    return torch.outer(*torch.randn(2, n, dtype=torch.float64))


def log_spread(n: int) -> Tensor:
    """Rotation rates from 1 down to 1e-3."""
    x = torch.zeros(n, n, dtype=torch.float64)
    i = 2 * torch.arange(n // 2)
    x[i, i + 1] = torch.logspace(0, -3, n // 2, dtype=torch.float64)
    basis = torch.linalg.qr(gaussian(n)).Q
    return basis @ x @ basis.mT


SPECTRA = (gaussian, zero_diagonal_blocks, low_rank, log_spread)


def with_norm(x: Tensor, norm: float) -> Tensor:
    """The skew part of x, scaled to this spectral norm; zero stays zero."""
    x = x - x.mT
    return x * (norm / torch.linalg.matrix_norm(x, 2).clamp_min(1e-300))
