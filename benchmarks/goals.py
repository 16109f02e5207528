"""What kernels are to reach on one H100, and whether the rows of a result file do."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import BOTH, CUDA, LAYERS, Timed, least
from benchmarks.rows import Row

REPLAY = f"{BOTH}, graph"
# Microseconds of forward and backward alone on the device: 3 for each node of a graph, of which
# the Cayley map has 8 + 2 in four rounds of Newton-Schulz, an exponential 7 + 12.
PATH_US = {"cayley": 30.0, "skew_exp": 57.0, "symmetric_exp": 57.0}


@dataclass(frozen=True)
class Goal:
    """What the kernels of one row are to reach, forward and backward in fp32.

    Attributes:
        composed: how often ours goes into the time of composed, in eager mode.
        compiled: the same of composed under ``torch.compile``.
        bound: how often the bound goes into ours at most, 0 where there is none.
        of: the bound: the "floor", the "path", of which a graph's replay is what counts, or the
            "products" that cannot be avoided, at the rate that 3×TF32 has for this size.
    """

    timed: Timed
    composed: float
    compiled: float
    bound: float = 0.0
    of: str = ""


def _goal(timed: Timed) -> Goal | None:
    n, k = timed.shapes[0][-2:]
    if timed.shapes == LAYERS:
        return Goal(timed, 10, 4, 2, "floor") if timed.name == "spectral_norm" else None
    if n != k:
        return Goal(timed, 50, 50)
    if len(timed.shapes[0]) > 2:
        return Goal(timed, 20, 10, 3, "floor")
    return Goal(timed, 10, 8, 4, "path") if n < 1024 else Goal(timed, 5, 5, 2, "products")


GOALS = tuple(goal for timed in CUDA if (goal := _goal(timed)) is not None)


def lines(by_name: dict[str, list[Row]]) -> list[str]:
    """A table of every goal: what was found, what was aimed at, and whether it is reached.

    Arguments:
        by_name: the rows of result files, by the files' names.
    """
    found = [*(_line(goal, by_name.get(goal.timed.name, [])) for goal in GOALS), _read(by_name)]
    reached = sum(line.endswith("| yes |") for line in found)
    missing = sum(line.endswith("| not measured |") for line in found)
    title = f"Aims: {reached} of {len(found)} reached"
    return [
        "",
        f"<details><summary>{title}{f', {missing} not measured' if missing else ''}</summary>",
        "",
        "| chain, shape | over composed | over compiled | device alone, of the bound | reached |",
        "|---" * 5 + "|",
        *found,
        "",
        "</details>",
    ]


def _line(goal: Goal, rows: list[Row]) -> str:
    shapes = [list(shape) for shape in goal.timed.shapes]
    shape = shapes[0] if len(shapes) == 1 else shapes
    by = {(r["phase"], r["contender"]): r for r in rows if r["shape"] == shape}

    def median(phase: str, contender: str) -> float | None:
        return by.get((phase, contender), {}).get("median_us")

    kernel, replay = by.get((BOTH, "kernel"), {}), by.get((REPLAY, "kernel"), {})
    replayed = replay.get("timed", "").startswith("graph replay")
    phase = REPLAY if goal.of == "path" else BOTH
    ours = median(phase, "kernel") if replayed or phase == BOTH else None
    gains = [
        (_quotient(median(BOTH, "composed"), ours), goal.composed),
        (_quotient(median(phase, "compiled"), ours), goal.compiled),
    ]
    passed = [None if gain is None else gain >= aim for gain, aim in gains]
    cells = [f"{_figure(gain)} (≥ {aim:g}×)" for gain, aim in gains]
    if goal.of:
        eager = kernel.get("device_median_us") if phase == BOTH else None
        alone = replay["median_us"] if replayed else eager
        share = _quotient(alone, _bound(goal, kernel))
        passed.append(None if share is None else share <= goal.bound)
        cells.append(f"{_figure(share)} (≤ {goal.bound:g}×) of the {goal.of}")
    else:
        cells.append("")
    size = f"{len(shapes)} layers" if len(shapes) > 1 else "×".join(map(str, shapes[0]))
    name = f"{goal.timed.name} {size}{', graph' if phase == REPLAY else ''}"
    return f"| {name} | {' | '.join(cells)} | {_verdict(passed)} |".replace("|  |", "| |")


def _bound(goal: Goal, ours: Row) -> float | None:
    """Microseconds."""
    if goal.of == "path":
        return PATH_US[goal.timed.name]
    if goal.of == "products":
        shape = goal.timed.shapes[0]
        product = ours.get("product_us", {}).get("3xtf32")
        n_products = least(goal.timed.name, shape)[1] / (2 * shape[-1] ** 3)
        return None if product is None else n_products * product
    return ours.get("floor_us")


def _read(by_name: dict[str, list[Row]]) -> str:
    """Of the host, without a gradient."""
    rows = [r for r in by_name.get("read", []) if r["phase"] == "read" and r["shape"] == [64, 64]]
    by = {r["contender"]: r["median_us"] for r in rows if r["chain"] == "cayley"}
    gain = _quotient(by.get("composed"), by.get("kernel"))
    verdict = _verdict([None if gain is None else gain >= 1])
    return f"| cayley 64×64, read | {_figure(gain)} (≥ 1×) | | | {verdict} |"


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _figure(x: float | None) -> str:
    return "–" if x is None else f"{x:,.0f}×" if x >= 100 else f"{x:.2f}×"


def _verdict(passed: list[bool | None]) -> str:
    """No where one is missed; else yes if all were measured."""
    if False in passed:
        return "no"
    return "not measured" if None in passed else "yes"
