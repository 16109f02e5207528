"""On which path a fused chain is evaluated: what it is set to, what was measured, what can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tritonparam import configs, failures
from tritonparam.tables import PATHS

_ON_CPU = "the original is on the cpu"  # the device's own string takes longer than the rest
_HAS_TRITON = find_spec("triton") is not None
_counts = dict.fromkeys(PATHS, 0)


def _check_path(who: str, path: str) -> str:
    if path not in PATHS:
        raise ValueError(f"{who}: the path must be one of {', '.join(PATHS)}, got {path!r}.")
    return path


# A plain global: a ContextVar does not trace under torch.compile(fullgraph=True). What the variable
# holds is checked by ``override``, and not here, where the command line could not say it.
_override = os.environ.get("TRITONPARAM_PATH") or None


@contextmanager
def use_path(path: str) -> Iterator[None]:
    """Evaluate every fused weight that is read inside the block on one path.

    For debugging and benchmarks; the override is global to the process.

    Arguments:
        path: ``"kernel"`` (an error where the kernel cannot run), ``"closed"`` or ``"composed"``.

    Raises:
        ValueError: there is no such path.

    >>> from tritonparam import Skew
    >>> with use_path("composed"):
    ...     pass
    """
    global _override
    before, _override = _override, _check_path("use_path", path)
    try:
        yield
    finally:
        _override = before


def override() -> str | None:
    """The path that every fused chain is set to, or None; ValueError where it is none of PATHS."""
    return _override if _override is None else _check_path("TRITONPARAM_PATH", _override)


def measured(chain: str, x: Tensor, n: int, dtype: torch.dtype | None = None) -> str:
    """The path that the table of measured paths says is fastest, or the empty string.

    It is empty as well where ``use_path`` asks for a path, and in a graph that is being compiled,
    since the table is measured in eager mode. Arguments as for ``configs.lookup``.
    """
    return configs.fastest(chain, x, n, dtype) if asks(torch.compiler.is_compiling()) else ""


def asks(compiling: bool) -> bool:
    """Whether the table of measured paths is asked, and has rows at all."""
    return not compiling and _override is None and bool(configs.table())


def kernel_declines(chain: str, x: Tensor, n: int, dtype: torch.dtype | None = None) -> str:
    """Why no Triton kernel of a chain runs on x, whatever its shape, or the empty string."""
    if declined := device_declines(x):
        return declined
    if measured(chain, x, n, dtype) == "closed":
        return f"the closed form was measured faster at n = {n} on this device"
    return failures.cause(chain, x, n)


def fall_back(error: Exception, chain: str, x: Tensor, n: int) -> None:
    """Go on with the closed form after an error of a kernel, with a warning once for the chain.

    Only where Triton's compiler is what failed, and not under ``use_path("kernel")``: else the
    error is raised again. From then on ``kernel_declines`` answers for the same arguments.
    """
    if _override == "kernel" or not kernels().cannot_compile(error):
        raise error
    failures.remember(chain, x, n, error)


def device_declines(x: Tensor) -> str:
    """Why no Triton kernel can run on x's device, or the empty string."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if not x.is_cuda and not (_override == "kernel" and _interpreted()):
        return _ON_CPU if x.is_cpu else f"the original is on the {x.device.type}"
    return ""


def on_cpu(x: Tensor) -> bool:
    """Whether the closed form is certain as x is on the CPU; less work than ``device_declines``."""
    return x.is_cpu and _override != "kernel"


def no_kernel(x: Tensor, *more: Tensor) -> str:
    """Why no Triton kernel takes a chain that has none, wherever its tensors are."""
    return device_declines(x) or "this chain has no kernel yet"


@lru_cache
def kernels(name: str = "") -> Any:
    """A file of ``tritonparam.kernels``, or the package, imported when it is first needed."""
    return import_module(f"tritonparam.kernels.{name}".rstrip("."))


def _interpreted() -> bool:
    return kernels().INTERPRETED


@lru_cache
def backend() -> str:
    """What configurations are for: "cuda", "hip", or "interpreter"."""
    return "interpreter" if _interpreted() else "hip" if torch.version.hip else "cuda"


def path(declined: str) -> str:
    """``"kernel"`` or ``"closed"``, given why the kernel declines; the override has the last word.

    Raises RuntimeError under ``use_path("kernel")`` where the kernel cannot run.
    """
    if _override == "kernel" and declined:
        raise RuntimeError(
            f'use_path("kernel"): the kernel cannot run because {declined}; '
            'use_path("closed") is the fused path there.'
        )
    return "closed" if declined or _override == "closed" else "kernel"


def count(path: str) -> None:
    """Count one evaluation on a path."""
    _counts[path] += 1


def stats(*, reset: bool = False) -> dict[str, int]:
    """How often a fused parametrization list was evaluated on each path, so far in this process.

    Arguments:
        reset: set the counts to zero after reading them.

    Returns:
        ``{"kernel": int, "closed": int, "composed": int}``. Composed evaluations inside a
        compiled graph, and replays of a CUDA graph, are not seen.

    >>> sorted(stats())
    ['closed', 'composed', 'kernel']
    """
    counts = dict(_counts)
    if reset:
        _counts.update(dict.fromkeys(PATHS, 0))
    return counts
