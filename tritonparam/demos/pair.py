"""The same training twice, composed and fused in turn.

The two runs start from the same seed, see the same data, and take their steps in turn, so that
whatever else the machine does slows both alike.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

import tritonparam as tp
from tritonparam.demos.options import Options
from tritonparam.fuse import originals, parametrized_tensors

RUNS = ("composed", "fused")

Model = TypeVar("Model", bound=nn.Module)
Drawn = TypeVar("Drawn")


@dataclass
class Run:
    """What one of the two runs left behind.

    Attributes:
        path: the path of the constrained weights, and `reason` why it is that one.
        losses: of every step, by name.
        scores: by name, one for each of ``History.scored_at``.
        seconds: the time of every step, and `weight_seconds` of reading and differentiating the
            trained weights alone.
        evaluations: how often the training steps evaluated a weight, by path.
    """

    path: str
    reason: str
    losses: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    weight_seconds: list[float] = field(default_factory=list)
    evaluations: Counter[str] = field(default_factory=Counter)


@dataclass
class History:
    """Both runs, the steps after which they were scored, and the table of ``explain``."""

    runs: dict[str, Run]
    scored_at: list[int]
    explanation: str
    title: str


def on_path(name: str) -> AbstractContextManager[None]:
    """Inside, the run of that name evaluates its weights as it is called."""
    return tp.use_path("composed") if name == "composed" else nullcontext()


def cosine(k: int, steps: int) -> float:
    """What the learning rate of step k is multiplied with: from 1 to 0."""
    return (1 + math.cos(math.pi * k / steps)) / 2


def train(
    models: Mapping[str, Model],
    draw: Callable[[int], Drawn],
    advance: Callable[[str, Model, int, Drawn], dict[str, Tensor]],
    score: Callable[[Model], dict[str, float]],
    *,
    options: Options,
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Train the models in turn on the same data, and measure.

    Arguments:
        models: one for each name in ``RUNS``, changed in place.
        draw: called with the number of a step, returns what both models are shown in it.
        advance: called with a run's name, its model, the step and what was drawn; takes the step
            and returns the losses by name.
        score: called with a model now and then, returns numbers by name.
        options: how many steps, on how many threads.
        progress: wraps the range of steps.

    Returns:
        The history of both runs.
    """
    steps = options.steps
    history = _start(models)

    def scored(k: int) -> None:
        history.scored_at.append(k)
        for name, model in models.items():
            with torch.no_grad(), on_path(name):
                _append(history.runs[name].scores, score(model))

    with _threads(options.threads):
        history.title += f", on {_place(models['fused'])}"
        scored(0)
        for k in progress(range(steps)):
            drawn = draw(k)
            for name in RUNS if k % 2 == 0 else reversed(RUNS):
                run, model = history.runs[name], models[name]
                before, start = Counter(tp.stats()), _now(model)
                with on_path(name):
                    losses = advance(name, model, k, drawn)
                run.seconds.append(_now(model) - start)
                _append(run.losses, {key: loss.item() for key, loss in losses.items()})
                run.evaluations += Counter(tp.stats()) - before
            if (k + 1) % max(1, steps // 20) == 0 or k + 1 == steps:
                scored(k + 1)
        _time_weights(models, history)
    return history


def _append(lists: dict[str, list[float]], numbers: dict[str, float]) -> None:
    for key, number in numbers.items():
        lists.setdefault(key, []).append(number)


def _start(models: Mapping[str, nn.Module]) -> History:
    """An empty history that knows the paths."""
    runs = {}
    for name, model in models.items():
        with on_path(name):
            rows = tp.explain(model)
        path, reason = (
            "; ".join(dict.fromkeys(getattr(row, key) for row in rows))
            for key in ("path", "reason")
        )
        runs[name] = Run(path, reason)
    chains = " and ".join(dict.fromkeys("→".join(row.chain) for row in rows))
    size = "×".join(map(str, rows[0].shape)) if len(rows) == 1 else f"{len(rows)} weights"
    title = f"{chains}, {size}"
    return History(runs, [], str(tp.explain(models["fused"])), title)


def _place(model: nn.Module) -> str:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return str(device) + f", {threads} thread{'s' * (threads > 1)}" * (device.type == "cpu")


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _now(model: nn.Module) -> float:
    """Seconds on a clock, with all that the model's device was given done."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _time_weights(models: Mapping[str, nn.Module], history: History, repeats: int = 20) -> None:
    """Time reading and differentiating the weights alone, again in turn."""
    for _ in range(repeats):
        for name, model in models.items():
            found = list(parametrized_tensors(model))
            start = _now(model)
            with on_path(name):
                ws = [getattr(module, full.rpartition(".")[2]) for module, full, _ in found]
            xs = [x for _, _, plist in found for x in originals(plist)]
            torch.autograd.grad(ws, xs, [torch.ones_like(w) for w in ws])
            history.runs[name].weight_seconds.append(_now(model) - start)
