"""Contenders in turn: in how many rounds, and in what order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from benchmarks.clock import Step

T = TypeVar("T")
# Calls the second argument and then the first, as often as the third says.
Repeat = Callable[[Step, Step, int], object]

LEAST, ROUNDS = 3, 30
WARM_UP = 5
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


def how_many(timers: dict[str, Callable[[], T]], longest: float) -> tuple[int, int]:
    """Rounds that are timed, and before them, by the turn that takes longest.

    Every contender has run before, so that what it compiles is no part of its turn.
    """
    slowest = 1e-9
    for timer in timers.values():
        started = time.perf_counter()
        timer()
        slowest = max(slowest, time.perf_counter() - started)
    rounds = max(LEAST, min(ROUNDS, int(longest / slowest)))
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
