"""The one table of chains: what is tested, and on which originals."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm

import tritonparam as tp


@dataclass(frozen=True)
class Case:
    """A chain and the originals it is tested on.

    Attributes:
        name: the name of its row.
        links: makes new links for a weight.
        form: of the weight: "square" and "tall" in batches, "layer" is one matrix.
        max_kernel_n: the largest n its kernel takes, 0 without one, infinite where any.
        kernel_dtypes: of the original, that its kernel takes.
        argument: what the map is applied to, for an original; linear in it. None is the original.
        max_norm: of the argument, up to which the result is representable in fp32.
        base: the weight has a base point, a random orthonormal matrix.
    """

    name: str
    links: Callable[[Tensor], list[nn.Module]]
    form: str = "square"
    max_kernel_n: float = 0
    kernel_dtypes: tuple[torch.dtype, ...] = tp.registry.DTYPES
    argument: Callable[[Tensor], Tensor] | None = None
    max_norm: float = 1e3
    base: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The fused paths that it has."""
        return ("closed", "kernel") if self.max_kernel_n else ("closed",)

    def runs(self, path: str, n: int, dtype: torch.dtype = torch.float32) -> bool:
        """Whether a path takes a weight of size n and a dtype."""
        return path != "kernel" or (n <= self.max_kernel_n and dtype in self.kernel_dtypes)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the weight: size 1, odd, powers of two and not, past the kernel's largest tile."""
        shapes = tuple(self.shape(n) for n in (1, 2, 3, 8, 17, 32, 64, 100))
        if self.form == "layer":
            return shapes
        batches = ((5, 7), (2, 3, 13), (3, 160), (0, 4), (2, 0))
        return shapes + tuple(self.shape(n, *batch) for *batch, n in batches)

    def shape(self, n: int, *batch: int) -> tuple[int, ...]:
        """The shape of a weight of size n, or of a batch of them."""
        if self.form == "layer":
            return (2 * n + 1, n)
        return (*batch, 2 * n + 1 if self.form == "tall" else n, n)

    def original(self, shape: tuple[int, ...], norm: float, dtype: torch.dtype) -> Tensor:
        """A random original whose map's argument has this spectral norm, or the largest it may."""
        w = torch.randn(shape, dtype=torch.float64)
        if w.numel():
            x = self.argument(w) if self.argument else w
            size = torch.linalg.matrix_norm(x, 2)[..., None, None]
            w = torch.where(size > 0, w * min(norm, self.max_norm) / size, w)
        return w.to(dtype)

    def module(self, original: Tensor) -> nn.Module:
        """A module with the parameter `weight`, constrained by the chain, in eval mode.

        A chain with one original has it written; another takes it apart.
        """
        module = nn.Module()
        first = original.detach().clone()
        if self.form != "layer":  # what registration makes of it is written over
            first = _orthonormal(original) if self.base else torch.zeros_like(first)
        module.weight = nn.Parameter(first)
        unsafe = self.form == "layer"  # weight_norm has two originals
        tp.register_parametrization(module, "weight", *self.links(original), unsafe=unsafe)
        plist = module.parametrizations.weight
        if plist.is_tensor:
            with torch.no_grad():
                plist.original.copy_(original)
        return module.eval()


def _orthonormal(like: Tensor) -> Tensor:
    q = torch.randn(like.shape, dtype=torch.float64)
    return torch.linalg.qr(q)[0].to(like) if like.numel() else torch.zeros_like(like)


def composed(
    module: nn.Module, g: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The weight and the originals' gradient, link by link, of a copy of the module in a dtype.

    The links solve matrix by matrix: batched LU on the CPU cannot be trusted (pytorch #142815).
    """
    copy = deepcopy(module).to(dtype)
    # torch's matrix_exp loses digits of the gradient as what comes in grows: the reference takes
    # something small, which costs nothing, as a power of two.
    scale = 2.0**-20 if dtype == torch.float64 else 1.0
    with tp.use_path("composed"):
        y, dw = _weight_and_gradient(copy, g.to(dtype) * scale)
    return y, dw / scale


def fused(module: nn.Module, g: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """The weight and the originals' gradient on a path, which must really have been taken."""
    before = tp.stats()[path]
    with tp.use_path(path):
        result = _weight_and_gradient(module, g)
    assert tp.stats()[path] == before + 1
    return result


def _weight_and_gradient(module: nn.Module, g: Tensor) -> tuple[Tensor, Tensor]:
    """Several gradients are returned as one row."""
    y = module.weight
    grads = torch.autograd.grad(y, list(module.parametrizations.weight.parameters()), g.to(y.dtype))
    dw = grads[0] if len(grads) == 1 else torch.cat([dx.flatten() for dx in grads]).unsqueeze(0)
    return y.detach(), dw


def through(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a function at x and its gradient, both of x's shape and dtype."""
    x = x.detach().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, g.to(y.dtype))
    assert y.shape == dx.shape == x.shape
    assert y.dtype == dx.dtype == x.dtype
    assert y.is_contiguous()
    return y.detach(), dx


def errors(x: Tensor, reference: Tensor, scale: Tensor | None = None) -> Tensor:
    """Frobenius error of each matrix of a batch, relative to `scale`, else to the reference."""
    size = torch.linalg.matrix_norm((reference if scale is None else scale).double())
    distance = torch.linalg.matrix_norm(x.double() - reference.double())
    return (distance / torch.where(size > 0, size, 1.0)).flatten()


def error(x: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """The worst of `errors`; zero for an empty batch."""
    return float(errors(x, reference, scale).max()) if reference.numel() else 0.0


def _skew(w: Tensor) -> Tensor:
    return w.triu(1) - w.triu(1).mT


def _symmetric(w: Tensor) -> Tensor:
    return w.triu() + w.triu(1).mT


def _orthogonal(orthogonal_map: str, base: bool) -> Callable[[Tensor], list[nn.Module]]:
    return lambda _: [tp.Orthogonal(orthogonal_map, use_trivialization=base)]


# The interpreter takes seconds for a sequence of products, which has tests of its own.
_SEQUENCES = torch.cuda.is_available()
_EXP_MAX_N = 4096 if _SEQUENCES else 32
_TALL_MAX_K = 256 if _SEQUENCES else 0
# Nor fp64, the last, whose tiles lie in memory.
_EXP_DTYPES = tp.registry.DTYPES[: None if _SEQUENCES else 3]

CASES = (
    Case(
        name="cayley",
        links=lambda _: [tp.Skew(), tp.CayleyMap()],
        max_kernel_n=4096,
        argument=_skew,
    ),
    Case(
        name="skew_exp",
        links=lambda _: [tp.Skew(), tp.MatrixExponential()],
        max_kernel_n=_EXP_MAX_N,
        kernel_dtypes=_EXP_DTYPES,
        argument=_skew,
    ),
    Case(
        name="symmetric_exp",
        links=lambda _: [tp.Symmetric(), tp.MatrixExponential()],
        max_kernel_n=_EXP_MAX_N,
        kernel_dtypes=_EXP_DTYPES,
        argument=_symmetric,
        max_norm=80,
    ),
    Case(name="matrix_exp", links=lambda _: [tp.MatrixExponential()], max_norm=80),
    *(
        Case(
            name=name + ("_at_base" if base else ""),
            links=_orthogonal(orthogonal_map, base),
            form="tall",
            max_kernel_n=_TALL_MAX_K,
            base=base,
        )
        for name, orthogonal_map in (
            ("tall_cayley", "cayley"),
            ("tall_exp", "matrix_exp"),
            ("householder", "householder"),
        )
        for base in (False, True)
    ),
    Case(
        name="spectral_norm",
        links=lambda w: [_SpectralNorm(w.detach())],
        form="layer",
        max_kernel_n=math.inf,
    ),
    Case(
        name="weight_norm",
        links=lambda _: [_WeightNorm()],
        form="layer",
        max_kernel_n=math.inf,
    ),
)
