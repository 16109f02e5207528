"""What a demo prints and plots of its two runs."""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tritonparam.demos.options import BadOption, Options, missing
from tritonparam.demos.pair import History, Run

Columns = dict[str, Callable[[Run], str]]
# Above this, two loss curves are seen apart in the plot.
VISIBLE = 1e-2
# A thick pale line under a thin dark one: what coincides is seen to.
STYLES: dict[str, dict[str, Any]] = {
    "composed": {"color": "#f4b183", "linewidth": 4, "solid_capstyle": "round"},
    "fused": {"color": "#1f3b73", "linewidth": 1},
}


def report(history: History, columns: Columns, *more: str) -> str:
    """One table of both runs, how far their losses came apart, and the table of ``explain``."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("run", "path", "why"):
        table.add_column(heading)
    for heading in ("evaluated", "ms/step", *columns):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run in history.runs.items():
        table.add_row(
            name,
            run.path,
            run.reason,
            "\n".join(f"{count} {path}" for path, count in run.evaluations.items()),
            f"{1e3 * statistics.median(run.seconds):.2f}",
            *(cell(run) for cell in columns.values()),
        )
    screen = io.StringIO()
    Console(width=80, file=screen, markup=False, highlight=False).print(table)
    lines = textwrap.wrap(history.title, 80)
    lines += [line.rstrip() for line in screen.getvalue().splitlines()]
    lines += [losses_line(history), *more, "", "explain(fused model):", history.explanation]
    return "\n".join(lines)


def loss_difference(history: History) -> tuple[float, int]:
    """The largest difference between the losses of the two runs, and the step it occurs at.

    Rounding differs between paths, and training may amplify it: the longer a run and the larger
    its steps, the further two runs that mean the same can come apart.
    """
    composed, fused = (
        torch.tensor(list(run.losses.values()), dtype=torch.float64)
        for run in history.runs.values()
    )
    difference = (composed - fused).abs().amax(0)
    k = int(difference.argmax())
    return float(difference[k]), k + 1


def losses_line(history: History) -> str:
    """The sentence that says how far the losses of the two runs are apart."""
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
        f"percentile {low:.2f} to {high:.2f}). The constrained weights and their gradients alone: "
        f"{c:.2f} ms composed, {f:.2f} ms fused."
    )
    if fused.path == "composed":
        line += " Both runs took the composed path, so a difference in time is noise."
    return textwrap.fill(line, 80)


def printed(history: History, columns: Columns, options: Options, *more: str) -> None:
    """Print the report, unless it shall be quiet, and what fusing gained."""
    if not options.quiet:
        print(report(history, columns, *more) + "\n")
    print(ratio(history))


class Plot:
    """Axes in a row, each with a title; the last one has the times of the steps.

    Arguments:
        title: above all of them.
        history: of both runs.
        widths: of the axes but for the last.

    Raises MissingPackage where matplotlib is not installed.
    """

    def __init__(self, title: str, history: History, widths: Sequence[float]) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise missing("matplotlib", error) from None
        self._history = history
        self._figure = Figure(figsize=(2 + 0.75 * sum(widths) + 1.6, 3.6), layout="constrained")
        FigureCanvasAgg(self._figure)
        *self.axes, times = self._figure.subplots(1, len(widths) + 1, width_ratios=(*widths, 3))
        self._figure.suptitle(f"{title}: {history.title}", fontsize=11)
        self._times(times)
        for axes in (*self.axes, times):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)

    def curves(self, axes: Any, curves: Callable[[Run], Sequence[float]], **settings: Any) -> None:
        """A curve of each run, at every step or where it was scored."""
        for name, run in self._history.runs.items():
            y = curves(run)
            at_steps = len(y) == len(run.seconds)
            x = range(1, len(y) + 1) if at_steps else self._history.scored_at
            axes.plot(x, y, label=self.label(name), marker="" if at_steps else ".", **STYLES[name])
        axes.set(xlabel="step", **settings)

    def label(self, name: str) -> str:
        """Of a run, and its path where that is another word."""
        path = self._history.runs[name].path
        return name if name == path else f"{name} ({path})"

    def disc(self, centre: Sequence[float], radius: float) -> Any:
        """What data lies in, behind samples."""
        from matplotlib.patches import Circle

        return Circle((centre[0], centre[1]), radius, color="#d8d8d8", zorder=1)

    def _times(self, axes: Any) -> None:
        runs = self._history.runs
        boxes = axes.boxplot(
            [[1e3 * s for s in run.seconds] for run in runs.values()],
            widths=0.5,
            showfliers=False,
            patch_artist=True,
            medianprops={"color": "black"},
        )
        for patch, style in zip(boxes["boxes"], STYLES.values(), strict=True):
            patch.set(facecolor=style["color"], alpha=0.7)
        axes.set(title="ms per step", ylim=(0, None), xticks=(1, 2), xticklabels=list(runs))

    def save(self, path: Path) -> None:
        """Write the PNG, and say where it is."""
        try:
            self._figure.savefig(path, dpi=120)
        except OSError as error:
            wanted = f"a file that can be written ({error.strerror})"
            raise BadOption(f"--output must be {wanted}, got {str(path)!r}.") from None
        print(f"The plot is in {path}.")
