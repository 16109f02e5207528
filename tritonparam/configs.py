"""Which path and which launch configuration are measured fastest; ``tables`` has the rows.

What no row speaks for is left to the heuristics beside the kernels.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tritonparam import tables
from tritonparam.tables import Choice, Key

Config = TypeVar("Config")


def lookup(chain: str, x: Tensor, n: int, dtype: torch.dtype | None = None) -> Choice | None:
    """What is measured fastest for a chain on x's device, in its dtype and at size n.

    n is what the chain's cost grows with: that of n × n, k of n × k; `dtype` is the original's
    where that is not x's. The answer is remembered; asking costs less than a microsecond.
    """
    return _lookup(x.device, dtype or x.dtype, chain, n, x.numel()) if table() else None


def fastest(chain: str, x: Tensor, n: int, dtype: torch.dtype | None = None) -> str:
    """The path that is measured fastest, or the empty string where none is; as `lookup`."""
    choice = lookup(chain, x, n, dtype)
    return choice.path if choice else ""


def launch(
    chain: str,
    phase: str,
    x: Tensor,
    default: Callable[..., Config],
    n: int,
    *more: Any,
    dtype: torch.dtype | None = None,
) -> Config:
    """The configuration to launch with: ``default(n, *more)``, with the numbers measured faster.

    `default` is the heuristic beside the kernel; `phase` is "fwd" or "bwd"; x, n and `dtype` are
    as for `lookup`.
    """
    return _launch(x.device, dtype or x.dtype, chain, phase, default, n, x.numel(), *more)


def batch(n: int, numel: int) -> int:
    """How many n × n matrices of a tensor's size are as many numbers, at least one."""
    return max(numel // max(n * n, 1), 1)


def device_name(device: torch.device) -> str:
    """What rows call a device: a GPU by its name, a CPU by its model and torch's threads on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{processor()}, {torch.get_num_threads()} threads"
    return device.type


@cache
def processor() -> str:
    """The model of the CPU, or its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def reload() -> None:
    """Read the tables again when they are next asked for."""
    for answers in (table, _lookup, _launch):
        answers.cache_clear()


@contextmanager
def trying(row: tables.Row | None) -> Iterator[None]:
    """Let a row alone speak, or none, inside the block: what a tuner measures."""
    global _trial
    _trial = {} if row is None else {tables.key(row): row}
    reload()
    try:
        yield
    finally:
        _trial = None
        reload()


_trial: dict[Key, tables.Row] | None = None


@lru_cache(maxsize=4096)  # by the size itself: its bucket costs more than the rest
def _lookup(
    device: torch.device, dtype: torch.dtype, chain: str, n: int, numel: int
) -> Choice | None:
    size = tables.bucket(n), tables.bucket(batch(n, numel))
    row = table().get((device_name(device), dtype, chain, *size))
    return Choice(row["path"], row["config"]) if row else None


@lru_cache(maxsize=4096)
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    chain: str,
    phase: str,
    default: Callable[..., Any],
    n: int,
    numel: int,
    *more: Any,
) -> Any:
    config = default(n, *more)
    choice = _lookup(device, dtype, chain, n, numel) if table() else None
    numbers = choice.config.get(phase, {}) if choice else {}
    try:
        return replace(config, **numbers)
    except TypeError as error:
        warnings.warn(
            f"the tuned row of {chain}, n = {n}, {phase}, is not used: {error}; "
            "it is launched with its default configuration.",
            stacklevel=2,
        )
        return config


@cache
def table() -> dict[Key, tables.Row]:
    """The shipped rows, and before them the user's."""
    if _trial is not None:
        return _trial
    users = tables.users_file()
    return tables.read(tables.SHIPPED) | (tables.read(users) if users else {})
