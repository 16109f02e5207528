"""Handwritten digits, read pixel by pixel by an RNN with an orthogonal recurrent weight.

The same model is trained twice from the same seed on the same batches, once with its weight
composed and once fused. The two runs take their steps in turn, so that whatever else the machine
does slows both alike.
"""

from __future__ import annotations

import io
import math
import os
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonparam as tp

MAPS = ("cayley", "exp", "householder")
RUNS = ("composed", "fused")
CLASSES = 10
N_TEST = 360
# Above this, two loss curves are seen apart in the plot.
VISIBLE = 1e-2


class BadOption(ValueError):
    """An option has a value that the demo cannot run with."""


class MissingPackage(ImportError):
    """A package that only the demos need is not installed."""


@dataclass(frozen=True)
class Digits:
    """Images as sequences of pixels, float32 [images, 64] in [0, 1], and their classes."""

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """What one of the two runs left behind.

    Attributes:
        path: the path of the recurrent weight, and `reason` why it is that one.
        losses: the training loss of every step.
        accuracies: on the test images, one for each of ``History.tested_at``.
        seconds: the time of every step, and `weight_seconds` of reading and differentiating the
            trained weight alone.
        evaluations: how often the training steps evaluated the weight, by path.
        defect: the Frobenius norm of WᵀW - I after training.
    """

    path: str
    reason: str
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    weight_seconds: list[float] = field(default_factory=list)
    evaluations: Counter[str] = field(default_factory=Counter)
    defect: float = math.nan


@dataclass
class History:
    """Both runs, the steps after which they were tested, and the table of ``explain``."""

    runs: dict[str, Run]
    tested_at: list[int]
    explanation: str
    title: str


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
        _constrain(
            self.recurrent, orthogonal_map, (torch.rand(hidden // 2) * 2 - 1) * 0.75 * math.pi
        )

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


def load(seed: int, device: torch.device) -> Digits:
    """scikit-learn's 1797 digits of 8×8 pixels, split by the seed: 1437 to train on, 360 to test.

    Raises MissingPackage where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise _missing("scikit-learn", error) from None
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pixels, labels = pixels[order].to(device), labels[order].to(device)
    return Digits(pixels[N_TEST:], labels[N_TEST:], pixels[:N_TEST], labels[:N_TEST])


def build(seed: int, hidden: int, orthogonal_map: str) -> OrthogonalRNN:
    """The model, on the CPU; the same for the same arguments.

    >>> a, b = build(0, 4, "cayley"), build(0, 4, "cayley")
    >>> torch.equal(a.recurrent.weight, b.recurrent.weight)
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OrthogonalRNN(hidden, orthogonal_map)


def train(
    models: dict[str, OrthogonalRNN],
    digits: Digits,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Train the models in turn on the same batches, and measure.

    Adam; the learning rate falls to zero along a cosine, and is ten times smaller for W, as in
    Helfrich et al. 2018: it also keeps rounding from growing into different loss curves.

    Arguments:
        models: one for each name in ``RUNS``, changed in place.
        digits: on the device of the models.
        steps, batch, lr: of each run.
        seed: of the batches.
        progress: wraps the range of steps.

    Returns:
        The history of both runs.
    """
    optimizers = {name: _optimizer(model, lr) for name, model in models.items()}
    schedule = [(1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]
    test_every = max(1, steps // 20)
    generator = torch.Generator().manual_seed(seed)
    history = _start(models, digits)
    _test(0, models, digits, history)
    for k in progress(range(steps)):
        chosen = torch.randint(len(digits.train_labels), (batch,), generator=generator)
        chosen = chosen.to(digits.train_labels.device)
        pixels, labels = digits.train_pixels[chosen], digits.train_labels[chosen]
        for name in RUNS if k % 2 == 0 else reversed(RUNS):
            run, optimizer = history.runs[name], optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule[k]
            before = Counter(tp.stats())
            start = _now(labels.device)
            loss = _step(name, models[name], optimizer, pixels, labels)
            run.seconds.append(_now(labels.device) - start)
            run.losses.append(loss.item())
            run.evaluations += Counter(tp.stats()) - before
        if (k + 1) % test_every == 0 or k + 1 == steps:
            _test(k + 1, models, digits, history)
    _time_weights(models, history)
    for name, model in models.items():
        history.runs[name].defect = _defect(name, model)
    return history


def _on_path(name: str) -> AbstractContextManager[None]:
    return tp.use_path("composed") if name == "composed" else nullcontext()


def _start(models: dict[str, OrthogonalRNN], digits: Digits) -> History:
    """An empty history that knows the paths."""
    runs = {}
    for name, model in models.items():
        with _on_path(name):
            (row,) = tp.explain(model)
        runs[name] = Run(row.path, row.reason)
    device = digits.train_labels.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        where += f", {threads} thread{'s' * (threads > 1)}"
    title = f"{'→'.join(row.chain)}, {'×'.join(map(str, row.shape))}, on {where}"
    return History(runs, [], str(tp.explain(models["fused"])), title)


def _optimizer(model: OrthogonalRNN, lr: float) -> torch.optim.Adam:
    recurrent = list(model.recurrent.parameters())
    others = [*model.encoder.parameters(), *model.decoder.parameters()]
    groups = [
        {"params": others, "lr": lr, "initial_lr": lr},
        {"params": recurrent, "lr": lr / 10, "initial_lr": lr / 10},
    ]
    return torch.optim.Adam(groups)


def _step(
    name: str, model: OrthogonalRNN, optimizer: torch.optim.Adam, pixels: Tensor, labels: Tensor
) -> Tensor:
    with _on_path(name):
        loss = F.cross_entropy(model(pixels), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def _test(k: int, models: dict[str, OrthogonalRNN], digits: Digits, history: History) -> None:
    history.tested_at.append(k)
    for name, model in models.items():
        with _on_path(name):
            guesses = model(digits.test_pixels).argmax(-1)
        accuracy = (guesses == digits.test_labels).float().mean().item()
        history.runs[name].accuracies.append(accuracy)


@torch.no_grad()
def _defect(name: str, model: OrthogonalRNN) -> float:
    with _on_path(name):
        w = model.recurrent.weight.double()
    return torch.linalg.matrix_norm(w.mT @ w - torch.eye(len(w)).to(w)).item()


def _time_weights(models: dict[str, OrthogonalRNN], history: History, repeats: int = 20) -> None:
    """Time reading and differentiating the weight alone, again in turn."""
    for _ in range(repeats):
        for name, model in models.items():
            (original,) = model.recurrent.parameters()
            start = _now(original.device)
            with _on_path(name):
                w = model.recurrent.weight
            torch.autograd.grad(w, original, torch.ones_like(w))
            history.runs[name].weight_seconds.append(_now(original.device) - start)


def _now(device: torch.device) -> float:
    """Seconds on a clock, with all that the device was given done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def report(history: History) -> str:
    """One table of both runs, how far their losses came apart, and the table of ``explain``."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("run", "path", "why"):
        table.add_column(heading)
    for heading in ("evaluated", "ms/step", "accuracy", "‖WᵀW-I‖"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run in history.runs.items():
        table.add_row(
            name,
            run.path,
            run.reason,
            "\n".join(f"{count} {path}" for path, count in run.evaluations.items()),
            f"{1e3 * statistics.median(run.seconds):.2f}",
            f"{run.accuracies[-1]:.1%}",
            f"{run.defect:.1e}",
        )
    screen = io.StringIO()
    Console(width=80, file=screen, markup=False, highlight=False).print(table)
    lines = [history.title, *(line.rstrip() for line in screen.getvalue().splitlines())]
    lines += [_losses_line(history), "", "explain(fused model):", history.explanation]
    return "\n".join(lines)


def loss_difference(history: History) -> tuple[float, int]:
    """The largest difference between the losses of the two runs, and the step it occurs at.

    Rounding differs between paths, and training may amplify it: the longer a run and the larger
    its steps, the further two runs that mean the same can come apart.
    """
    composed, fused = (torch.tensor(run.losses) for run in history.runs.values())
    difference = (composed - fused).abs()
    k = int(difference.argmax())
    return float(difference[k]), k + 1


def _losses_line(history: History) -> str:
    largest, k = loss_difference(history)
    if math.isnan(largest):
        return "The training diverged: a loss is not finite. Try a smaller --lr."
    line = f"The losses of the two runs differ by at most {largest:.1e} (at step {k})"
    if largest < VISIBLE:
        return line + "."
    line += (
        ": training has amplified the rounding of the two paths until the curves came apart. "
        "A smaller --lr or fewer --steps keep them together."
    )
    return textwrap.fill(line, 80)


def ratio(history: History) -> str:
    """The line that says what fusing gained."""
    composed, fused = history.runs.values()
    # Step by step: what slowed the machine slowed neighbours alike.
    ratios = sorted(f / c for c, f in zip(composed.seconds, fused.seconds, strict=True))
    low, middle, high = (ratios[int(q * (len(ratios) - 1))] for q in (0.2, 0.5, 0.8))
    c, f = (1e3 * statistics.median(run.weight_seconds) for run in (composed, fused))
    line = (
        f"A fused step takes {middle:.2f} times as long as a composed one (20th to 80th "
        f"percentile {low:.2f} to {high:.2f}). The weight and its gradient alone: {c:.2f} ms "
        f"composed, {f:.2f} ms fused."
    )
    if fused.path == "composed":
        line += " Both runs took the composed path, so a difference in time is noise."
    return textwrap.fill(line, 80)


def plot(history: History, path: Path) -> None:
    """Write the losses, the test accuracies and the step times of both runs as a PNG.

    Raises MissingPackage where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise _missing("matplotlib", error) from None
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies, times = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    # A thick pale line under a thin dark one: what coincides is seen to.
    styles = {
        "composed": {"color": "#f4b183", "linewidth": 4, "solid_capstyle": "round"},
        "fused": {"color": "#1f3b73", "linewidth": 1},
    }
    for name, run in history.runs.items():
        steps = range(1, len(run.losses) + 1)
        label = name if name == run.path else f"{name} ({run.path})"
        losses.plot(steps, run.losses, label=label, **styles[name])
        accuracies.plot(history.tested_at, run.accuracies, marker=".", label=label, **styles[name])
    largest, _ = loss_difference(history)
    losses.set(title=f"training loss (apart by at most {largest:.1e})", xlabel="step", yscale="log")
    accuracies.set(title=f"test accuracy, {N_TEST} digits", xlabel="step", ylim=(0, 1.02))
    losses.legend(loc="upper right")
    accuracies.legend(loc="lower right")
    boxes = times.boxplot(
        [[1e3 * s for s in run.seconds] for run in history.runs.values()],
        widths=0.5,
        showfliers=False,
        patch_artist=True,
        medianprops={"color": "black"},
    )
    for patch, style in zip(boxes["boxes"], styles.values(), strict=True):
        patch.set(facecolor=style["color"], alpha=0.7)
    times.set(title="ms per step", ylim=(0, None), xticks=(1, 2), xticklabels=list(history.runs))
    for axes in (losses, accuracies, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(f"Orthogonal RNN on digits, pixel by pixel: {history.title}", fontsize=11)
    figure.savefig(path, dpi=120)


def run(
    *,
    orthogonal_map: str = "cayley",
    hidden: int = 128,
    steps: int = 200,
    batch: int = 64,
    lr: float = 0.01,
    device: str | None = None,
    threads: int = 1,
    seed: int = 0,
    output: Path = Path("demo_rnn.png"),
    quiet: bool = False,
) -> History:
    """The whole demo: train both runs, print the report and write the plot.

    Arguments:
        orthogonal_map: one of ``MAPS``.
        hidden: the size of the recurrent weight, at least 2.
        steps, batch: at least 1; `batch` at most the number of training images.
        lr: the learning rate at the start, positive.
        device: where to train; None is cuda where there is one, else the CPU.
        threads: of the CPU, at least 1. At the default size more save a fifth of a step on idle
            cores, and make it many times longer where the cores are shared.
        seed: of the split, the weights and the batches.
        output: where the plot goes, a PNG in a folder that exists.
        quiet: print only what fusing gained and where the plot is.

    Returns:
        The history of both runs.

    Raises:
        BadOption: an argument is not what it must be; the message names its option.
        MissingPackage: a package of ``tritonparam[demo]`` is not installed.
    """
    _require(orthogonal_map in MAPS, "map", f"one of {', '.join(MAPS)}", orthogonal_map)
    _require(hidden >= 2, "hidden", "at least 2", hidden)
    _require(steps >= 1, "steps", "at least 1", steps)
    _require(batch >= 1, "batch", "at least 1", batch)
    _require(0 < lr < math.inf, "lr", "positive and finite", lr)
    _require(threads >= 1, "threads", "at least 1", threads)
    _require(0 <= seed < 2**63, "seed", "between 0 and 2**63 - 1", seed)
    _require(output.suffix.lower() == ".png", "output", "the name of a .png file", str(output))
    writable = output.parent.is_dir() and os.access(output.parent, os.W_OK)
    _require(writable, "output", "in a folder that exists and can be written", str(output))
    place = _device(device)
    try:
        import matplotlib  # noqa: F401  asked for before the training, not after it
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError as error:
        raise _missing(error.name or "matplotlib", error) from None
    digits = load(seed, place)
    available = len(digits.train_labels)
    _require(batch <= available, "batch", f"at most the {available} training images", batch)
    models = {name: build(seed, hidden, orthogonal_map).to(place) for name in RUNS}
    screen = Console(stderr=True)

    def progress(steps: range) -> Iterable[int]:
        return track(steps, "composed and fused in turn", console=screen, disable=quiet)

    with _threads(threads):
        history = train(
            models, digits, steps=steps, batch=batch, lr=lr, seed=seed, progress=progress
        )
    if not quiet:
        print(report(history) + "\n")
    print(ratio(history))
    plot(history, output)
    print(f"The plot is in {output}.")
    return history


def _require(fulfilled: bool, option: str, wanted: str, got: object) -> None:
    if not fulfilled:
        raise BadOption(f"--{option} must be {wanted}, got {got!r}.")


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(name: str | None) -> torch.device:
    """The device of that name, if it can compute."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadOption(
            f"--device must be a device of this machine, such as cpu or cuda, got {name!r}."
        ) from None
    return device


def _missing(package: str, error: ModuleNotFoundError) -> MissingPackage:
    return MissingPackage(f"demo rnn needs {package} ({error}); pip install 'tritonparam[demo]'")
