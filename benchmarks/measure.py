"""How a row is measured: gate against fp64, contenders in turn, host and device, memory, floor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import rounds, rows
from benchmarks.cases import BOTH, PHASES, Timed
from benchmarks.clock import PRODUCTS_FROM, Clock
from benchmarks.passes import SLOW, Pass, Reader, Samples, Timer
from benchmarks.rows import ONE_LAUNCH, Row
from benchmarks.weights import EXACT, ONCE, Weights
from tritonparam import configs

Columns = dict[str, list[Samples]]  # of each contender, a turn a round
Found = dict[str, dict[str, Row]]  # of each phase and contender, what is known beside the times

DEVICE_ROUNDS = 9


def forward_backward(
    timed: Timed, clock: Clock, repeat: rounds.Repeat = rounds.plainly
) -> Iterator[list[Row]]:
    """The rows of one chain: in eager mode, of graph replays where they are asked for, of peers.

    Each of both passes together, of the forward and of the backward pass alone. They are yielded
    one kind after the other, so that the first are kept if time runs out.
    """
    torch.compiler.reset()
    weights = Weights(timed, clock)
    errors = {name: rows.errors(found) for name, found in weights.gate().items()}
    weights.train()
    passes = weights.passes()
    timers = {name: partial(one.samples, clock) for name, one in passes.items()}
    columns = _columns(weights, timers, repeat)
    found = _around(clock, passes, columns)
    for name, one in passes.items():
        if name in errors:
            found[BOTH][name] |= errors[name] | _rounded(weights.constraint(one.reader))
    yield _none(weights, BOTH) + _rows(weights, columns, found)
    if timed.graph:
        timers, how = _replays(weights, passes)
        columns = _columns(weights, timers, rounds.plainly)
        found = {phase: {name: {"timed": how[name]} for name in columns} for phase in PHASES}
        for name in columns:
            found[BOTH][name] |= errors.get(name, {})
        yield _none(weights, f"{BOTH}, graph") + _rows(weights, columns, found, ", graph")
    if theirs := _peers(weights, passes):
        yield theirs


def one_launch(timed: Timed, clock: Clock) -> list[Row]:
    """The rows of graph replays with rounds in one launch, in turn with those of the kernel."""
    weights = Weights(timed, clock)
    one = weights.one_launch()
    if one is None:
        return []
    errors = rows.errors(weights.gate_of_one_launch(one))
    weights.train()
    again = Pass(Reader.of("kernel", weights.modules), weights.gs, returned=True)
    timers = {"kernel": again.replays(clock)[0]}
    with configs.trying(one):
        timers[ONE_LAUNCH], how = again.replays(clock)
    if not how.startswith("graph replay"):  # it would take the kernel's numbers
        return []
    columns = _columns(weights, timers, rounds.plainly)
    found: Found = {phase: {ONE_LAUNCH: {"timed": how}} for phase in PHASES}
    found[BOTH][ONE_LAUNCH] |= errors
    for phase, by_name in found.items():
        seconds = _seconds(columns, phase)
        if len(seconds) == len(timers):
            gain = rows.ratio(seconds["kernel"], seconds[ONE_LAUNCH])
            by_name[ONE_LAUNCH]["speedup_over_kernel"] = gain
    return _rows(weights, columns, found, ", graph")


def _none(weights: Weights, phase: str) -> list[Row]:
    """The rows of baselines that there are not."""
    floor = _floor(weights, BOTH) if weights.none else {}
    return [
        rows.row(weights.timed, phase, name, {}) | {"timed": why} | floor
        for name, why in weights.none.items()
    ]


def _floor(weights: Weights, phase: str) -> Row:
    clock, n = weights.clock, weights.timed.shapes[0][-1]
    if clock.kind != "cuda":  # there are no floors for the CPU
        return {}
    found: Row = {"floor_us": round(weights.floor(phase) * 1e6, 2)}
    if n >= PRODUCTS_FROM:
        products = clock.product_seconds(n)
        found["product_us"] = {name: round(s * 1e6, 1) for name, s in products.items()}
    return found


def _rounded(errors: dict[str, float]) -> Row:
    return {name: rows.error(x) for name, x in errors.items()}


def _peers(weights: Weights, passes: dict[str, Pass]) -> list[Row]:
    """Rows of the peers, interleaved with our last path, and what that gains over each of them."""
    clock = weights.clock
    *_, (ours, our_pass) = passes.items()
    theirs: dict[str, Pass] = {}
    once: Columns = {}
    known: dict[str, Row] = {}
    for peer in weights.peers():
        try:
            reader, errors = weights.gate_of(peer)
            known[peer.name] = _rounded(errors)
            if peer.approximate:
                known[peer.name]["approximate"] = True
            elif max(errors.values()) > EXACT:
                known[peer.name]["timed"] = f"none: it is off by {max(errors.values()):.1e}"
                continue
            one = Pass(reader, weights.gs)
            first = one.samples(clock)
            if first[BOTH].seconds > ONCE[clock.kind]:
                once[peer.name] = [one.samples(clock)]
        except Exception as error:  # of other people's code
            known[peer.name] = {"timed": rows.none_for(error)}
            continue
        theirs[peer.name] = one
    if not known:
        return []
    timers: dict[str, Timer] = {ours: partial(our_pass.samples, clock)}
    timers |= {n: partial(one.samples, clock) for n, one in theirs.items() if n not in once}
    how_many = rounds.how_many(timers, rounds.LONGEST_OF_PEERS[clock.kind])
    columns = rounds.interleaved(timers, rounds.plainly, *how_many) | once
    found = _around(clock, theirs, columns)
    for phase, by_name in found.items():
        seconds = _seconds(columns, phase)
        for name, row in by_name.items():
            row["speedup_of_ours"] = rows.ratio(seconds[name], seconds[ours])
    found[BOTH] = {name: known[name] | found[BOTH].get(name, {}) for name in known}
    return _rows(weights, columns, found)


def _seconds(columns: Columns, phase: str) -> dict[str, list[float]]:
    """By contender; one whose turns have no such phase is left out."""
    return {
        name: [turn[phase].seconds for turn in turns]
        for name, turns in columns.items()
        if phase in turns[0]
    }


def _around(clock: Clock, passes: dict[str, Pass], columns: Columns) -> Found:
    """Of each contender the memory, and on a GPU the times of the device alone."""
    found: Found = {phase: {name: {} for name in passes} for phase in PHASES}
    for name, one in passes.items():
        found[BOTH][name]["peak_bytes"] = one.peak_bytes(clock)
    for (phase, name), seconds in _alone(clock, passes, columns).items():
        found[phase][name] |= rows.percentiles(seconds, "device_")
    return found


def _alone(
    clock: Clock, passes: dict[str, Pass], columns: Columns
) -> dict[tuple[str, str], list[float]]:
    """Seconds of the device by phase and contender, where it is not waited for.

    A step longer than SLOW has none: what the host does is a small part of it.
    """
    short = {
        (phase, name): max(turn[phase].host for turn in columns[name])
        for name in passes
        for phase in PHASES
        if min(turn[BOTH].seconds for turn in columns[name]) < SLOW
    }
    found: dict[tuple[str, str], list[float]] = {key: [] for key in short}
    for _ in range(DEVICE_ROUNDS):
        for key in list(found):
            phase, name = key
            alone = passes[name].device_seconds(clock, phase, short[key])
            if alone is not None:
                found[key].append(alone)
            elif not found[key]:  # found out in the first round
                del found[key]
    return found


def _replays(weights: Weights, passes: dict[str, Pass]) -> tuple[dict[str, Timer], dict[str, str]]:
    """Timers of graph replays, and of steps that no graph can hold; and which each one is."""
    timers: dict[str, Timer] = {}
    how: dict[str, str] = {}
    for name, one in passes.items():
        if name in weights.once:
            how[name] = "eager: once"
        else:
            again = Pass(one.reader, weights.gs, returned=True)
            timers[name], how[name] = again.replays(weights.clock)
    return timers, how


def _columns(weights: Weights, timers: dict[str, Timer], repeat: rounds.Repeat) -> Columns:
    """By contender; what is too slow to be timed again has the turn it has had."""
    once = {name: [turn] for name, turn in weights.once.items()}
    timers = {name: timer for name, timer in timers.items() if name not in once}
    how_many = rounds.how_many(timers, rounds.LONGEST[weights.clock.kind])
    return once | rounds.interleaved(timers, repeat, *how_many)


def _rows(weights: Weights, columns: Columns, found: Found, graph: str = "") -> list[Row]:
    """Phase by phase of all contenders of which something is found; on a GPU the host's times."""
    table = []
    for phase, by_name in found.items():
        seconds, floor = _seconds(columns, phase), _floor(weights, phase)
        for name, more in by_name.items():
            table.append(rows.row(weights.timed, phase + graph, name, seconds) | more | floor)
            if weights.clock.kind == "cuda" and name in seconds:
                hosts = [turn[phase].host for turn in columns[name]]
                table[-1] |= rows.percentiles(hosts, "host_")
    return table
