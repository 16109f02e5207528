"""Other code that does the job of a row with a parametrization of its own, where it is installed.

torch's ``orthogonal`` (where it is not the baseline), geotorch, torch-householder, and PEFT's
orthogonal fine-tuning. Each is set to the same map of the same argument, so that its value is that
of the row; geotorch's positive definite matrices are another map onto the same manifold. PEFT's
default is five terms of the Neumann series of the Cayley map, which is near it for small norms.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.cases import ORTHOGONAL, signs, torchs_orthogonal
from tests.cases import Case

# geotorch makes n × n matrices of a tall weight, and more of them than torch when it registers.
LARGEST = 4096


def _argument(case: Case, original: Tensor) -> Tensor:
    """The original of X -> (I + A / 2)(I - A / 2)⁻¹ or exp(A), A = tril(X) - tril(X)ᵀ."""
    if case.argument is None:
        return original  # a tall weight: ours is the same
    return case.argument(original) * (2 if case.name == "cayley" else 1)


def _torch(case: Case, original: Tensor) -> nn.Module:
    return torchs_orthogonal(_argument(case, original), ORTHOGONAL[case.name])


def _geotorch(case: Case, original: Tensor) -> nn.Module:
    import geotorch

    module = nn.Module()
    module.weight = nn.Parameter(torch.empty_like(original))
    if case.name == "symmetric_exp":
        return geotorch.positive_definite(module)
    triv = {"cayley": "cayley", "matrix_exp": "expm"}[ORTHOGONAL[case.name]]
    geotorch.orthogonal(module, triv=triv)
    plist = module.parametrizations.weight
    with torch.no_grad():
        plist.original.copy_(_argument(case, original))
        plist[0].base.copy_(torch.eye(plist[0].n))
    return module


class Reflectors(nn.Module):
    """torch-householder's product of the reflectors in a tall matrix, with signs as in torch."""

    def __init__(self, original: Tensor) -> None:
        super().__init__()
        self.original = nn.Parameter(original.detach().clone())
        eye = torch.eye(*original.shape, device=original.device)
        self.register_buffer("eye", eye)
        self.register_buffer("signs", eye * signs(original))

    @property
    def weight(self) -> Tensor:
        from torch_householder import torch_householder_orgqr

        return torch_householder_orgqr(self.original.tril(-1) + self.eye, eye=self.signs)


class Rotations(nn.Module):
    """The blocks by which PEFT's orthogonal fine-tuning multiplies a weight, at its defaults."""

    def __init__(self, argument: Tensor) -> None:
        from peft.tuners.oft.layer import OFTRotationModule

        super().__init__()
        self.shape = argument.shape
        blocks = argument.reshape(-1, *argument.shape[-2:])
        r, n, _ = blocks.shape
        rows, columns = torch.triu_indices(n, n, 1)
        self.blocks = OFTRotationModule(r, n * (n - 1) // 2, n, r * n).to(argument.device)
        with torch.no_grad():
            self.blocks.weight.copy_(blocks[:, rows, columns])

    @property
    def weight(self) -> Tensor:
        # What its forward multiplies by: the public get_weight makes one matrix of all blocks.
        b = self.blocks
        terms = b.num_cayley_neumann_terms
        q = b._cayley_batch(b.weight, b.block_size, b.use_cayley_neumann, terms)
        return q.reshape(self.shape)


@dataclass(frozen=True)
class Peer:
    """A contender from elsewhere.

    Attributes:
        name: of the contender, and of the distribution.
        module: what is imported of it.
        chains: whose job it does.
        make: a module for an original whose ``weight`` is the constrained one.
        approximate: whether the constraint is met only as well as a truncated series does.
        other_map: the chains whose manifold it maps onto, and not as they do.
        tall: the largest n of a tall weight.
    """

    name: str
    module: str
    chains: tuple[str, ...]
    make: Callable[[Case, Tensor], nn.Module]
    approximate: bool = False
    other_map: tuple[str, ...] = ()
    tall: float = float("inf")

    def available(self) -> bool:
        """Whether it is installed; a warning where it is and does not load."""
        if find_spec(self.module.split(".")[0]) is None:
            return False
        try:
            importlib.import_module(self.module)
        except Exception as error:  # of other people's code
            warnings.warn(f"{self.name} is installed but does not load: {error}", stacklevel=2)
            return False
        return True


PEERS = (
    Peer("torch", "torch", ("cayley", "skew_exp"), _torch),
    Peer(
        name="geotorch",
        module="geotorch",
        chains=("cayley", "skew_exp", "symmetric_exp", "tall_cayley", "tall_exp"),
        make=_geotorch,
        other_map=("symmetric_exp",),
        tall=LARGEST,
    ),
    Peer(
        name="torch-householder",
        module="torch_householder",
        chains=("householder",),
        make=lambda case, original: Reflectors(original),
    ),
    Peer(
        name="peft",
        module="peft.tuners.oft.layer",
        chains=("cayley",),
        make=lambda case, original: Rotations(case.argument(original)),
        approximate=True,
    ),
)


def peers(chain: str, shape: tuple[int, ...]) -> list[Peer]:
    """Those that do the job of a chain for a weight of a shape, and are installed."""
    n, k = shape[-2:]
    return [
        peer
        for peer in PEERS
        if chain in peer.chains and (n == k or n <= peer.tall) and peer.available()
    ]


def constraint_error(chain: str, weight: Tensor) -> float | None:
    """How far a weight is from its constraint, the worst of a batch; None where that is no matrix.

    Of an orthogonal one ‖QᵀQ - I‖_F / √k; of a positive definite one ‖W - Wᵀ‖_F / ‖W‖_F or, where
    that is larger, what its smallest eigenvalue is below zero, relative to the largest.
    """
    w = weight.detach().double()
    if chain in ORTHOGONAL:
        eye = torch.eye(w.size(-1)).to(w)
        return float((w.mT @ w - eye).norm(dim=(-2, -1)).max()) / w.size(-1) ** 0.5
    if chain == "symmetric_exp":
        asymmetry = (w - w.mT).norm(dim=(-2, -1)) / w.norm(dim=(-2, -1))
        values = torch.linalg.eigvalsh((w + w.mT) / 2)
        return float(torch.maximum(asymmetry, -values[..., 0] / values[..., -1]).max())
    return None
