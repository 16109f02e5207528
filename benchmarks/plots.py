"""Plots of the result files of one device: speed against size, floors, errors against norm."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.cases import BOTH

Row = dict[str, Any]
MAPS = {"cayley": "#0072b2", "skew_exp": "#d55e00", "symmetric_exp": "#009e73"}  # Okabe & Ito 2008
OTHERS = {"matrix_exp": "#cc79a7"}
TORCH = "#767676"
ACCURACY_N = 64


def draw(rows: dict[str, list[Row]], device: str, folder: Path) -> list[Path]:
    """Write each plot that the rows have something for, as SVG and PNG; return the SVGs.

    Arguments:
        rows: of the result files, by the files' names.
        device: its name, for the titles.
        folder: where the files go.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same rows give the same file.
    same = {"svg.hashsalt": "tritonparam", "svg.fonttype": "none"}
    written = []
    for name, plot in (("speed", _speed), ("floor", _floor), ("accuracy", _accuracy)):
        figure = plot(rows, pyplot)
        if figure is None:
            continue
        figure.suptitle(f"{figure.get_suptitle()} ({device})", fontsize=11)
        written.append(folder / f"{name}.svg")
        with matplotlib.rc_context(same):
            figure.savefig(written[-1], metadata={"Date": None, "Creator": None})
        figure.savefig(written[-1].with_suffix(".png"), dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return written


def _single(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """By map: the rows of our fastest path on one square matrix, in the order of its size."""
    found: dict[str, list[Row]] = {}
    for name in MAPS | OTHERS:
        best: dict[int, Row] = {}
        for row in rows.get(name, []):
            shape, ours = row["shape"], row["contender"] in ("closed", "kernel")
            if ours and shape == [shape[0]] * 2 and row["phase"] in (BOTH, f"{BOTH}, graph"):
                best[shape[0]] = row  # a kernel's rows come last, and a graph's after them
        if best:
            found[name] = [best[n] for n in sorted(best)]
    return found


def _lines(axes: Any, by_map: dict[str, list[Row]], number: str) -> None:
    """A line per map, named at its end, above the others' names where they would overlap, and
    above a line that ends where others go on."""
    ends = []
    for name, rows in by_map.items():
        points = [(row["shape"][0], row[number]) for row in rows if row.get(number)]
        if points:
            color = (MAPS | OTHERS)[name]
            axes.plot(*zip(*points, strict=True), "o-", color=color, lw=1.8, ms=4)
            ends.append((points[-1], name, color))
    lowest: dict[int, float] = defaultdict(float)
    beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
    above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
    last = max((x for (x, _), _, _ in ends), default=0)
    for (x, y), name, color in sorted(ends, key=lambda end: end[0][1]):
        lowest[x] = max(y, 1.13 * lowest[x])
        place = beside if x == last else above
        axes.annotate(name, (x, lowest[x]), color=color, fontsize=9, annotation_clip=False, **place)


def _size_axes(pyplot: Any, by_map: dict[str, list[Row]]) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    sizes = sorted({row["shape"][0] for rows in by_map.values() for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set_xlabel("n, of one n×n matrix in fp32")
    axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.9)  # room for the names
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", which="major", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _plain(axes: Any, ticks: tuple[float, ...], unit: str) -> None:
    """Exactly these ticks, on a logarithmic axis, in plain figures."""
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}{unit}" for tick in ticks])
    axes.set_yticks([], minor=True)


def _speed(rows: dict[str, list[Row]], pyplot: Any) -> Any:
    by_map = _single(rows)
    if not by_map:
        return None
    figure, axes = _size_axes(pyplot, by_map)
    _lines(axes, by_map, "speedup_over_composed")
    highest = max(r["speedup_over_composed"] or 1 for rs in by_map.values() for r in rs)
    ticks = tuple(t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= 2 * highest)
    _plain(axes, ticks, "×")
    axes.axhline(1, color=TORCH, lw=1)
    note = {"xytext": (0, -3), "textcoords": "offset points", "va": "top", "fontsize": 8}
    axes.annotate("composed", (axes.get_xlim()[1], 1), ha="right", color=TORCH, **note)
    axes.set_ylabel("speed, forward and backward")
    figure.suptitle("Fused against composed")
    return figure


def _floor(rows: dict[str, list[Row]], pyplot: Any) -> Any:
    by_map = {
        name: [{**r, "share": 100 * r["floor_us"] / r["median_us"]} for r in rs if "floor_us" in r]
        for name, rs in _single(rows).items()
    }
    by_map = {name: rs for name, rs in by_map.items() if rs}
    if not by_map:
        return None
    figure, axes = _size_axes(pyplot, by_map)
    _lines(axes, by_map, "share")
    _plain(axes, (0.1, 1, 10, 100), " %")
    axes.set_ylabel("share of the time")
    figure.suptitle("Bytes and products that cannot be avoided")
    return figure


def _accuracy(rows: dict[str, list[Row]], pyplot: Any) -> Any:
    cells = [row for row in rows.get("accuracy", []) if row["n"] == ACCURACY_N]
    if not cells:
        return None
    panels = ("value", "gradient")
    figure, grid = pyplot.subplots(
        len(panels), len(MAPS), figsize=(8, 4.6), layout="constrained", sharex=True, sharey=True
    )
    for axes_row, what in zip(grid, panels, strict=True):
        for axes, (name, color) in zip(axes_row, MAPS.items(), strict=True):
            by: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for row in cells:
                if row["chain"] == name and row["what"] == what:
                    by["torch"].append((row["norm"], row["torch"]))
                    by["ours"].append((row["norm"], row["ours"]))
            axes.loglog(*zip(*by["torch"], strict=True), "s--", color=TORCH, lw=1.4, ms=3.5)
            axes.loglog(*zip(*by["ours"], strict=True), "o-", color=color, lw=1.8, ms=3.5)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.grid(axis="y", color="#e6e6e6", lw=0.8)
            axes.set_title(f"{name}, {what}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("norm of the argument", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("relative error", fontsize=9)
    last = grid[0, 0]
    last.plot([], [], "s--", color=TORCH, label="composed")
    last.plot([], [], "o-", color=MAPS["cayley"], label="fused")
    last.legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(f"Errors against fp64, n = {ACCURACY_N}")
    return figure
