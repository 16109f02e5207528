"""What Triton could not compile or launch here: remembered, to ask once, and told the user."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tritonparam.numerics import compute_dtype

Key = tuple[str, torch.device, torch.dtype, int]

_causes: dict[Key, str] = {}
_warned: set[str] = set()


def _key(chain: str, x: Tensor, n: int) -> Key:
    # By the compute dtype, in which the backward pass gets what the forward got in 16 bits.
    return chain, x.device, compute_dtype(x.dtype), n


def cause(chain: str, x: Tensor, n: int) -> str:
    """Why a chain's kernels do not run on x, of size n, or the empty string."""
    return _causes.get(_key(chain, x, n), "") if _causes else ""


def forget() -> None:
    """Let kernels be tried again, as with configurations that are about to change."""
    _causes.clear()


def remember(chain: str, x: Tensor, n: int, error: Exception) -> None:
    """Keep the cause of a failure; a UserWarning tells the first one of each chain."""
    text = getattr(error, "error_message", None) or str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    why = f"{type(error).__name__}: {line}"
    # No default is launched so: a row was measured where more of the device was free.
    tuned = "cooperative launch" in line
    what = "the device has no room for" if tuned else "Triton cannot compile"
    way_out = "; `python -m tritonparam tune --again` finds a configuration that fits" * tuned
    its = "tuned configuration" if tuned else "kernel"
    _causes[_key(chain, x, n)] = f"{what} its {its} here ({why}){way_out}"
    if chain not in _warned:
        _warned.add(chain)
        dtype = str(x.dtype).removeprefix("torch.")
        warnings.warn(
            f"{chain}: {what} the {its} for {dtype}, n = {n}, on {x.device}, so "
            f"that the closed form is taken there ({why}){way_out}; "
            "explain(model) shows every such weight.",
            stacklevel=1,
        )
