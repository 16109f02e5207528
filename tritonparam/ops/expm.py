"""Skew→exp, Symmetric→exp and exp alone: the matrix exponential, and its adjoint."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritonparam import configs, registry
from tritonparam.autograd import FusedMap
from tritonparam.exponential import Kind, Saved, adjoint, expm
from tritonparam.numerics import as_batch, compute_dtype

_TILE_MAX_N = 32  # one program per matrix; beyond, and in fp64, sequences of products
_KERNEL_MAX_N = 4096
_SIGN = {"skew": -1, "symmetric": 1}


def kernel_declines(w: Tensor, kind: Kind) -> str:
    """Why the Triton kernels cannot take w, or the empty string."""
    if kind == "general":
        return registry.no_kernel(w)
    n = w.size(-1)
    if reason := registry.kernel_declines(f"{kind}_exp", w, n):
        return reason
    return f"n = {n} is beyond the kernel's {_KERNEL_MAX_N}" if n > _KERNEL_MAX_N else ""


def _one_tile(w: Tensor) -> bool:
    return w.size(-1) <= _TILE_MAX_N and w.dtype != torch.float64


def _kernels(w: Tensor, kind: Kind, phase: str) -> tuple[Any, int, Any]:
    """The file of kernels that takes w, the sign that stands for the kind, the configuration."""
    n = w.size(-1)
    kernels = registry.kernels("expm" if _one_tile(w) else "expm_gemm")
    choice = (f"{kind}_exp", phase, w, kernels.config)
    config = configs.launch(*choice, n, compute_dtype(w.dtype), registry.backend())
    return kernels, _SIGN[kind], config


def _argument(w: Tensor, kind: Kind) -> Tensor:
    """What is exponentiated, [b, n, n] in the compute dtype."""
    x = as_batch(w.to(compute_dtype(w.dtype)))
    if kind == "skew":
        upper = x.triu(1)
        return upper - upper.mT
    return x.triu() + x.triu(1).mT if kind == "symmetric" else x


def _forward(w: Tensor, rounded: bool = False, *, kind: Kind) -> tuple[Tensor, Saved]:
    path = registry.path(kernel_declines(w, kind))
    registry.count(path)
    if path == "closed":
        return _value(w, kind)
    kernels, sign, config = _kernels(w, kind, "fwd")
    with torch.cuda.device_of(w):
        rounding = (w.dtype,) if rounded and _one_tile(w) else ()
        y, saved = kernels.expm_fwd(w, sign, config, *rounding)
    return y, (w, *saved)


def _resume(y: Tensor, w: Tensor, rounded: bool = False, *, kind: Kind) -> Saved:
    if registry.path(kernel_declines(w, kind)) == "closed":
        return _value(w, kind)[1]
    kernels, sign, config = _kernels(w, kind, "fwd")
    with torch.cuda.device_of(w):
        return (w, *kernels.prepare(w, sign, config))


def _value(w: Tensor, kind: Kind) -> tuple[Tensor, Saved]:
    y, saved = expm(_argument(w, kind), kind)
    return y.view(w.shape), (w, *saved)


def _backward(
    g: Tensor, saved: Saved, dtype: torch.dtype, rounded: bool = False, *, kind: Kind
) -> tuple[Tensor]:
    w, *rest = saved
    assert w is not None
    # Kernels keep nothing, or first an int32: the closed form's first is a floating-point scale.
    if w.numel() and (not rest or (rest[0] is not None and rest[0].dtype == torch.int32)):
        kernels, sign, config = _kernels(w, kind, "bwd")
        with torch.cuda.device_of(w):
            return (kernels.expm_bwd(g, w, tuple(rest), sign, config),)
    h = adjoint(as_batch(g), saved[1:], kind)
    if kind == "skew":
        h = (h - h.mT).triu(1)
    elif kind == "symmetric":
        h = (h + h.mT).triu()
        h.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return (h.view(g.shape),)


def _graph(
    g: Tensor, saved: Any, dtype: torch.dtype, rounded: bool = False, *, kind: Kind
) -> tuple[Tensor]:
    # The adjoint of intermediates that are functions of w, recorded.
    g = g.to(compute_dtype(g.dtype))
    return _backward(g, _value(saved[0], kind)[1], dtype, kind=kind)


def _map(name: str, kind: Kind) -> FusedMap:
    return FusedMap(
        name,
        "Tensor w, bool rounded=False",
        partial(_forward, kind=kind),
        partial(_backward, kind=kind),
        partial(_graph, kind=kind),
        resume=partial(_resume, kind=kind),
    )


_skew_exp = _map("skew_exp", "skew")
_symmetric_exp = _map("symmetric_exp", "symmetric")
_matrix_exp = _map("matrix_exp", "general")


def _evaluate(fused: FusedMap, w: Tensor) -> Tensor:
    # A kernel rounds a half once, but an operator's result has the compute dtype.
    return fused(w, not torch.compiler.is_compiling())


def skew_exp(w: Tensor) -> Tensor:
    """The rotation exp(X), X = triu(w, 1) - triu(w, 1)ᵀ.

    Arguments:
        w: [..., n, n], fp16, bf16, fp32 or fp64; the first two are computed in fp32.

    Returns:
        A fresh contiguous tensor of w's shape and dtype, twice differentiable in w.
    """
    return _evaluate(_skew_exp, w)


def symmetric_exp(w: Tensor) -> Tensor:
    """The positive definite exp(S), S = triu(w) + triu(w, 1)ᵀ; exactly symmetric.

    Arguments and result as for ``skew_exp``. Where exp(S) has a condition beyond 1 / eps its
    smallest eigenvalues are lost in the rounding of the largest.
    """
    return _evaluate(_symmetric_exp, w)


def matrix_exp(a: Tensor) -> Tensor:
    """exp(a) of any square matrices [..., n, n]; dtypes and result as for ``skew_exp``."""
    return _evaluate(_matrix_exp, a)
