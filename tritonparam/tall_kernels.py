"""Whether and how the Triton kernels of a tall map run, the same for every map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonparam import configs, paths

Saved = tuple[Tensor, ...]


@dataclass(frozen=True)
class TallKernels:
    """The kernels of one map of n×k matrices.

    Attributes:
        name: of the chain in the table of measured paths.
        max_k: the largest k that they take.
        file: of kernels, where its name is another.
    """

    name: str
    max_k: int
    file: str = ""

    def declines(self, x: Tensor) -> str:
        """Why they cannot take x, or the empty string."""
        k = x.size(-1)
        if reason := paths.kernel_declines(self.name, x, k):
            return reason
        return f"k = {k} is beyond the kernel's {self.max_k}" if k > self.max_k else ""

    def path(self, x: Tensor) -> str:
        """The path to take; raises where use_path("kernel") asks for what they cannot do."""
        return paths.path(self.declines(x))

    def kernel_file(self, k: int, dtype: torch.dtype) -> str:
        """The file of kernels for k columns, or the empty string."""
        return (self.file or self.name) if k <= self.max_k else ""

    def n_launches(self, x: Tensor, *, based: bool) -> tuple[int, int]:
        """How many kernels a forward and a backward pass launch, with or without a base."""
        kernels = paths.kernels(self.file or self.name)
        return kernels.n_launches(x.size(-1), based=based) if x.numel() else (0, 0)

    def forward(
        self, function: str, x: Tensor, base: Tensor | None, *numbers: float
    ) -> tuple[Tensor, Saved] | None:
        """A map's value and what is saved, or None where the closed form is to be taken.

        The evaluation is counted. `base` is None for a map without one.
        """
        made = self._run("fwd", function, x, x, base, *numbers) if self._runs(x) else None
        paths.count("kernel" if made else "closed")
        return (made[0], _saved(x, base, made[1])) if made else None

    def prepare(self, x: Tensor, base: Tensor | None, *numbers: float) -> Saved | None:
        """What `forward` would save, or None where the closed form is to be taken."""
        more = self._run("fwd", "prepare", x, x, base, *numbers) if self._runs(x) else None
        return _saved(x, base, more) if more else None

    def backward(
        self, function: str, g: Tensor, x: Tensor, base: Tensor | None, more: Saved, *numbers: float
    ) -> tuple[Tensor] | None:
        """The gradient of x from what `forward` saved beside x and base, or None, likewise."""
        dx = self._run("bwd", function, x, g, x, base, more, *numbers)
        return None if dx is None else (dx,)

    def _runs(self, x: Tensor) -> bool:
        return self.path(x) == "kernel"

    def _run(self, phase: str, function: str, x: Tensor, *args: Any) -> Any:
        """What a launcher returns on x's device, or None where Triton cannot compile a kernel."""
        choice = (self.name, phase, x, paths.kernels("tall").config)
        config = configs.launch(*choice, x.size(-1), x.dtype, paths.backend())
        try:
            with torch.cuda.device_of(x):
                return getattr(paths.kernels(self.file or self.name), function)(*args, config)
        except Exception as error:
            paths.fall_back(error, self.name, x, x.size(-1))
            return None


def _saved(x: Tensor, base: Tensor | None, more: Saved) -> Saved:
    return (x, *more) if base is None else (x, base, *more)
