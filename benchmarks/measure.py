"""How a row is measured: gate against fp64, contenders, floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

import tritonparam as tp
from benchmarks.cases import NORMS, Timed, least, torchs_bytes, torchs_own
from benchmarks.clock import PRODUCTS_FROM, Clock, Step
from tests.cases import Case, composed, error, fused

Row = dict[str, Any]
Timer = Callable[[], float]
Reader = Callable[[], list[Tensor]]
# Calls the second argument and then the first, as often as the third says.
Repeat = Callable[[Step, Step, int], object]

ROUNDS = 30
WARM_UP = 5
# Seconds: above the first nothing is compiled, beyond the second a contender gets fewer rounds, and
# a baseline that takes longer than the third is timed once.
SLOW = 0.3
LONGEST = {"cpu": 20.0, "cuda": 3.0}
ONCE = {"cpu": float("inf"), "cuda": 1.0}


def plainly(step: Step, before: Step, rounds: int) -> None:
    """Repeat without pytest-benchmark."""
    for _ in range(rounds):
        before()
        step()


class Weights:
    """The constrained weights of one row: ours, and those of the baseline.

    Attributes:
        why_none: why there is no baseline, or the empty string.
        once: its seconds where it is too slow to be timed again, known after `readers`.
    """

    def __init__(self, timed: Timed, clock: Clock) -> None:
        torch.manual_seed(0)
        self.timed, self.clock = timed, clock
        case, norm = timed.case, NORMS.get(timed.name, 1.0)
        originals = [
            case.original(shape, norm, torch.float32).to(clock.device) for shape in timed.shapes
        ]
        self.gs = [torch.randn(shape, device=clock.device) for shape in timed.shapes]
        self.modules = [case.module(x) for x in originals]
        make = torchs_own(case)
        self.why_none = self._no_room() if make else ""
        self.once: float | None = None
        self.theirs: list[nn.Module] = []
        if not self.why_none:
            self.theirs = [make(x) if make else case.module(x) for x in originals]

    def _no_room(self) -> str:
        need = sum(torchs_bytes(self.timed.name, shape) for shape in self.timed.shapes)
        free = self.clock.free_bytes()
        if need <= free:
            return ""
        return f"none: torch's n × n matrices take {need >> 30} GB of {free >> 30} GB"

    def paths(self) -> list[str]:
        """The fused paths that these weights have on this device."""
        if self.clock.kind == "cpu":
            return ["closed"]
        with tp.use_path("kernel"):
            rows = [tp.explain(module)[0] for module in self.modules]
        return ["closed", "kernel"] if all(row.path == "kernel" for row in rows) else ["closed"]

    def gate(self) -> dict[str, tuple[float, float]]:
        """The largest errors of value and gradient by contender.

        Fails where a fused one is not as good as torch.
        """
        found: dict[str, tuple[float, float]] = {}
        distinct = {g.shape: (m, g) for m, g in zip(self.modules, self.gs, strict=True)}
        for module, g in distinct.values():
            for name, errors in _gate(module, g, self.paths()).items():
                before = found.get(name, (0.0, 0.0))
                found[name] = (max(before[0], errors[0]), max(before[1], errors[1]))
        return found

    def train(self) -> None:
        """Put all into training mode, as what is timed."""
        for module in (*self.modules, *self.theirs):
            module.train()

    def readers(self) -> dict[str, tuple[str, Reader, list[nn.Module]]]:
        """What reads the weights, by contender: the path it takes, the call, the modules."""

        def reader(modules: list[nn.Module]) -> Reader:
            return lambda: [module.weight for module in modules]

        found: dict[str, tuple[str, Reader, list[nn.Module]]] = {}
        seconds = self._baseline_seconds()
        if seconds is not None:
            read = reader(self.theirs)
            found["composed"] = ("composed", read, self.theirs)
            self.once = seconds if seconds > ONCE[self.clock.kind] else None
            if seconds < SLOW:
                found["compiled"] = ("composed", torch.compile(read, dynamic=False), self.theirs)
        for path in self.paths():
            found[path] = (path, reader(self.modules), self.modules)
        return found

    def _baseline_seconds(self) -> float | None:
        """Of its second run, or None where there is no baseline, or too little memory for it."""
        if self.why_none:
            return None
        step = _into_grad(self, "composed", lambda: [m.weight for m in self.theirs], self.theirs)
        try:
            step()
            return self.clock.seconds(step)
        except torch.OutOfMemoryError:
            self.theirs, self.why_none = [], "none: torch's runs out of memory"
            return None

    def floor(self) -> float:
        """Seconds of the bytes and operations that all of them need."""
        needs = [least(self.timed.name, shape) for shape in self.timed.shapes]
        n_bytes, operations = (sum(column) for column in zip(*needs, strict=True))
        return self.clock.floor(n_bytes, operations, self.timed.shapes[0][-1])


def _gate(module: nn.Module, g: Tensor, paths: list[str]) -> dict[str, tuple[float, float]]:
    # Matrix by matrix in fp64: batched LU on the CPU cannot be trusted there (pytorch #142815).
    module = deepcopy(module).eval()
    y64, dw64 = composed(module, g)
    y32, dw32 = composed(module, g, torch.float32)
    found = {"composed": (error(y32, y64), error(dw32, dw64))}
    for path in paths:
        y, dw = fused(module, g, path)
        found[path] = (error(y, y64), error(dw, dw64))
        for mine, theirs in zip(found[path], found["composed"], strict=True):
            assert mine <= 3 * theirs + 5e-7, f"{path} is off by {mine:.1e}, torch by {theirs:.1e}"
    return found


def _into_grad(weights: Weights, path: str, read: Reader, modules: list[nn.Module]) -> Step:
    """A step as in training: gradients go to ``.grad``, which is None before."""
    parameters = [x for module in modules for x in module.parameters()]

    def step() -> None:
        with tp.use_path(path):
            for x in parameters:
                x.grad = None
            torch.autograd.backward(read(), weights.gs)

    return step


def _returned(weights: Weights, path: str, read: Reader, modules: list[nn.Module]) -> Step:
    """The same for a graph: gradients are returned, whatever stream the parameters came from."""
    parameters = [x for module in modules for x in module.parameters()]

    def step() -> object:
        with tp.use_path(path):
            return torch.autograd.grad(read(), parameters, weights.gs)

    return step


def forward_backward(timed: Timed, clock: Clock, repeat: Repeat = plainly) -> Iterator[list[Row]]:
    """The rows of one chain: in eager mode, and of graph replays where they are asked for.

    They are yielded one kind after the other, so that the first are kept if time runs out.
    """
    torch.compiler.reset()
    weights = Weights(timed, clock)
    errors = weights.gate()
    weights.train()
    extra: Row = {}
    if clock.kind == "cuda":  # there are no floors for the CPU
        extra["floor_us"] = round(weights.floor() * 1e6, 2)
        n = timed.shapes[0][-1]
        if n >= PRODUCTS_FROM:
            products = clock.product_seconds(n)
            extra["product_us"] = {name: round(s * 1e6, 1) for name, s in products.items()}
    readers = weights.readers()
    timers = {
        name: _timer(clock.seconds, _into_grad(weights, *reader))
        for name, reader in readers.items()
    }
    yield _rows(weights, "forward+backward", _times(weights, timers, repeat), errors, extra)
    if timed.graph:
        timers, how = _replays(weights, readers)
        times = _times(weights, timers, plainly)
        rows = _rows(weights, "forward+backward, graph", times, errors, extra)
        yield [row | {"timed": how.get(row["contender"], "eager: once")} for row in rows]


def _replays(
    weights: Weights, readers: dict[str, tuple[str, Reader, list[nn.Module]]]
) -> tuple[dict[str, Timer], dict[str, str]]:
    """Timers of graph replays, and of steps that no graph can hold; and which each one is."""
    clock = weights.clock
    timers: dict[str, Timer] = {}
    how: dict[str, str] = {}
    for name, reader in readers.items():
        if name == "composed" and weights.once is not None:
            timers[name] = float  # not called
            continue
        step = _returned(weights, *reader)
        step()
        timers[name], how[name] = _timer(clock.seconds, step), "eager: it synchronizes"
        if not clock.synchronizes(step):
            try:
                timers[name] = _timer(clock.device_seconds, clock.capture(step))
                how[name] = "graph replay"
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                how[name] = f"eager: it cannot be captured: {reason}"
                clock.synchronize()
    return timers, how


def _times(weights: Weights, timers: dict[str, Timer], repeat: Repeat) -> dict[str, list[float]]:
    """Seconds by contender, as many of each as take no longer than LONGEST."""
    often = {name: t for name, t in timers.items() if name != "composed" or weights.once is None}
    slowest = max(timer() for timer in often.values())
    longest = LONGEST[weights.clock.kind]
    rounds = max(3, min(ROUNDS, int(longest / max(slowest, 1e-9))))
    times = interleaved(often, repeat, rounds, min(WARM_UP, rounds))
    if weights.once is not None:
        times = {"composed": [weights.once], **times}
    return times


def _timer(measure: Callable[[Step], float], step: Step) -> Timer:
    return lambda: measure(step)


def interleaved(
    timers: dict[str, Timer], repeat: Repeat, rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, the last one under pytest-benchmark's clock."""
    for timer in timers.values():
        for _ in range(warm_up):
            timer()
    times: dict[str, list[float]] = {name: [] for name in timers}
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
    times: dict[str, list[float]],
    errors: dict[str, tuple[float, float]],
    extra: Row,
) -> list[Row]:
    rows = []
    if weights.why_none:
        rows.append(row(weights.timed, phase, "composed", {}) | {"timed": weights.why_none})
    for name in times:
        rows.append(row(weights.timed, phase, name, times))
        if name in errors:
            rows[-1] |= _errors(errors[name])
    return [r | extra for r in rows]


def _errors(found: tuple[float, float]) -> Row:
    value, gradient = (float(f"{e:.1e}") for e in found)
    return {"value_error": value, "gradient_error": gradient}


def row(timed: Timed, phase: str, name: str, times: dict[str, list[float]]) -> Row:
    """One contender's row; without times it says that there is none."""
    shapes = [list(shape) for shape in timed.shapes]
    found: Row = {
        "chain": timed.name,
        "shape": shapes[0] if len(shapes) == 1 else shapes,
        "dtype": "float32",
        "phase": phase,
        "contender": name,
        "median_us": None,
        "p20_us": None,
        "p80_us": None,
        "speedup_over_composed": None,
    }
    mine = times.get(name, [])
    if mine:
        p20, *_, p80 = quantiles(mine, n=5) if len(mine) > 1 else mine * 4
        for key, value in (("median_us", median(mine)), ("p20_us", p20), ("p80_us", p80)):
            found[key] = round(value * 1e6, 1)
    if mine and "composed" in times:
        theirs = times["composed"]
        ratios = [a / b for a, b in zip(theirs, mine, strict=False)]
        if len(theirs) != len(mine):
            ratios = [median(theirs) / median(mine)]
        found["speedup_over_composed"] = float(f"{median(ratios):.4g}")
    return found


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
    errors = _gate(module, g, list(paths[1:]))

    def reading(path: str) -> Step:
        def step() -> None:
            with tp.use_path(path), torch.set_grad_enabled(backward):
                for _ in range(READS):
                    weight = module.weight
                    if backward:
                        torch.autograd.grad(weight, parameters, g)

        return step

    timers = {path: _timer(clock.host_seconds, reading(path)) for path in paths}
    times = interleaved(timers, repeat, READ_ROUNDS, 1)
    times = {name: [seconds / READS for seconds in column] for name, column in times.items()}
    phase = "read and backward" if backward else "read"
    return [row(timed, phase, name, times) | _errors(errors[name]) for name in times]
