"""What is timed: the chains of ``tests/cases.py`` at sizes that people run, and against what."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.cases import CASES, Case

SQUARE = ((64, 32, 32), (64, 64), (128, 128), (256, 256), (512, 512))

# Most valuable first: a time budget cuts the list off at its end.
SHAPES: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "cayley": {
        "cpu": SQUARE,
        "cuda": (
            (1024, 32, 32),
            (4096, 16, 16),
            (1024, 64, 64),
            (64, 64),
            (4096, 8, 8),
            (64, 32, 32),
            (128, 128),
            (256, 256),
            (512, 512),
        ),
    },
    "skew_exp": {"cpu": SQUARE, "cuda": ((1024, 32, 32), *SQUARE)},
    "symmetric_exp": {"cpu": SQUARE, "cuda": ((1024, 32, 32), *SQUARE)},
    "matrix_exp": {"cpu": SQUARE[:1] + SQUARE[2:4], "cuda": SQUARE[:1] + SQUARE[2:4]},
    "tall_cayley": {"cpu": ((512, 64), (1024, 64)), "cuda": ((512, 64), (1024, 64))},
    "tall_exp": {"cpu": ((512, 64), (1024, 64)), "cuda": ((512, 64), (1024, 64))},
    "householder": {
        "cpu": ((512, 64), (512, 512), (4096, 64)),
        "cuda": ((512, 64), (512, 512), (4096, 64)),
    },
    "spectral_norm": {"cpu": ((512, 4608),), "cuda": ((512, 4608),)},
    "weight_norm": {"cpu": ((512, 4608),), "cuda": ((512, 4608),)},
}

# The spectral norm of what the map is applied to; other chains take 1.
NORMS = {"skew_exp": torch.pi, "symmetric_exp": torch.pi}

# Where the baseline is not the composed chain but torch's orthogonal() with the same map, which
# makes n × n matrices of a tall weight.
_TORCH = {"tall_cayley": "cayley", "tall_exp": "matrix_exp", "householder": "householder"}


def rows(kind: str) -> list[tuple[Case, tuple[int, ...]]]:
    """The chains and shapes timed on a kind of device, "cpu" or "cuda"."""
    cases = [case for case in CASES if case.name in SHAPES]
    return [(case, shape) for case in cases for shape in SHAPES[case.name][kind]]


def torchs_own(case: Case) -> Callable[[Tensor], nn.Module] | None:
    """Makes torch's module for an original, where that is the baseline."""
    if case.name not in _TORCH:
        return None

    def make(original: Tensor) -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(original.detach().clone())
        parametrizations.orthogonal(module, "weight", _TORCH[case.name], use_trivialization=False)
        with torch.no_grad():
            x = module.parametrizations.weight.original.copy_(original)
            # The diagonal of the Householder map is its signs, which torch truncates.
            x.diagonal().copy_(torch.where(x.diagonal() < 0, -1.0, 1.0))
        return module

    return make
