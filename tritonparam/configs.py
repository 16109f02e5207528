"""Which path and which launch configuration are measured fastest, of ``tuned_configs.json``.

The file is one table, a row for each device, compute dtype, chain and size::

    {"format": 1, "rows": [
      {"device": "NVIDIA H100 80GB HBM3", "dtype": "float32", "chain": "cayley", "n": 64,
       "path": "kernel", "config": {"fwd": {"num_warps": 2}, "bwd": {"block_k": 32}}}
    ]}

``device`` is ``torch.cuda.get_device_name()``. A row speaks for the sizes in (2ᵏ⁻¹, 2ᵏ] that its
``n`` lies in, as kernels do with their power-of-two tiles. ``config`` replaces numbers of the
heuristic beside the kernel, by phase; a ``path`` of "closed" or "composed" says that the kernel,
or everything fused, was measured slower. What no row speaks for is left to the heuristics.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

PATHS = ("kernel", "closed", "composed")
FORMAT = 1
FILE = Path(__file__).with_name("tuned_configs.json")

Config = TypeVar("Config")


@dataclass(frozen=True)
class Choice:
    """What a row says: the path, and the launch numbers of its kernels by phase."""

    path: str
    config: dict[str, dict[str, Any]]


Key = tuple[str, torch.dtype, str, int]


def lookup(chain: str, x: Tensor, n: int) -> Choice | None:
    """What is measured fastest for a chain on x's device, in the compute dtype of x and at size n.

    n is what the chain's cost grows with: that of n × n, k of n × k. The answer is remembered;
    asking costs less than a microsecond.
    """
    return _lookup(x.device, x.dtype, chain, n)


def fastest(chain: str, x: Tensor, n: int) -> str:
    """The path that is measured fastest, or the empty string where none is."""
    choice = _lookup(x.device, x.dtype, chain, n) if table() else None
    return choice.path if choice else ""


def launch(
    chain: str, phase: str, x: Tensor, default: Callable[..., Config], n: int, *more: Any
) -> Config:
    """The configuration to launch with: ``default(n, *more)``, with the numbers measured faster.

    `default` is the heuristic beside the kernel; `phase` is "fwd" or "bwd".
    """
    return _launch(x.device, x.dtype, chain, phase, default, n, *more)


def bucket(n: int) -> int:
    """The power of two at or above n, which stands for the sizes that are looked up alike."""
    return 1 << max(n - 1, 0).bit_length()


def reload() -> None:
    """Read the table again when it is next asked for."""
    for answers in (table, _lookup, _launch):
        answers.cache_clear()


@lru_cache(maxsize=4096)  # by the size itself: its bucket costs more than the rest
def _lookup(device: torch.device, dtype: torch.dtype, chain: str, n: int) -> Choice | None:
    rows = table()
    if not rows:
        return None
    compute = torch.promote_types(dtype, torch.float32)
    return rows.get((_device_name(device), compute, chain, bucket(n)))


@lru_cache(maxsize=4096)
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    chain: str,
    phase: str,
    default: Callable[..., Any],
    n: int,
    *more: Any,
) -> Any:
    config = default(n, *more)
    choice = _lookup(device, dtype, chain, n)
    numbers = choice.config.get(phase, {}) if choice else {}
    try:
        return replace(config, **numbers)
    except TypeError as error:
        _warn(f"{chain}, n = {n}, {phase}: {error}")
        return config


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def table() -> dict[Key, Choice]:
    """The file as a dictionary; a warning, and an empty one, where it cannot be read."""
    try:
        return parse(FILE.read_text())
    except (OSError, ValueError) as error:
        _warn(str(error))
        return {}


def _warn(reason: str) -> None:
    warnings.warn(
        f"{FILE.name} is not used: {reason}; launches take their default configurations.",
        stacklevel=1,
    )


def parse(text: str) -> dict[Key, Choice]:
    """The rows of a table; raises ValueError where it is not one."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it must be an object with format {FORMAT}")
    rows = content.get("rows")
    if not isinstance(rows, list):
        raise ValueError("rows must be a list")
    table: dict[Key, Choice] = {}
    for row in rows:
        key, choice = _parse_row(row)
        if key in table:
            raise ValueError(f"two rows speak for the same sizes: {row}")
        table[key] = choice
    return table


def _parse_row(row: Any) -> tuple[Key, Choice]:
    wanted = {"device": str, "dtype": str, "chain": str, "n": int, "path": str, "config": dict}
    if not isinstance(row, dict) or set(row) != set(wanted):
        raise ValueError(f"a row must have {', '.join(wanted)}, got {row}")
    for name, kind in wanted.items():
        if type(row[name]) is not kind:
            raise ValueError(f"{name} must be a JSON {kind.__name__}, got {row}")
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(row["dtype"])
    if dtype is None or row["path"] not in PATHS or row["n"] < 1:
        raise ValueError(f"no such compute dtype, path or size: {row}")
    phases = row["config"].items()
    if any(phase not in ("fwd", "bwd") or type(numbers) is not dict for phase, numbers in phases):
        raise ValueError(f"config must hold objects under fwd and bwd, got {row}")
    if row["config"] and row["path"] != "kernel":
        raise ValueError(f"only a kernel has a config, got {row}")
    key = (row["device"], dtype, row["chain"], bucket(row["n"]))
    return key, Choice(row["path"], row["config"])
