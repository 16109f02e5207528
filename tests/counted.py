"""Modules with counted evaluations, and the comparison of two that mean the same."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize
from torch.utils._pytree import tree_leaves


class Scaled(nn.Module):
    """A link that no rule takes; it counts its calls, in a buffer so that compiled ones count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return 1.5 * x.sin()

    def right_inverse(self, x):
        return (x / 1.5).asin()


def constrained(module: nn.Module, *names: str) -> nn.Module:
    """The module in fp64, the weights of these names, "child.weight" too, constrained by torch."""
    module.double()
    for name in names:
        owner, _, tensor = name.rpartition(".")
        torch_parametrize.register_parametrization(module.get_submodule(owner), tensor, Scaled())
    return module


def calls(module: nn.Module) -> list[int]:
    """How often each weight was evaluated since the last call."""
    links = [m for m in module.modules() if isinstance(m, Scaled)]
    counts = [int(link.calls) for link in links]
    for link in links:
        link.calls.zero_()
    return counts


def outputs_and_gradients(module: nn.Module, *args, **kwargs) -> list[torch.Tensor]:
    """All that a module returns, and the gradients of its parameters for a random cotangent."""
    found = [x for x in tree_leaves(module(*args, **kwargs)) if x is not None and x.requires_grad]
    generator = torch.Generator().manual_seed(0)
    gs = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in found]
    grads = torch.autograd.grad(found, list(module.parameters()), gs)
    return [*(x.detach() for x in found), *grads]


def assert_same(module: nn.Module, other: nn.Module, *args, **kwargs) -> None:
    """Outputs and gradients of two modules that mean the same."""
    results = [outputs_and_gradients(m, *args, **kwargs) for m in (module, other)]
    for mine, reference in zip(*results, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-10, atol=1e-12)
