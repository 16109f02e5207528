"""Handwritten digits, told apart by a learned distance: metric learning under a positive definite
matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonparam as tp
from tritonparam.demos import digits, pair, shown
from tritonparam.demos.digits import CLASSES, N_TEST, Digits
from tritonparam.demos.options import Options
from tritonparam.demos.pair import History, Run

COLUMNS = {
    "Euclidean": lambda run: f"{run.scores['accuracy'][0]:.1%}",
    "learned": lambda run: f"{run.scores['accuracy'][-1]:.1%}",
}


class NearestMean(nn.Module):
    """The class whose mean μ is nearest: logits -(x - μ)ᵀM(x - μ)/2 with M positive definite.

    M starts as the identity, the Euclidean distance; to learn it is Mensink et al. 2013.

    Arguments:
        means: [classes, n].
    """

    means: Tensor

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.metric = nn.Parameter(torch.eye(means.size(1), device=means.device))
        tp.spd(self, "metric")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes] of x [batch, n]."""
        z = x.unsqueeze(1) - self.means
        return (z @ self.metric * z).sum(-1) / -2


def build(data: Digits) -> NearestMean:
    """The model that has the means of the training images."""
    of_class = F.one_hot(data.train_labels, CLASSES).to(data.train_pixels)
    return NearestMean(of_class.mT @ data.train_pixels / of_class.sum(0).unsqueeze(1))


def train(models: dict[str, NearestMean], data: Digits, options: Options, **more: Any) -> History:
    """Train the models in turn: cross-entropy, Adam, a learning rate that falls along a cosine."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizers = {n: torch.optim.Adam(m.parameters(), options.lr) for n, m in models.items()}

    def draw(k: int) -> tuple[Tensor, Tensor]:
        return data.batch(options.batch, generator)

    def advance(
        name: str, model: NearestMean, k: int, batch: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        optimizer = optimizers[name]
        optimizer.param_groups[0]["lr"] = options.lr * pair.cosine(k, options.steps)
        pixels, labels = batch
        loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"training": loss.detach()}

    def score(model: NearestMean) -> dict[str, float]:
        return {"accuracy": data.accuracy(model(data.test_pixels))}

    return pair.train(models, draw, advance, score, options=options, **more)


def run(options: Options) -> History:
    """The whole demo: train both runs, print the report and write the plot.

    Arguments:
        options: as every demo's; a batch is at most the number of training images.

    Returns:
        The history of both runs.

    Raises:
        BadOption: an argument is not what it must be; the message names its option.
        MissingPackage: a package of ``tritonparam[demo]`` is not installed.
    """
    place, progress = options.place(), options.progress()
    data = digits.load(options.seed, place)
    data.require_batch(options.batch)
    models = {name: build(data) for name in pair.RUNS}
    history = train(models, data, options, progress=progress)
    shown.printed(history, COLUMNS, options)
    plot = shown.Plot("A distance between digits", history, (5, 5, 4))
    losses, accuracies, spectrum = plot.axes
    apart = f"training loss (apart by at most {shown.loss_difference(history)[0]:.1e})"
    plot.curves(losses, lambda run: run.losses["training"], title=apart, yscale="log")
    plot.curves(accuracies, _accuracy, title=f"test accuracy, {N_TEST} digits", ylim=(None, 1.002))
    euclidean = history.runs["fused"].scores["accuracy"][0]
    accuracies.axhline(euclidean, color="grey", linestyle=":", label="Euclidean distance")
    for name, model in models.items():
        with torch.no_grad(), pair.on_path(name):
            eigenvalues = torch.linalg.eigvalsh(model.metric.double()).flip(0).cpu()
        spectrum.plot(range(1, len(eigenvalues) + 1), eigenvalues, **shown.STYLES[name])
    spectrum.set(title="eigenvalues of M", yscale="log", xlabel="from largest to smallest")
    losses.legend(loc="upper right")
    accuracies.legend(loc="lower right")
    plot.save(options.output)
    return history


def _accuracy(run: Run) -> list[float]:
    return run.scores["accuracy"]
