"""How a row is measured: gate against fp64, contenders in turn, host and device, memory, floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch

import tritonparam as tp
from benchmarks import rows
from benchmarks.cases import Timed
from benchmarks.clock import PRODUCTS_FROM, Clock, Sample, Step
from benchmarks.rows import Row
from benchmarks.weights import EXACT, ONCE, SLOW, Reader, Weights, drop, gate, into_grad, returned
from tests.cases import Case

T = TypeVar("T")
Timer = Callable[[], Sample]
# Calls the second argument and then the first, as often as the third says.
Repeat = Callable[[Step, Step, int], object]

ROUNDS = 30
WARM_UP = 5
DEVICE_ROUNDS = 9
# Seconds: a contender that takes longer than the first in all gets fewer rounds, and so do peers
# beyond the second; what warms up takes no longer than the third.
LONGEST = {"cpu": 20.0, "cuda": 3.0}
LONGEST_OF_PEERS = {"cpu": 8.0, "cuda": 1.0}
LONGEST_WARM_UP = 1.0


def plainly(step: Step, before: Step, rounds: int) -> None:
    """Repeat without pytest-benchmark."""
    for _ in range(rounds):
        before()
        step()


def forward_backward(timed: Timed, clock: Clock, repeat: Repeat = plainly) -> Iterator[list[Row]]:
    """The rows of one chain: in eager mode, of graph replays where they are asked for, of peers.

    They are yielded one kind after the other, so that the first are kept if time runs out.
    """
    torch.compiler.reset()
    weights = Weights(timed, clock)
    errors = {name: rows.errors(found) for name, found in weights.gate().items()}
    weights.train()
    extra = _floor(weights)
    readers = weights.readers()
    steps = {name: into_grad(weights, reader) for name, reader in readers.items()}
    timers = {name: partial(clock.sample, step) for name, step in steps.items()}
    samples = _samples(weights, timers, repeat)
    found = _around(weights, readers, steps, samples)
    for name, reader in readers.items():
        if name in errors:
            found[name] |= errors[name] | _rounded(weights.constraint(reader))
    yield _rows(weights, "forward+backward", samples, found, extra)
    if timed.graph:
        timers, how = _replays(weights, readers)
        samples = _samples(weights, timers, plainly)
        found = {name: errors.get(name, {}) | {"timed": how[name]} for name in samples}
        yield _rows(weights, "forward+backward, graph", samples, found, extra)
    if theirs := _peers(weights, readers, extra):
        yield theirs


def _floor(weights: Weights) -> Row:
    clock, n = weights.clock, weights.timed.shapes[0][-1]
    if clock.kind != "cuda":  # there are no floors for the CPU
        return {}
    found: Row = {"floor_us": round(weights.floor() * 1e6, 2)}
    if n >= PRODUCTS_FROM:
        products = clock.product_seconds(n)
        found["product_us"] = {name: round(s * 1e6, 1) for name, s in products.items()}
    return found


def _rounded(errors: dict[str, float]) -> Row:
    return {name: rows.error(x) for name, x in errors.items()}


def _peers(weights: Weights, readers: dict[str, Reader], extra: Row) -> list[Row]:
    """Rows of the peers, interleaved with our last path, and what that gains over each of them."""
    clock = weights.clock
    *_, ours = readers
    steps = {ours: into_grad(weights, readers[ours])}
    theirs: dict[str, Reader] = {}
    once: dict[str, list[Sample]] = {}
    found: dict[str, Row] = {}
    slowest = 0.0
    for peer in weights.peers():
        try:
            reader, errors = weights.gate_of(peer)
            found[peer.name] = _rounded(errors)
            if peer.approximate:
                found[peer.name]["approximate"] = True
            elif max(errors.values()) > EXACT:
                found[peer.name]["timed"] = f"none: it is off by {max(errors.values()):.1e}"
                continue
            step = into_grad(weights, reader)
            sample = clock.sample(step)
            if sample.seconds > ONCE[clock.kind]:
                once[peer.name] = [clock.sample(step)]
        except torch.OutOfMemoryError:
            found[peer.name] = {"timed": "none: it runs out of memory"}
            continue
        theirs[peer.name], steps[peer.name] = reader, step
        slowest = max(slowest, 0.0 if peer.name in once else sample.seconds)
    timers = {name: partial(clock.sample, step) for name, step in steps.items() if name not in once}
    samples = interleaved(timers, plainly, *_rounds(slowest, LONGEST_OF_PEERS[clock.kind])) | once
    seconds = _seconds(samples)
    for name, more in _around(weights, theirs, steps, samples).items():
        found[name] |= more | {"speedup_of_ours": rows.ratio(seconds[name], seconds[ours])}
    return [
        rows.row(weights.timed, "forward+backward", name, seconds) | more | extra
        for name, more in found.items()
    ]


def _seconds(samples: dict[str, list[Sample]]) -> dict[str, list[float]]:
    return {name: [sample.seconds for sample in column] for name, column in samples.items()}


def _around(
    weights: Weights,
    readers: dict[str, Reader],
    steps: dict[str, Step],
    samples: dict[str, list[Sample]],
) -> dict[str, Row]:
    """Of each contender the memory, and on a GPU the times of the device alone."""
    found: dict[str, Row] = {}
    for name, reader in readers.items():
        drop(reader)
        found[name] = {"peak_bytes": weights.clock.peak_bytes(steps[name])}
    for name, seconds in _alone(weights.clock, steps, {n: samples[n] for n in readers}).items():
        found[name] |= rows.percentiles(seconds, "device_")
    return found


def _alone(
    clock: Clock, steps: dict[str, Step], samples: dict[str, list[Sample]]
) -> dict[str, list[float]]:
    """Seconds of the device, where a step does not wait for it.

    A step longer than SLOW has none: what the host does is a small part of it.
    """
    hosts = {name: max(sample.host for sample in column) for name, column in samples.items()}
    found: dict[str, list[float]] = {}
    for _ in range(DEVICE_ROUNDS):
        for name, column in samples.items():
            waits = found.get(name) == []  # found out in the first round
            if waits or min(column).seconds >= SLOW:
                continue
            alone = clock.queued_seconds(steps[name], hosts[name])
            found.setdefault(name, []).extend([] if alone is None else [alone])
    return {name: seconds for name, seconds in found.items() if seconds}


def _replays(
    weights: Weights, readers: dict[str, Reader]
) -> tuple[dict[str, Timer], dict[str, str]]:
    """Timers of graph replays, and of steps that no graph can hold; and which each one is."""
    clock = weights.clock
    timers: dict[str, Timer] = {}
    how: dict[str, str] = {}
    for name, reader in readers.items():
        if name == "composed" and weights.once is not None:
            how[name] = "eager: once"
            continue
        step = returned(weights, reader)
        step()
        timers[name], how[name] = partial(clock.sample, step), "eager: it synchronizes"
        if not clock.synchronizes(step):
            try:
                timers[name] = partial(clock.device_sample, clock.capture(step))
                how[name] = "graph replay"
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                how[name] = f"eager: it cannot be captured: {reason}"
                clock.synchronize()
    return timers, how


def _samples(weights: Weights, timers: dict[str, Timer], repeat: Repeat) -> dict[str, list[Sample]]:
    """By contender; a baseline that is too slow to be timed again has the one it has."""
    once = {} if weights.once is None else {"composed": [weights.once]}
    timers = {name: timer for name, timer in timers.items() if name not in once}
    slowest = max(timer().seconds for timer in timers.values())
    found = interleaved(timers, repeat, *_rounds(slowest, LONGEST[weights.clock.kind]))
    return once | found


def _rounds(slowest: float, longest: float) -> tuple[int, int]:
    """Rounds that are timed, three at least, and before them."""
    slowest = max(slowest, 1e-9)
    rounds = max(3, min(ROUNDS, int(longest / slowest)))
    return rounds, min(WARM_UP, rounds, int(LONGEST_WARM_UP / slowest))


def interleaved(
    timers: dict[str, Callable[[], T]], repeat: Repeat, rounds: int, warm_up: int
) -> dict[str, list[T]]:
    """What each contender's timer says in each round, the last under pytest-benchmark's clock."""
    for timer in timers.values():
        for _ in range(warm_up):
            timer()
    times: dict[str, list[T]] = {name: [] for name in timers}
    *others, last = timers

    def time_the_others() -> None:
        for name in others:
            times[name].append(timers[name]())

    def time_the_last() -> None:
        times[last].append(timers[last]())

    repeat(time_the_last, time_the_others, rounds)
    return times


def _rows(
    weights: Weights,
    phase: str,
    samples: dict[str, list[Sample]],
    found: dict[str, Row],
    extra: Row,
) -> list[Row]:
    """Of all contenders, with what is known of each and of all; on a GPU with the host's times."""
    table, times = [], _seconds(samples)
    if weights.why_none:
        none = rows.row(weights.timed, phase, "composed", {})
        table.append(none | {"timed": weights.why_none} | extra)
    for name, column in samples.items():
        table.append(rows.row(weights.timed, phase, name, times) | found[name] | extra)
        if weights.clock.kind == "cuda":
            table[-1] |= rows.percentiles([sample.host for sample in column], "host_")
    return table


READS, READ_ROUNDS = 20, 100


def read(
    case: Case, n: int, clock: Clock, repeat: Repeat = plainly, *, backward: bool = False
) -> list[Row]:
    """What the property, the guard and the op cost the host, per read of an n × n weight.

    It is read without a gradient, or with one and its backward pass.
    """
    torch.manual_seed(0)
    timed = Timed(case.name, ((n, n),))
    module = case.module(case.original((n, n), 1.0, torch.float32).to(clock.device))
    parameters, g = list(module.parameters()), torch.randn(n, n, device=clock.device)
    paths = ("composed", "kernel" if clock.kind == "cuda" else "closed")
    errors = gate(module, g, list(paths[1:]))

    def reading(path: str) -> Step:
        def step() -> None:
            with tp.use_path(path), torch.set_grad_enabled(backward):
                for _ in range(READS):
                    weight = module.weight
                    if backward:
                        torch.autograd.grad(weight, parameters, g)

        return step

    timers = {path: partial(clock.host_seconds, reading(path)) for path in paths}
    times = interleaved(timers, repeat, READ_ROUNDS, 1)
    times = {name: [seconds / READS for seconds in column] for name, column in times.items()}
    phase = "read and backward" if backward else "read"
    return [rows.row(timed, phase, name, times) | rows.errors(errors[name]) for name in times]
