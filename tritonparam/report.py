"""What the commands ``explain`` and ``tune`` show, of models named on the command line."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn

from tritonparam import info, registry, tables, trials, tuner
from tritonparam.explain import Explanation, Row, explain
from tritonparam.fuse import fuse
from tritonparam.info import BadOption
from tritonparam.tuner import Tuning


def rows(
    target: str, *, fused: bool = False, legacy: bool = False, errors: bool = False
) -> Explanation:
    """``explain`` of the model that a function makes, named as "package.module:function".

    Arguments:
        target: the function, or class, which takes no arguments, or a model itself.
        fused: fuse the model first.
        legacy: with `fused`, convert legacy hooks as well.
        errors: as of ``explain``.

    Raises:
        BadOption: there is no such module or function, or it takes arguments, or does not return a
            module; or `legacy` without `fused`. What the function itself raises is passed on.
    """
    if legacy and not fused:
        raise BadOption("--legacy needs --fuse: it says what is converted then.")
    model = build(target)
    if fused:
        fuse(model, legacy=legacy)
    return explain(model, errors=errors)


def build(target: str) -> nn.Module:
    """The model that "module:function" names; modules are found from the working directory too."""
    name, _, attribute = target.partition(":")
    if not attribute or not all(part.isidentifier() for part in name.split(".")):
        raise BadOption(f"the model must be named as module:callable, got {target!r}.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made: Any = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # of a module that it imports
        raise BadOption(
            f"there is no module {error.name!r} here, which {target!r} names."
        ) from None
    for part in attribute.split("."):
        if not hasattr(made, part):
            raise BadOption(f"{name} has no {attribute!r}; the model is named as module:callable.")
        made = getattr(made, part)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise BadOption(f"{target} must be callable, got a {type(made).__name__}.")
        _require_no_arguments(target, made)
        made = made()
    if not isinstance(made, nn.Module):
        raise BadOption(f"{target} must return an nn.Module, got a {type(made).__name__}.")
    return made


def _require_no_arguments(target: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise BadOption(
            f"{target} must be callable without arguments, but is {error}; name a function that "
            "passes them."
        ) from None
    except ValueError:  # of what is written in C, which need not have a signature
        return


def as_json(rows: Iterable[Row]) -> str:
    """``{"weights": [...]}``, an object with the fields of each row; a number that is not finite
    is a string."""
    weights = []
    for row in rows:
        fields = row._asdict() | {"dtype": str(row.dtype).removeprefix("torch.")}
        if row.error is not None and not math.isfinite(row.error):
            fields["error"] = str(row.error)
        weights.append(fields)
    return json.dumps({"weights": weights}, indent=1)


def tunings(
    target: str | None,
    *,
    chains: Sequence[str] = (),
    sizes: Sequence[int] = (),
    batch: int = 1,
    dtype: str = "float32",
    device: str | None = None,
    gpus: Sequence[str] = (),
    static: bool = False,
    again: bool = False,
    ship: bool = False,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Tuning]:
    """What ``tune`` finds for a model that "module:function" makes, or for chains by name.

    Arguments:
        target: the model, or None for every one of `chains` at every one of `sizes`.
        batch: how many n × n matrices, with `chains`.
        dtype: of the originals, with `chains`.
        device: where to measure; None is "cuda" where there is one, else "cpu".
        gpus: with `static`, what is compiled for, as "sm_90".
        static: compile every candidate and measure nothing.
        again: measure what the user's table knows already.
        ship: put all rows of the user's table into ``tuned_configs.json`` afterwards.
        track: wraps the sequence of what is done, for a progress bar.

    Raises:
        BadOption: an option is not what it must be, or does not go with another.
    """
    number = floating(dtype)
    if (target is None) == (not chains):
        raise BadOption("tune takes either a model as module:callable, or --chain and --n.")
    if chains and (not sizes or min(sizes) < 1 or batch < 1):
        raise BadOption("--chain needs --n, and both --n and --batch must be at least 1.")
    if target is not None and (sizes or batch != 1 or dtype != "float32"):
        raise BadOption("--n, --batch and --dtype go with --chain; a model has its own.")
    if static and (target is not None or ship or again or device is not None or batch != 1):
        raise BadOption("--static only compiles: it goes with --chain, --n, --dtype and --target.")
    if gpus and not static:
        raise BadOption("--target goes with --static; what is measured is the device at hand.")
    place = where(device)
    model = None if target is None else build(target)
    try:
        if static:
            tasks = [
                (c, n, number, gpu) for gpu in gpus or ("sm_90",) for c in chains for n in sizes
            ]
            info.require_targets(gpus)
            for task in tasks:
                trials.Problem(*task)  # or refused before the first is compiled
            return [tuner.static(*task) for task in track(tasks)]
        if ship:
            tables.require_writable(tables.SHIPPED)
        if model is not None:
            model = fuse(model).to(place)
        else:
            shapes = [(n, n) if batch == 1 else (batch, n, n) for n in sizes]
            parts = [tuner.weight(c, shape, number, place) for c in chains for shape in shapes]
            model = nn.Sequential(*parts)
        found = tuner.tune(model, again=again, track=track)
    except (ValueError, RuntimeError) as error:
        raise BadOption(str(error)) from error
    if ship and (file := tables.users_file()):
        tables.store(tables.read(file).values(), tables.SHIPPED)
    return found


def floating(dtype: str) -> torch.dtype:
    """The dtype of that name; raises BadOption where it is not one of the originals'."""
    number = getattr(torch, dtype, None)
    if number not in registry.DTYPES:
        raise BadOption(f"--dtype must be float32, bfloat16, float16 or float64, got {dtype!r}.")
    return cast(torch.dtype, number)


def where(device: str | None) -> str:
    """The device to measure on, None being "cuda" where there is one, else "cpu".

    Raises BadOption where it is neither, or torch cannot use it.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        usable = torch.device(device).type in ("cpu", "cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise BadOption(
            f"--device must be cpu, or a GPU as cuda or cuda:1 that torch sees; it does not see "
            f"{device!r}: {info.first_line(error)}."
        ) from None
    if not usable:
        raise BadOption(f"--device must be cpu, or a GPU as cuda or cuda:1, got {device!r}.")
    return device


def tunings_as_json(found: Iterable[Tuning]) -> str:
    """``{"tunings": [...]}``, an object with the fields of each."""
    return json.dumps({"tunings": [asdict(tuning) for tuning in found]}, indent=1)
