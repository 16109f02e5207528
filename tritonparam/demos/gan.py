"""Points of eight clusters in the plane, made by a GAN whose critic has spectral norms."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonparam as tp
from tritonparam.demos import pair, shown
from tritonparam.demos.options import Options, require
from tritonparam.demos.pair import History, Run

DTYPES = ("float64", "float32")
CLUSTERS, SPREAD = 8, 0.1
NOISE = 8
N_TEST = 1000
LIPSCHITZ = 20  # of the critic at most: what tells neighbouring clusters apart
COLUMNS = {
    "distance": lambda run: f"{run.scores['distance'][-1]:.4f}",
    "on clusters": lambda run: f"{run.scores['on clusters'][-1]:.1%}",
}


class GAN(nn.Module):
    """A generator of points from noise, and a critic of norm at most ``LIPSCHITZ``.

    Arguments:
        width: of the hidden layers, two of the generator and three of the critic.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2),
        )
        self.critic = nn.Sequential(
            tp.spectral_norm(nn.Linear(2, width)),
            nn.LeakyReLU(),
            tp.spectral_norm(nn.Linear(width, width)),
            nn.LeakyReLU(),
            tp.spectral_norm(nn.Linear(width, width)),
            nn.LeakyReLU(),
            tp.spectral_norm(nn.Linear(width, 1)),
        )

    def losses(self, real: Tensor, fake: Tensor) -> Tensor:
        """The critic's for points of either kind, [batch, 2] (Goodfellow et al. 2014)."""
        of_real, of_fake = (LIPSCHITZ * self.critic(torch.cat([real, fake]))).chunk(2)
        return F.softplus(-of_real).mean() + F.softplus(of_fake).mean()


def build(seed: int, width: int, dtype: str) -> GAN:
    """The model, on the CPU; the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GAN(width).to(getattr(torch, dtype))


def centres() -> Tensor:
    """Of the clusters, on the unit circle, [8, 2]."""
    angles = torch.arange(CLUSTERS) * (2 * math.pi / CLUSTERS)
    return torch.stack([angles.cos(), angles.sin()], 1)


def points(n: int, generator: torch.Generator) -> Tensor:
    """Of all clusters, normal about their centres, [n, 2]."""
    of = torch.randint(CLUSTERS, (n,), generator=generator)
    return centres()[of] + SPREAD * torch.randn(n, 2, generator=generator)


def distance(x: Tensor, y: Tensor) -> float:
    """The energy distance 2 E‖x - y‖ - E‖x - x'‖ - E‖y - y'‖ of two samples; 0 if they are one."""
    between, of_x, of_y = (torch.cdist(*two).mean() for two in ((x, y), (x, x), (y, y)))
    return (2 * between - of_x - of_y).item()


def train(
    models: dict[str, GAN], noise: Tensor, real: Tensor, options: Options, **more: Any
) -> History:
    """Train the models in turn; one step is one of the critic and one of the generator.

    Adam; the learning rates fall along a cosine, the generator's is a third of the critic's.
    Scores are the energy distance of the samples for `noise` to `real`, and the share of samples
    within three standard deviations of a cluster's centre.
    """
    generator = torch.Generator().manual_seed(options.seed)
    optimizers = {
        name: [
            torch.optim.Adam(part.parameters(), betas=(0.5, 0.9))
            for part in (model.critic, model.generator)
        ]
        for name, model in models.items()
    }

    def draw(k: int) -> tuple[Tensor, Tensor]:
        n = options.batch
        return points(n, generator).to(real), torch.randn(n, NOISE, generator=generator).to(real)

    def advance(name: str, model: GAN, k: int, drawn: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        lr = options.lr * pair.cosine(k, options.steps)
        of_critic, of_generator = optimizers[name]
        of_critic.param_groups[0]["lr"], of_generator.param_groups[0]["lr"] = lr, lr / 3
        data, z = drawn
        fake = model.generator(z)
        critics = model.losses(data, fake.detach())
        of_critic.zero_grad()
        critics.backward()
        of_critic.step()
        generators = F.softplus(-LIPSCHITZ * model.critic(fake)).mean()
        of_generator.zero_grad()
        generators.backward()
        of_generator.step()
        return {"critic": critics.detach(), "generator": generators.detach()}

    def score(model: GAN) -> dict[str, float]:
        made = model.generator(noise)
        nearest = torch.cdist(made, centres().to(made)).amin(1)
        share = (nearest <= 3 * SPREAD).double().mean().item()
        return {"distance": distance(made, real), "on clusters": share}

    return pair.train(models, draw, advance, score, options=options, **more)


def run(options: Options, *, width: int = 64, dtype: str = "float64") -> History:
    """The whole demo: train both runs, print the report and write the plot.

    Arguments:
        options: as every demo's.
        width: of the hidden layers, at least 1.
        dtype: one of ``DTYPES``. A game amplifies rounding: in fp32 two runs that mean the same
            part within some twenty steps.

    Returns:
        The history of both runs.

    Raises:
        BadOption: an argument is not what it must be; the message names its option.
        MissingPackage: a package of ``tritonparam[demo]`` is not installed.
    """
    require(width >= 1, "width", "at least 1", width)
    require(dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", dtype)
    place, progress = options.place(), options.progress()
    models = {name: build(options.seed, width, dtype).to(place) for name in pair.RUNS}
    drawn = torch.Generator().manual_seed(options.seed + 1)
    real = points(N_TEST, drawn).to(place, getattr(torch, dtype))
    noise = torch.randn(N_TEST, NOISE, generator=drawn).to(real)
    history = train(models, noise, real, options, progress=progress)
    with torch.no_grad():
        made = {name: model.generator(noise).cpu() for name, model in models.items()}
    apart = (made["composed"] - made["fused"]).abs().max().item()
    line = f"Their samples for the same noise differ by at most {apart:.1e}."
    shown.printed(history, COLUMNS, options, line)
    plot = shown.Plot(f"GAN of {CLUSTERS} clusters", history, (5, 4, 4))
    losses, *planes = plot.axes
    for key in ("critic", "generator"):
        plot.curves(losses, partial(_losses, key))
        end = history.runs["fused"].losses[key][-1]
        losses.annotate(key, (options.steps, end), (4, 0), textcoords="offset points", va="center")
    losses.set(
        ylim=(0, 3), title=f"losses (apart by at most {shown.loss_difference(history)[0]:.1e})"
    )
    for axes, (name, x) in zip(planes, made.items(), strict=True):
        axes.scatter(*x.mT, s=3, color=shown.STYLES[name]["color"], zorder=2)
        for centre in centres().tolist():
            axes.add_patch(plot.disc(centre, 3 * SPREAD))
        axes.set(title=f"samples, {plot.label(name)}", aspect="equal", xlim=(-1.6, 1.6))
        axes.set(ylim=(-1.6, 1.6), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    planes[0].set(xlabel="grey: clusters, three standard deviations")
    plot.save(options.output)
    return history


def _losses(key: str, run: Run) -> list[float]:
    return run.losses[key]
