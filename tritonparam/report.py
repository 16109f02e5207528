"""``python -m tritonparam explain``: a model named on the command line, and its rows as JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import nn

from tritonparam.explain import Explanation, Row, explain
from tritonparam.fuse import fuse


class BadOption(ValueError):
    """An argument is not what it must be; the message names it."""


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
        BadOption: there is no such module or function, or it does not return a module; or `legacy`
            without `fused`. What the function itself raises is passed on.
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
    if not name or not attribute:
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
        made = made()
    if not isinstance(made, nn.Module):
        raise BadOption(f"{target} must return an nn.Module, got a {type(made).__name__}.")
    return made


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
