"""Shapes and strides of tall originals, the same for every tall map."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = ((1, 1), (5, 1), (5, 3), (13, 13), (64, 64), (65, 64), (130, 33), (3, 9, 4), (2, 3, 7, 7))
EMPTY = ((0, 0), (3, 0), (0, 5, 3), (2, 0, 3, 2), (2, 0, 0))


def strided() -> tuple[Tensor, ...]:
    """By columns, every other column, one matrix for a batch, and the batch beside the rows."""
    return (
        torch.randn(4, 9, dtype=torch.float64).mT,
        torch.randn(9, 8, dtype=torch.float64)[:, ::2],
        torch.randn(9, 4, dtype=torch.float64).expand(3, 9, 4),
        torch.randn(2, 4, 3, 9, dtype=torch.float64).permute(2, 0, 3, 1),
    )
