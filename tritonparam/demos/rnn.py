"""Handwritten digits, read pixel by pixel by an RNN with an orthogonal recurrent weight."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonparam as tp
from tritonparam.demos import digits, pair, shown
from tritonparam.demos.digits import CLASSES, N_TEST, Digits
from tritonparam.demos.options import Options, require
from tritonparam.demos.pair import History

MAPS = ("cayley", "exp", "householder")
COLUMNS = {
    "accuracy": lambda run: f"{run.scores['accuracy'][-1]:.1%}",
    "‖WᵀW-I‖": lambda run: f"{run.scores['defect'][-1]:.1e}",
}


class OrthogonalRNN(nn.Module):
    """h ← tanh(W h + (U x + b)/√T) over the T pixels x of an image, then √T V h + c.

    With W orthogonal the state neither fades nor explodes but adds up its T inputs, to a size of
    about √T of them; the division keeps it where tanh is nearly linear. W starts as plane
    rotations by random angles (Henaff et al. 2016; Helfrich et al. 2018) and V as zero.

    Arguments:
        hidden: the size n of the state.
        orthogonal_map: one of ``MAPS``, what makes W orthogonal.
    """

    def __init__(self, hidden: int, orthogonal_map: str) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, hidden)
        self.recurrent = nn.Linear(hidden, hidden, bias=False)
        self.decoder = nn.Linear(hidden, CLASSES)
        nn.init.zeros_(self.encoder.bias)
        nn.init.zeros_(self.decoder.weight)
        nn.init.zeros_(self.decoder.bias)
        angles = (torch.rand(hidden // 2) * 2 - 1) * 0.75 * math.pi
        _constrain(self.recurrent, orthogonal_map, angles)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [batch, 10] of pixels [batch, T]."""
        w = self.recurrent.weight  # read once, used T times
        scale = pixels.size(1) ** 0.5
        inputs = self.encoder(pixels.mT.unsqueeze(-1)) / scale  # [T, batch, n]
        h = inputs.new_zeros(inputs.shape[1:])
        for u in inputs.unbind():
            h = torch.addmm(u, h, w.mT).tanh()
        return self.decoder(scale * h)


@torch.no_grad()
def _constrain(layer: nn.Linear, orthogonal_map: str, angles: Tensor) -> None:
    """Make the weight [n, n] orthogonal, and plane rotations by these angles, [n // 2]."""
    i = 2 * torch.arange(len(angles))
    layer.weight.zero_()
    if orthogonal_map == "householder":
        layer.weight.fill_diagonal_(1)
        layer.weight[i, i] = layer.weight[i + 1, i + 1] = angles.cos()
        layer.weight[i, i + 1], layer.weight[i + 1, i] = angles.sin(), -angles.sin()
        tp.orthogonal(layer, "weight", "householder")
        return
    # exp of [[0, a], [-a, 0]] rotates by a, its Cayley map by 2 atan(a).
    entries = torch.tan(angles / 2) if orthogonal_map == "cayley" else angles
    layer.weight[i, i + 1], layer.weight[i + 1, i] = entries, -entries
    # A skew matrix is not orthogonal, so registration keeps it as the original.
    link = tp.CayleyMap() if orthogonal_map == "cayley" else tp.MatrixExponential()
    tp.register_parametrization(layer, "weight", tp.Skew(), link)


def build(seed: int, hidden: int, orthogonal_map: str) -> OrthogonalRNN:
    """The model, on the CPU; the same for the same arguments.

    >>> a, b = build(0, 4, "cayley"), build(0, 4, "cayley")
    >>> torch.equal(a.recurrent.weight, b.recurrent.weight)
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OrthogonalRNN(hidden, orthogonal_map)


def train(models: dict[str, OrthogonalRNN], data: Digits, options: Options, **more: Any) -> History:
    """Train the models in turn on the same batches.

    Adam; the learning rate falls to zero along a cosine, and is ten times smaller for W, as in
    Helfrich et al. 2018: it also keeps rounding from growing into different loss curves.
    """
    lr, steps = options.lr, options.steps
    generator = torch.Generator().manual_seed(options.seed)
    optimizers = {name: _optimizer(model, lr) for name, model in models.items()}

    def advance(
        name: str, model: OrthogonalRNN, k: int, batch: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        for group in optimizers[name].param_groups:
            group["lr"] = group["initial_lr"] * pair.cosine(k, steps)
        pixels, labels = batch
        loss = F.cross_entropy(model(pixels), labels)
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        return {"training": loss.detach()}

    def score(model: OrthogonalRNN) -> dict[str, float]:
        w = model.recurrent.weight.double()
        defect = torch.linalg.matrix_norm(w.mT @ w - torch.eye(len(w)).to(w)).item()
        return {"accuracy": data.accuracy(model(data.test_pixels)), "defect": defect}

    def draw(k: int) -> tuple[Tensor, Tensor]:
        return data.batch(options.batch, generator)

    return pair.train(models, draw, advance, score, options=options, **more)


def _optimizer(model: OrthogonalRNN, lr: float) -> torch.optim.Adam:
    others = [*model.encoder.parameters(), *model.decoder.parameters()]
    groups = [
        {"params": others, "lr": lr, "initial_lr": lr},
        {"params": [*model.recurrent.parameters()], "lr": lr / 10, "initial_lr": lr / 10},
    ]
    return torch.optim.Adam(groups)


def run(options: Options, *, orthogonal_map: str = "cayley", hidden: int = 128) -> History:
    """The whole demo: train both runs, print the report and write the plot.

    Arguments:
        options: as every demo's; a batch is at most the number of training images.
        orthogonal_map: one of ``MAPS``.
        hidden: the size of the recurrent weight, at least 2.

    Returns:
        The history of both runs.

    Raises:
        BadOption: an argument is not what it must be; the message names its option.
        MissingPackage: a package of ``tritonparam[demo]`` is not installed.
    """
    require(orthogonal_map in MAPS, "map", f"one of {', '.join(MAPS)}", orthogonal_map)
    require(hidden >= 2, "hidden", "at least 2", hidden)
    place, progress = options.place(), options.progress()
    data = digits.load(options.seed, place)
    data.require_batch(options.batch)
    models = {name: build(options.seed, hidden, orthogonal_map).to(place) for name in pair.RUNS}
    history = train(models, data, options, progress=progress)
    shown.printed(history, COLUMNS, options)
    plot = shown.Plot("Orthogonal RNN on digits, pixel by pixel", history, (5, 5))
    losses, accuracies = plot.axes
    apart = f"training loss (apart by at most {shown.loss_difference(history)[0]:.1e})"
    plot.curves(losses, lambda run: run.losses["training"], title=apart, yscale="log")
    title = f"test accuracy, {N_TEST} digits"
    plot.curves(accuracies, lambda run: run.scores["accuracy"], title=title, ylim=(0, 1.02))
    losses.legend(loc="upper right")
    accuracies.legend(loc="lower right")
    plot.save(options.output)
    return history
