"""One seed, one training run: what torch, geotorch and users constrain, composed and fused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize

import tritonparam as tp


class Antisymmetric(nn.Module):
    def forward(self, x):
        return x.triu(1) - x.triu(1).mT


class Solved(nn.Module):
    """The Cayley map as torch's tutorial writes it."""

    def forward(self, x):
        eye = torch.eye(x.size(-1), dtype=x.dtype)
        return torch.linalg.solve(eye - x, eye + x)


def of_torch(square: nn.Module, tall: nn.Module, other: nn.Module, head: nn.Module) -> int:
    theirs.orthogonal(square, orthogonal_map="cayley", use_trivialization=False)
    # Not Householder: weight decay zeroes that one, composed.
    theirs.orthogonal(tall, orthogonal_map="matrix_exp")
    theirs.spectral_norm(other)
    theirs.weight_norm(head)
    return 4


def of_geotorch(square: nn.Module, tall: nn.Module, other: nn.Module, head: nn.Module) -> int:
    # Nothing wide: its original is transposed, which LBFGS refuses.
    geotorch = pytest.importorskip("geotorch", minversion="0.4")
    geotorch.positive_definite(square)
    geotorch.orthogonal(tall)
    geotorch.low_rank(other, "weight", 3, "cayley")  # two factors
    return 4


def of_a_user(square: nn.Module, tall: nn.Module, other: nn.Module, head: nn.Module) -> int:
    for layer in (square, other):
        parametrize.register_parametrization(layer, "weight", Antisymmetric())
        parametrize.register_parametrization(layer, "weight", Solved())
    tp.alias(Antisymmetric, tp.Skew)
    tp.alias(Solved, tp.CayleyMap)
    return 2


SOURCES = {"torch": of_torch, "geotorch": of_geotorch, "alias": of_a_user}
OPTIMIZERS = {
    "momentum": lambda xs: torch.optim.SGD(xs, lr=0.05, momentum=0.9),
    "adam": lambda xs: torch.optim.Adam(xs, lr=0.01, foreach=False),
    "adamw_foreach": lambda xs: torch.optim.AdamW(xs, lr=0.01, foreach=True),
    "adamw_fused": lambda xs: torch.optim.AdamW(xs, lr=0.01, fused=True),
    "lbfgs": lambda xs: torch.optim.LBFGS(xs, lr=0.02, max_iter=2, history_size=10),
}


def network(source: str) -> tuple[nn.Module, int]:
    """A constrained network, and how many evaluations its forward takes."""
    torch.manual_seed(1)
    layers = [nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 1)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    return model.double(), SOURCES[source](*layers)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    torch.manual_seed(2)
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.rand(16, 1, dtype=torch.float64)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(25):
        optimizer.step(closure)
    return losses


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fifty_steps(source, kind):
    """Half way, each run goes on from the checkpoint of the other."""
    (composed, evaluations), (fused, _) = network(source), network(source)
    models = composed, tp.fuse(fused, strict=True)
    optimizers = [OPTIMIZERS[kind](model.parameters()) for model in models]
    runs = list(zip(models, optimizers, strict=True))
    tp.stats(reset=True)
    losses = [train(*run) for run in runs]
    checkpoints = [[copy.deepcopy(x.state_dict()) for x in run] for run in reversed(runs)]
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        for x, saved in zip(run, checkpoint, strict=True):
            x.load_state_dict(saved)
    for run, before in zip(runs, losses, strict=True):
        before += train(*run)
    steps = 100 if kind == "lbfgs" else 50
    assert tp.stats() == {"kernel": 0, "closed": evaluations * steps, "composed": 0}
    # Adam divides by the root of the second moment, LBFGS by differences of gradients: rounding
    # grows to about 1e-13 × 1e4 a step.
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert losses[1][-1] < losses[1][0] / 2
    mine, reference = fused.state_dict(), composed.state_dict()
    assert list(mine) == list(reference)
    for key, value in reference.items():
        assert torch.allclose(mine[key], value, rtol=0, atol=1e-8), key
