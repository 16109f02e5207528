"""Contenders in turn, so that what else a machine does falls on all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def take(
    timers: Sequence[Callable[[], T]],
    *,
    warm_up: int,
    least: int,
    seconds: float,
    most: float = math.inf,
) -> list[list[T]]:
    """What each timer says in each round; every other round goes backwards.

    Arguments:
        warm_up: how often each is called before.
        least, most: how many rounds there are.
        seconds: after how many no round beyond the least begins.
    """
    for timer in timers:
        for _ in range(warm_up):
            timer()
    said: list[list[T]] = [[] for _ in timers]
    pairs = list(zip(timers, said, strict=True))
    rounds, end = 0, time.perf_counter() + seconds
    while timers and rounds < most and (rounds < least or time.perf_counter() < end):
        for timer, mine in pairs if rounds % 2 == 0 else reversed(pairs):
            mine.append(timer())
        rounds += 1
    return said


def ratios(some: Sequence[float], others: Sequence[float]) -> list[float]:
    """How many times as long some took as others did in the same round, in ascending order."""
    return sorted(a / b for a, b in zip(some, others, strict=True))
