"""What is timed: the chains of ``tests/cases.py`` at sizes that people run, and against what."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.cases import CASES, Case

SQUARE = ((64, 32, 32), (64, 64), (128, 128), (256, 256), (512, 512))
CPU: dict[str, tuple[tuple[int, ...], ...]] = {
    "cayley": SQUARE,
    "skew_exp": SQUARE,
    "symmetric_exp": SQUARE,
    "matrix_exp": SQUARE[:1] + SQUARE[2:4],
    "tall_cayley": ((512, 64), (1024, 64)),
    "tall_exp": ((512, 64), (1024, 64)),
    "householder": ((512, 64), (512, 512), (4096, 64)),
    "spectral_norm": ((512, 4608),),
    "weight_norm": ((512, 4608),),
}

# The weights of the 20 convolutions of a ResNet-18 for small images.
LAYERS = (
    (64, 27),
    *[(64, 576)] * 4,
    *((128, 576), (128, 64), *[(128, 1152)] * 3),
    *((256, 1152), (256, 128), *[(256, 2304)] * 3),
    *((512, 2304), (512, 256), *[(512, 4608)] * 3),
)


@dataclass(frozen=True)
class Timed:
    """Weights of one chain that are read together, and whether a graph of that is replayed too."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    graph: bool = False

    @property
    def case(self) -> Case:
        """Of the chain."""
        return next(case for case in CASES if case.name == self.name)


_MAPS = ("cayley", "skew_exp", "symmetric_exp")
_TALL = ("tall_cayley", "tall_exp", "householder")


def _each(
    names: tuple[str, ...], *shapes: tuple[int, ...], graph: bool = False
) -> tuple[Timed, ...]:
    return tuple(Timed(name, (shape,), graph) for shape in shapes for name in names)


# Most valuable first: a time budget cuts the list off at its end. So each kind has one size before
# any has another; and Inductor, which unrolls the reflectors, has its longest work at the end.
CUDA = (
    *_each(_MAPS, (1024, 32, 32), (256, 256), graph=True),
    Timed("spectral_norm", LAYERS, graph=True),
    *_each(_MAPS, (1024, 1024)),
    *_each(_TALL[:2], (4096, 64)),
    *_each(_MAPS, (4096, 16, 16), (1024, 64, 64), (128, 128), (512, 512), graph=True),
    *_each(_MAPS, (2048, 2048)),
    *_each(_TALL[:2], (30000, 50)),
    *_each(_TALL[2:], (4096, 64), (30000, 50)),
    Timed("weight_norm", LAYERS, graph=True),
)

# Weights n × n of which one read is timed, and with a backward pass where that says so: on the CPU
# they cost less than what surrounds them.
SMALL_READS: dict[str, tuple[tuple[str, int, bool], ...]] = {
    "cpu": (
        ("cayley", 8, True),
        ("cayley", 64, False),
        ("cayley", 64, True),
        ("weight_norm", 64, False),
        ("weight_norm", 64, True),
    ),
    "cuda": (),
}

# What is timed of a step.
BOTH, FORWARD, BACKWARD = "forward+backward", "forward", "backward"
PHASES = (BOTH, FORWARD, BACKWARD)

# The spectral norm of what the map is applied to; other chains take 1.
NORMS = {"skew_exp": torch.pi, "symmetric_exp": torch.pi}

# The chains whose weights are orthogonal, and the map of torch's orthogonal() that does the same.
# It makes n × n matrices of a tall weight, and is the baseline there, not the composed chain.
ORTHOGONAL = {
    "cayley": "cayley",
    "skew_exp": "matrix_exp",
    "tall_cayley": "cayley",
    "tall_exp": "matrix_exp",
    "householder": "householder",
}

# Products of n × n matrices that forward and backward need at least: an inverse counts as one, the
# exponentials are even/odd series of six products of symmetric matrices, which are half as dear,
# and ten of any; without squarings.
_PRODUCTS = {"cayley": (1, 2), "skew_exp": (3, 10), "symmetric_exp": (3, 10), "matrix_exp": (4, 8)}
# Operations of what is k × k inside a tall map, in k³: the exponential's is 2k × 2k.
_INSIDE = {"tall_cayley": (2, 4), "tall_exp": (3 * 2 * 2**3, 10 * 2 * 2**3), "householder": (1, 1)}


def rows(kind: str) -> list[Timed]:
    """What is timed on a kind of device, "cpu" or "cuda"."""
    if kind == "cuda":
        return list(CUDA)
    names = [case.name for case in CASES if case.name in CPU]
    return [Timed(name, (shape,)) for name in names for shape in CPU[name]]


def least(name: str, shape: tuple[int, ...], phase: str = BOTH) -> tuple[int, int]:
    """Bytes and operations that a phase of one fp32 weight cannot do without.

    Forward reads the original and writes the weight; backward reads what comes in and one saved
    tensor, and writes the gradient.
    """
    n, k = shape[-2:]
    batch = math.prod(shape[:-2])
    n_bytes = [4 * tensors * math.prod(shape) for tensors in (2, 3)]
    operations = [2 * products * batch * k**3 for products in _PRODUCTS.get(name, (0, 0))]
    if name in _TALL:  # a Gram matrix and a product, twice that backward; and what is k × k
        outside = [3 * n * k**2, 6 * n * k**2]
        operations = [
            batch * (thin + inside * k**3)
            for thin, inside in zip(outside, _INSIDE[name], strict=True)
        ]
    parts = {FORWARD: slice(0, 1), BACKWARD: slice(1, 2), BOTH: slice(0, 2)}[phase]
    return sum(n_bytes[parts]), sum(operations[parts])


def torchs_bytes(name: str, shape: tuple[int, ...]) -> int:
    """What torch's own ``orthogonal`` holds of n × n matrices in forward and backward, about."""
    matrices = {"tall_cayley": 10, "tall_exp": 60, "householder": 6}  # its exp: 2n × 2n backward
    return matrices.get(name, 0) * 4 * max(shape) ** 2


def compiles(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Inductor gets through torch's chain: it unrolls a step per Householder reflector.

    At 512 × 512 it is not done after eight minutes, on a CPU.
    """
    return name != "householder" or shape[-1] <= 64


def torchs_own(case: Case) -> Callable[[Tensor], nn.Module] | None:
    """Makes torch's module for an original, where that is the baseline."""
    if case.name in _TALL:
        return lambda original: torchs_orthogonal(original, ORTHOGONAL[case.name])
    if case.name.endswith("_exp"):
        return lambda original: torchs_exponential(case, original)
    return None


class Exponential(nn.Module):
    """What one writes without our links, which take a lone matrix in a batch of two."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.argument = case.argument

    def forward(self, x: Tensor) -> Tensor:
        return torch.matrix_exp(self.argument(x) if self.argument else x)


def torchs_exponential(case: Case, original: Tensor) -> nn.Module:
    """A module whose weight is ``torch.matrix_exp`` of the argument that an original makes."""
    module = nn.Module()
    module.weight = nn.Parameter(original.detach().clone())
    parametrize.register_parametrization(module, "weight", Exponential(case))
    return module


def torchs_orthogonal(original: Tensor, orthogonal_map: str) -> nn.Module:
    """A module whose weight is torch's ``orthogonal`` of an original, without a base point."""
    module = nn.Module()
    module.weight = nn.Parameter(original.detach().clone())
    parametrizations.orthogonal(module, "weight", orthogonal_map, use_trivialization=False)
    with torch.no_grad():
        x = module.parametrizations.weight.original.copy_(original)
        # The diagonal of the Householder map is its signs, which torch truncates; others ignore it.
        x.diagonal(dim1=-2, dim2=-1).copy_(signs(original))
    return module


def signs(original: Tensor) -> Tensor:
    """Of the columns that the Householder map makes of an original."""
    return torch.where(original.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
