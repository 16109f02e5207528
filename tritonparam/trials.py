"""Ways to evaluate one weight: what could be launched, what each uses, how long each takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch.nn.utils.parametrize import ParametrizationList

from tritonparam import configs, paths, tables, turns
from tritonparam.info import compilers, first_line
from tritonparam.reading import Reading
from tritonparam.rules import KERNELS

Clock = Callable[[Callable[[], object]], float]
PHASES = ("fwd", "bwd")
STEPS = 5  # of a turn, which is the fastest of them: what else a machine does only adds to a time
LONGEST_TURN = 0.5  # seconds after which no step of a turn begins
# Rounds, in which every trial has a turn, and the seconds after which none beyond the least begins.
LEAST, MOST, SECONDS = 5, 50, 10.0


@dataclass(frozen=True)
class Trial:
    """One way to evaluate a weight, and what came of it.

    Attributes:
        path: "kernel", "closed" or "composed".
        config: the launch numbers that differ from the kernels' default, by phase.
        resources: registers and bytes of stack per thread and of shared memory per program, the
            most that a launch of it takes; None where nothing was compiled.
        microseconds: of forward and backward, or None where it was not measured.
        ratio: of its time to that of the first that is right, in the same round: the median.
        upper: of these ratios, about the upper quartile, or the largest of few.
        reason: why it was discarded, or the empty string.
    """

    path: str
    config: dict[str, dict[str, Any]]
    resources: dict[str, int] | None = None
    microseconds: float | None = None
    ratio: float | None = None
    upper: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Problem:
    """What configurations are for: a chain at one size, in the dtype of the original, on a GPU.

    Raises ValueError where the chain has no launch configurations there that could be tuned.
    """

    chain: str
    n: int
    dtype: torch.dtype
    target: str

    def __post_init__(self) -> None:  # noqa: D105
        if not self._file():
            raise ValueError(
                f"tune: {self.chain} has no launch configurations to choose from at n = {self.n} "
                f"in {str(self.dtype).removeprefix('torch.')}; the chains that have some are "
                f"{', '.join(KERNELS)}."
            )

    def _file(self) -> str:
        return kernel_file(self.chain, self.n, self.dtype)

    def candidates(self, phase: str) -> list[Any]:
        """The configurations of a phase, the default first."""
        kernels = paths.kernels(self._file())
        backend = "hip" if self.target.startswith("gfx") else "cuda"
        return cast(list[Any], kernels.candidates(phase, self.n, self.dtype, backend))

    def launches(self, phase: str, numbers: dict[str, Any]) -> list[tuple]:
        """What is launched with these numbers in the place of the default's."""
        config = replace(self.candidates(phase)[0], **numbers)
        kernels = paths.kernels(self._file())
        return cast(list[tuple], kernels.launches(phase, self.chain, self.n, self.dtype, config))


def kernel_file(chain: str, n: int, dtype: torch.dtype) -> str:
    """The file of kernels with configurations to choose from, or the empty string."""
    return KERNELS[chain](n, dtype) if chain in KERNELS else ""


def candidates(problem: Problem) -> list[Trial]:
    """The default, then each candidate of a phase with the default of the other."""
    trials = [Trial("kernel", {})]
    for phase in PHASES:
        default, *others = problem.candidates(phase)
        for other in others:
            numbers = {f.name: getattr(other, f.name) for f in fields(other)}
            numbers = {k: v for k, v in numbers.items() if v != getattr(default, k)}
            trials.append(Trial("kernel", {phase: numbers}))
    return trials


def compiled(trials: Sequence[Trial], problem: Problem) -> Iterator[Trial]:
    """The trials with what they use when they are compiled, and a reason where it is too much."""
    with compilers() as pool:
        found = pool.map(_resources, [trial.config for trial in trials], [problem] * len(trials))
        for trial, used in zip(trials, found, strict=True):
            if isinstance(used, str):
                yield replace(trial, reason=used)
            else:
                yield replace(trial, resources=used, reason=_too_much(used, problem.target))


def _resources(config: dict[str, dict[str, Any]], problem: Problem) -> dict[str, int] | str:
    """The most that a launch with these numbers uses, or why one does not compile."""
    from tritonparam.kernels import aot

    most = dict.fromkeys(("regs", "stack", "shared"), 0)
    for phase in PHASES:
        if config and phase not in config:
            continue
        for name, kernel, types, options in problem.launches(phase, config.get(phase, {})):
            try:
                used = aot.compile_kernel(name, kernel, types, options, problem.target)
            except Exception as error:  # a compiler's, of any kind
                return f"{name} does not compile: {first_line(error)}"
            most = {key: max(value, getattr(used, key)) for key, value in most.items()}
    return most


def _too_much(used: dict[str, int], target: str) -> str:
    from tritonparam.kernels import aot

    limit = aot.SHARED_LIMIT.get(target)
    if used["stack"]:
        return f"it spills {used['stack']} bytes of registers"
    if limit and used["shared"] > limit:
        return f"it needs {used['shared']} bytes of shared memory, {target} has {limit}"
    return ""


class Weight(Reading):
    """Forward and backward of copies of a list, on the way that a trial says.

    Arguments:
        plist: what is measured; it is not changed.
        row: what a table would say of it.
        reference: the path whose value and gradients in fp64 the trials' are compared with.
    """

    def __init__(self, plist: ParametrizationList, row: tables.Row, reference: str) -> None:
        super().__init__(plist, reference)
        self._row = row

    @contextmanager
    def _on(self, trial: Trial) -> Iterator[None]:
        row = self._row | {"path": trial.path, "config": trial.config}
        with paths.use_path(trial.path), configs.trying(row):
            yield

    def _wrong(self, trial: Trial) -> str:
        with self._on(trial):
            try:
                return self.wrong()
            except Exception as error:
                if trial.path != "kernel" or not paths.kernels().cannot_compile(error):
                    raise
                return f"it cannot be launched: {first_line(error)}"

    def timed(self, trials: Sequence[Trial], clock: Clock) -> list[Trial]:
        """The trials with their times, and a reason where one computes something wrong.

        They take turns, and each is compared with the first that is right, round by round: what
        slows the machine down for a while slows all of a round, and changes no ratio.
        """
        trials = [t if t.reason else replace(t, reason=self._wrong(t)) for t in trials]
        own = self.copy()

        def turn(trial: Trial) -> float:
            with self._on(trial):
                self.step(own)  # what was remembered for the last trial is made again
                return fastest(clock, lambda: self.step(own))

        timers = [partial(turn, trial) for trial in trials if not trial.reason]
        seconds = turns.take(timers, warm_up=1, least=LEAST, most=MOST, seconds=SECONDS)
        measured = iter(seconds)
        return [t if t.reason else _timed(t, next(measured), seconds[0]) for t in trials]


def _timed(trial: Trial, seconds: Sequence[float], of_first: Sequence[float]) -> Trial:
    """A trial with what its seconds in each round say, by themselves and beside the first's."""
    ratios = turns.ratios(seconds, of_first)
    return replace(
        trial,
        microseconds=1e6 * statistics.median(seconds),
        ratio=statistics.median(ratios),
        upper=ratios[-max(len(ratios) // 4, 1)],
    )


def best_of_phases(trials: Sequence[Trial]) -> Trial | None:
    """The fastest numbers of both phases together, where each phase has some that gain."""
    best: dict[str, dict[str, Any]] = {}
    for phase in PHASES:
        some = [t for t in trials if t.path == "kernel" and t.ratio and {*t.config} <= {phase}]
        if some:
            best |= min(some, key=lambda t: cast(float, t.ratio)).config
    return Trial("kernel", best) if len(best) == len(PHASES) else None


def fastest(clock: Clock, step: Callable[[], object]) -> float:
    """Of some steps, or of those that a turn has time for, in seconds."""
    seconds = [clock(step)]
    while len(seconds) < STEPS and sum(seconds) < LONGEST_TURN:
        seconds.append(clock(step))
    return min(seconds)


def clock_of(device: torch.device) -> Clock:
    """Seconds of one step: of a GPU with cold caches, or of the host."""
    if device.type != "cuda":

        def on_host(step: Callable[[], object]) -> float:
            started = time.perf_counter()
            step()
            return time.perf_counter() - started

        return on_host
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    more_than_the_cache = torch.zeros(cache // 2, device=device)  # of four bytes each

    def on_device(step: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        more_than_the_cache.sum()  # while it is read, the step is queued
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_device
