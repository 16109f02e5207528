"""A constrained weight read and differentiated by itself, and compared with fp64."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from tritonparam import paths, registry
from tritonparam.declared import table
from tritonparam.fuse import links_of, originals


class Reading:
    """The value and the gradients of a list, on the path that is set when it is asked.

    Arguments:
        plist: what is read; copies of it are, so that it is not changed.
        reference: the path whose value and gradients in fp64 others are compared with.
    """

    def __init__(self, plist: ParametrizationList, reference: str) -> None:
        self._plist, self._g = plist, torch.ones(())
        with paths.use_path(reference), torch.random.fork_rng():
            self._g = torch.randn_like(self.result(torch.float64)[0])
        with paths.use_path(reference):
            self._expected = self.result(torch.float64)

    def copy(self, dtype: torch.dtype | None = None) -> ParametrizationList:
        """The list as it is now."""
        return copy.deepcopy(self._plist).to(dtype)

    def forward(self, plist: ParametrizationList) -> tuple[list[Tensor], Tensor]:
        """Fresh originals, and the value that they are differentiated through."""
        with torch.enable_grad():
            xs = [x.detach().requires_grad_() for x in originals(plist)]
            return xs, registry.evaluate(table(), links_of(plist), *xs)

    def backward(self, xs: Sequence[Tensor], y: Tensor) -> tuple[Tensor, ...]:
        """The gradients for the same random cotangent each time."""
        return torch.autograd.grad(y, xs, self._g.to(y.dtype).expand_as(y))

    def step(self, plist: ParametrizationList) -> list[Tensor]:
        """The value, and the gradients of the originals."""
        xs, y = self.forward(plist)
        return [y.detach(), *self.backward(xs, y)]

    def result(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Of a step of a fresh copy, which leaves the random numbers as they were."""
        with torch.random.fork_rng():
            return self.step(self.copy(dtype))

    def compared(self, found: Sequence[Tensor]) -> dict[str, float]:
        """How far a step's value and gradient are from fp64, relative to the largest entry.

        NaN where one is not finite; of several gradients the worst.
        """
        value, *gradients = (_error(x, y) for x, y in zip(found, self._expected, strict=True))
        worst = next((e for e in gradients if e != e), max(gradients, default=0.0))
        return {"value": value, "gradient": worst}

    def errors(self) -> dict[str, float]:
        """Of a fresh copy."""
        return self.compared(self.result())

    def wrong(self) -> str:
        """What of a fresh copy is further off than rounding explains, or the empty string."""
        return too_far(self.errors(), originals(self._plist)[0].dtype)


def too_far(errors: dict[str, float], dtype: torch.dtype) -> str:
    """Which error is more than rounding explains, or the empty string."""
    for name, off in errors.items():
        if not off <= tolerance(dtype):
            return f"its {name} is off by {off:.0e}"
    return ""


def tolerance(dtype: torch.dtype) -> float:
    """For what is computed in fp32 or more, and rounded to a dtype once on either way."""
    compute = torch.promote_types(dtype, torch.float32)
    return 1e4 * torch.finfo(compute).eps + 16 * torch.finfo(dtype).eps


def _error(x: Tensor, y: Tensor) -> float:
    if not y.numel():
        return 0.0
    return float((x.double() - y).abs().max()) / (float(y.abs().max()) or 1.0)
