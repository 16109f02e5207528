"""Writes the README's tables from the result files: ``python -m benchmarks.report [--check]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def _results() -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        content = json.loads(path.read_text())
        yield content["machine"], content["rows"]


def _milliseconds(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['median_us'] / 1000:.3g}"


def tables() -> str:
    """One table per device: median milliseconds of forward and backward, and what they gain."""
    lines: list[str] = []
    for machine, rows in _results():
        versions = f"torch {machine['torch']}, triton {machine['triton']}"
        lines += [f"{machine['device']}; {versions}; commit {machine['commit']}.", ""]
        lines += ["| chain, shape | composed | compiled | closed | kernel | gain | error |"]
        lines += ["|---|---|---|---|---|---|---|"]
        cases: dict[tuple[str, str], dict[str, Any]] = {}
        for row in rows:
            shape = "×".join(map(str, row["shape"]))
            cases.setdefault((row["chain"], shape), {})[row["contender"]] = row
        for (chain, shape), by in cases.items():
            times = [_milliseconds(by.get(c)) for c in ("composed", "compiled", "closed", "kernel")]
            ours = by.get("kernel", by["closed"])
            error, theirs = ours["value_error"], by["composed"]["value_error"]
            lines.append(
                f"| {chain} {shape} | {' | '.join(times)} | {ours['speedup_over_composed']:.2f}× "
                f"| {error:.0e} ({theirs:.0e}) |"
            )
        lines.append("")
    return "\n".join(lines)


def written(readme: str) -> str:
    """The README with its tables replaced."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    """Write the README, or with ``--check`` return 1 if it differs from the results."""
    before = README.read_text()
    after = written(before)
    if arguments == ["--check"]:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
