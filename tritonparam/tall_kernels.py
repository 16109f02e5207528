"""Whether and how the Triton kernels of a tall map run, the same for every map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonparam import configs, registry


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
        if reason := registry.kernel_declines(self.name, x, k):
            return reason
        return f"k = {k} is beyond the kernel's {self.max_k}" if k > self.max_k else ""

    def path(self, x: Tensor) -> str:
        """The path to take; raises where use_path("kernel") asks for what they cannot do."""
        return registry.path(self.declines(x))

    def run(self, phase: str, function: str, x: Tensor, *args: Any) -> Any:
        """What a launcher returns for `args`, on x's device; `phase` is "fwd" or "bwd"."""
        choice = (self.name, phase, x, registry.kernels("tall").config)
        config = configs.launch(*choice, x.size(-1), x.dtype, registry.backend())
        with torch.cuda.device_of(x):
            return getattr(registry.kernels(self.file or self.name), function)(*args, config)
