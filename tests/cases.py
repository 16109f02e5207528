"""The one table of chains: what is tested, and on which originals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tritonparam as tp


@dataclass(frozen=True)
class Case:
    """A chain and the originals it is tested on.

    Attributes:
        name: the name of its rule.
        links: makes new links.
        shapes: of the weight: size 1, odd, powers of two and not, past the kernel's largest tile,
            batches of one and two dimensions, an empty batch, no matrix at all.
        max_kernel_n: the largest matrix its kernel takes.
        argument: what the map is applied to, for an original; linear in it.
    """

    name: str
    links: Callable[[], list[nn.Module]]
    shapes: tuple[tuple[int, ...], ...]
    max_kernel_n: int
    argument: Callable[[Tensor], Tensor]

    def original(self, shape: tuple[int, ...], norm: float, dtype: torch.dtype) -> Tensor:
        """A random original, [..., n, n], whose map's argument has this spectral norm."""
        w = torch.randn(shape, dtype=torch.float64)
        if w.numel():
            size = torch.linalg.matrix_norm(self.argument(w), 2)[..., None, None]
            w = torch.where(size > 0, w * norm / size, w)
        return w.to(dtype)

    def module(self, original: Tensor) -> nn.Module:
        """A module with the parameter `weight`, constrained by the chain."""
        module = nn.Module()
        module.weight = nn.Parameter(original.detach().clone())
        tp.register_parametrization(module, "weight", *self.links())
        with torch.no_grad():
            module.parametrizations.weight.original.copy_(original)
        return module


def composed(case: Case, original: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the original's gradient, link by link, in the dtype of the original."""
    w = original.detach().clone().requires_grad_()
    y = w
    for link in case.links():
        y = link(y)
    (dw,) = torch.autograd.grad(y, w, g.to(y.dtype))
    return y.detach(), dw


def fused(module: nn.Module, g: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """The weight and the original's gradient on a path, which must really have been taken."""
    before = tp.stats()[path]
    with tp.use_path(path):
        y = module.weight
        original = module.parametrizations.weight.original
        (dw,) = torch.autograd.grad(y, original, g.to(y.dtype))
    assert tp.stats()[path] == before + 1
    return y.detach(), dw


def errors(x: Tensor, reference: Tensor, scale: Tensor | None = None) -> Tensor:
    """Frobenius error of each matrix of a batch, relative to `scale`, else to the reference."""
    size = torch.linalg.matrix_norm((reference if scale is None else scale).double())
    distance = torch.linalg.matrix_norm(x.double() - reference.double())
    return (distance / torch.where(size > 0, size, 1.0)).flatten()


def error(x: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """The worst of `errors`; zero for an empty batch."""
    return float(errors(x, reference, scale).max()) if reference.numel() else 0.0


CASES = (
    Case(
        name="cayley",
        links=lambda: [tp.Skew(), tp.CayleyMap()],
        shapes=(
            (1, 1),
            (2, 2),
            (3, 3),
            (8, 8),
            (17, 17),
            (32, 32),
            (5, 7, 7),
            (2, 3, 13, 13),
            (64, 64),
            (100, 100),
            (3, 160, 160),
            (0, 4, 4),
            (2, 0, 0),
        ),
        max_kernel_n=64,
        argument=lambda w: w.triu(1) - w.triu(1).mT,
    ),
)
