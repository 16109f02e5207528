"""Writes the README's tables and the plots: ``python -m benchmarks.report [--check]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import goals, plots
from benchmarks.accuracy import summary
from benchmarks.cases import BACKWARD, BOTH, FORWARD
from benchmarks.peers import PEERS
from benchmarks.rows import ONE_LAUNCH, Row
from tests.cases import CASES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

CONTENDERS = ("composed", "compiled", "closed", "kernel")
ALL = CONTENDERS + tuple(peer.name for peer in PEERS)


def _results() -> Iterator[tuple[Path, Row, dict[str, list[Row]]]]:
    """Of every device: its folder, the machine, and the rows of its result files by their names."""
    for folder in sorted(p for p in (ROOT / "benchmarks" / "results").iterdir() if p.is_dir()):
        found = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        if found:
            machine = next(iter(found.values()))["machine"]
            commits = dict.fromkeys(str(content["machine"]["commit"]) for content in found.values())
            machine = {**machine, "commit": ", ".join(commits)}
            yield folder, machine, {name: content["rows"] for name, content in found.items()}


def _milliseconds(microseconds: float | None) -> str:
    return "–" if microseconds is None else f"{float(f'{microseconds / 1000:.3g}'):,g}"


def _ratio(gain: float) -> str:
    return f"{gain:,.0f}×" if gain >= 100 else f"{gain:.2f}×"


def _size(row: Row) -> str:
    shape = row["shape"]
    return f"{len(shape)} layers" if isinstance(shape[0], list) else "×".join(map(str, shape))


def _phase(row: Row) -> str:
    """The phase after a comma; nothing for forward and backward in eager mode."""
    phase = {BOTH: "", f"{BOTH}, graph": ", graph"}.get(row["phase"])
    return f", {row['phase']}" if phase is None else phase


def _label(row: Row) -> str:
    return f"{row['chain']} {_size(row)}{_phase(row)}"


def _part(row: Row) -> str:
    """ "forward" or "backward" of a row of that alone, of the device or of a graph."""
    part = str(row["phase"]).removesuffix(", graph")
    return part if part in (FORWARD, BACKWARD) else ""


def _parted(rows: list[Row]) -> list[Row]:
    """The rows of forward and of backward alone, two in one, with the label of both."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if part := _part(row):
            both = {**row, "phase": row["phase"].replace(part, BOTH)}
            key = _label(both), row["contender"]
            found.setdefault(key, both)[part] = row["median_us"]
    return list(found.values())


def _cases(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """By label and contender."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(_label(row), {})[row["contender"]] = row
    return cases


def _default(rows: list[Row]) -> list[Row]:
    """Without those of one launch, which are there even where what they stand beside has failed."""
    return [row for row in rows if row["contender"] != ONE_LAUNCH]


def _ours(by: dict[str, Row]) -> Row:
    """The row of the path that is taken by default."""
    return by["kernel"] if "kernel" in by else by["closed"]


def _gains(rows: list[Row]) -> list[str]:
    """A line per chain and phase: where the least is gained, where the most, the largest error."""
    groups: dict[str, list[dict[str, Row]]] = {}
    for by in _cases([row for row in rows if not _part(row)]).values():
        if _ours(by)["speedup_over_composed"] is not None:
            groups.setdefault(by["composed"]["chain"] + _phase(by["composed"]), []).append(by)
    lines = []
    for name, cases in groups.items():
        cases.sort(key=lambda by: _ours(by)["speedup_over_composed"])
        ends = [_gain(cases[0]), _gain(cases[-1]) if len(cases) > 1 else "–"]
        errors = [
            max((row["value_error"] for row in of if "value_error" in row), default=None)
            for of in ([_ours(by) for by in cases], [by["composed"] for by in cases])
        ]
        mine, theirs = ("–" if error is None else f"{error:.0e}" for error in errors)
        lines.append(f"| {name} | {' | '.join(ends)} | {mine} ({theirs}) |")
    return lines


def _gain(by: dict[str, Row]) -> str:
    """What is gained, the size, and the milliseconds of both."""
    ours = _ours(by)
    times = " → ".join(_milliseconds(row["median_us"]) for row in (by["composed"], ours))
    return f"{_ratio(ours['speedup_over_composed'])} at {_size(ours)}: {times} ms"


def _times(rows: list[Row], floors: bool) -> list[str]:
    lines = []
    for case, by in _cases([row for row in rows if not _part(row)]).items():
        ours = _ours(by)
        found = [by.get(c, {}) for c in CONTENDERS]
        cells = [case, *(_milliseconds(row.get("median_us")) for row in found)]
        gain = ours["speedup_over_composed"]
        cells.append("–" if gain is None else _ratio(gain))
        if floors:
            cells.append(_milliseconds(ours.get("floor_us")))
        if "value_error" in ours:
            theirs = by["composed"].get("value_error")
            cells.append(f"{ours['value_error']:.0e}")
            if theirs is not None:
                cells[-1] += f" ({theirs:.0e})"
        else:
            cells.append("")
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return lines


def _folded(
    title: str, head: str, rows: list[Row], names: tuple[str, ...], cell: Callable[[Row], str]
) -> list[str]:
    """A table that unfolds, of the rows of these contenders that `cell` has something for."""
    cases = {
        case: {name: text for name, row in by.items() if name in names and (text := cell(row))}
        for case, by in _cases(rows).items()
    }
    columns = [name for name in names if any(name in by for by in cases.values())]
    if not columns:
        return []
    lines = ["", f"<details><summary>{title}</summary>", ""]
    lines += [f"| {' | '.join([head, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    for case, by in cases.items():
        if by:
            lines.append(f"| {' | '.join([case, *(by.get(name, '–') for name in columns)])} |")
    return [*lines, "", "</details>"]


def _peer(row: Row) -> str:
    """Milliseconds, what ours gains over it, how far its weight is from the constraint, if any."""
    if row["median_us"] is None:
        return ""
    near = "≈ " if row.get("approximate") else ""
    error = row.get("constraint_error", row.get("value_error"))
    return f"{_milliseconds(row['median_us'])}, {_ratio(row['speedup_of_ours'])}, {near}{error:.0e}"


def _against_the_kernel(row: Row) -> str:
    """Milliseconds; of what took turns with the kernel, what it gains over that."""
    gain = row.get("speedup_over_kernel")
    return _milliseconds(row["median_us"]) + ("" if gain is None else f", {_ratio(gain)}")


def _forward_and_backward(row: Row) -> str:
    """Milliseconds of each."""
    return " / ".join(_milliseconds(row.get(part)) for part in (FORWARD, BACKWARD))


def _megabytes(row: Row) -> str:
    return f"{row['peak_bytes'] / 1e6:.3g}" if "peak_bytes" in row else ""


def _host_and_device(row: Row) -> str:
    """Microseconds; a graph's replay is timed on the device."""
    if row.get("host_median_us") is None:
        return ""
    replayed = row["median_us"] if row.get("timed", "").startswith("graph replay") else None
    device = row.get("device_median_us", replayed)
    return f"{row['host_median_us']:.4g} / {'–' if device is None else f'{device:.4g}'}"


def _more(rows: list[Row]) -> list[str]:
    """What is known beside: of the phases, of peers, of memory, of host and device apart."""
    parted, rows = _parted(rows), [row for row in rows if not _part(row)]
    either = {_label(row) for row in rows if row["contender"] == ONE_LAUNCH}
    return [
        *_folded(
            "Forward / backward: ms of each alone",
            "chain, shape",
            parted,
            ALL,
            _forward_and_backward,
        ),
        *_folded(
            "Rounds of products, a launch for each or all in one: ms, how much faster that is",
            "chain, shape",
            [row for row in rows if _label(row) in either],
            ("kernel", ONE_LAUNCH),
            _against_the_kernel,
        ),
        *_folded(
            "Peers: ms, how much faster ours is, the weight's distance from its constraint, or its "
            "error where that is none (≈: an approximation by design)",
            "chain, shape",
            rows,
            ALL[len(CONTENDERS) :],
            _peer,
        ),
        *_folded(
            "Memory: MB that one forward and backward holds at its peak",
            "chain, shape",
            rows,
            ALL,
            _megabytes,
        ),
        *_folded(
            "Host / device: µs until the host is free again, µs of the device alone (–: the host "
            "waits for it)",
            "chain, shape",
            rows,
            CONTENDERS,
            _host_and_device,
        ),
    ]


def _embedding(rows: list[Row]) -> list[str]:
    lines = ["", "| orthogonal 30000×50: register, forward, backward | s | MB | orthogonality |"]
    lines += ["|---|---|---|---|"]
    for row in rows:
        seconds, megabytes = row["median_us"] / 1e6, row["peak_megabytes"]
        lines.append(
            f"| {row['chain']} | {seconds:.2f} | {megabytes:.0f} | {row['orthogonality']:.0e} |"
        )
    return lines


def _accuracy(rows: list[Row]) -> list[str]:
    return [
        "",
        "Accuracy in fp32, n = 2 to 512, norms 1e-3 to 1e3 (`python -m benchmarks.accuracy`):",
    ] + [f"- {line}" for line in summary(rows).splitlines()]


def _machine(machine: Row) -> str:
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    found = {name: machine[name] for name in ("torch", "triton")} | machine.get("peers", {})
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"{machine['device']}{driver}; {versions}; commit {machine['commit']}."


def tables() -> str:
    """Per device: median milliseconds of forward and backward and what they gain, and the rest."""
    lines: list[str] = []
    for folder, machine, by_name in _results():
        lines += [_machine(machine), ""]
        ordered = [case.name for case in CASES if case.name in by_name]
        timed = [_default(by_name[name]) for name in [*ordered, "read"] if name in by_name]
        lines += ["| chain | least gain | most gain | error |", "|---|---|---|---|"]
        lines += [line for rows in timed for line in _gains(rows)]
        floors = any("floor_us" in row for rows in timed for row in rows)
        head = ["chain, shape", "composed", "compiled", "closed", "kernel", "gain"]
        head += ["floor", "error"] if floors else ["error"]
        lines += ["", "<details><summary>Every size: ms of each contender</summary>", ""]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [line for rows in timed for line in _times(rows, floors)]
        lines += ["", "</details>"]
        if floors:
            lines += goals.lines(by_name)
        lines += _more([row for name in ordered for row in by_name[name]])
        if "embedding" in by_name:
            lines += _embedding(by_name["embedding"])
        if "accuracy" in by_name:
            lines += _accuracy(by_name["accuracy"])
        for plot in sorted(folder.glob("*.svg")):
            lines += ["", f"![{plot.stem}: {machine['device']}]({plot.relative_to(ROOT)})"]
        lines.append("")
    return "\n".join(lines)


def written(readme: str) -> str:
    """The README with its tables replaced."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    """Write the README and the plots, or with ``--check`` return 1 if the README differs."""
    before = README.read_text()
    if arguments == ["--check"]:
        return int(before != written(before))
    for folder, machine, by_name in _results():
        for plot in plots.draw(by_name, machine["device"], folder):
            print(plot.relative_to(ROOT))
    README.write_text(written(before))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
