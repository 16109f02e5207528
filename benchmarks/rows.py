"""What a result file says of one contender."""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.cases import Timed

Row = dict[str, Any]
OURS = ("closed", "kernel")
ONE_LAUNCH = "kernel, one launch"  # of all rounds of products, where the default launches each


def percentiles(seconds: list[float], of: str = "") -> Row:
    """Median, 20th and 80th percentile in microseconds; None where there is no time."""
    p20, p50, p80 = None, None, None
    if seconds:
        p50 = median(seconds)
        p20, *_, p80 = quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
    found = {"median": p50, "p20": p20, "p80": p80}
    return {f"{of}{k}_us": None if v is None else round(v * 1e6, 1) for k, v in found.items()}


def ratio(theirs: list[float], mine: list[float]) -> float:
    """How often mine goes into theirs: the median over rounds that both were in."""
    ratios = [a / b for a, b in zip(theirs, mine, strict=False)]
    if len(theirs) != len(mine):
        ratios = [median(theirs) / median(mine)]
    return float(f"{median(ratios):.4g}")


def row(timed: Timed, phase: str, name: str, times: dict[str, list[float]]) -> Row:
    """One contender's row; without times it says that there is none."""
    shapes = [list(shape) for shape in timed.shapes]
    mine = times.get(name, [])
    compared = mine and "composed" in times
    return {
        "chain": timed.name,
        "shape": shapes[0] if len(shapes) == 1 else shapes,
        "dtype": "float32",
        "phase": phase,
        "contender": name,
        **percentiles(mine),
        "speedup_over_composed": ratio(times["composed"], mine) if compared else None,
    }


def first_line(error: Exception) -> str:
    """Of its message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def none_for(error: Exception) -> str:
    """Why a contender has no times."""
    if isinstance(error, torch.OutOfMemoryError):
        return "none: it runs out of memory"
    return f"none: it fails: {first_line(error)}"


def error(x: float) -> float:
    """As it is written down: two digits."""
    return float(f"{x:.1e}")


def errors(found: tuple[float, float]) -> Row:
    """Of value and gradient."""
    return {"value_error": error(found[0]), "gradient_error": error(found[1])}
