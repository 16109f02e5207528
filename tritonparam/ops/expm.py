"""Skew→exp, Symmetric→exp and exp alone: the matrix exponential, and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritonparam import configs, paths
from tritonparam.autograd import FusedMap
from tritonparam.exponential import Kind, Saved, adjoint, expm
from tritonparam.numerics import as_batch, compute_dtype
from tritonparam.together import stacked

_REGISTERS_MAX_N = 32  # one program per matrix, in registers but for fp64
_TILE_MAX_N = 64  # and in memory of its own; beyond, sequences of products
_KERNEL_MAX_N = 4096
_SIGN = {"skew": -1, "symmetric": 1}


def kernel_declines(w: Tensor, kind: Kind) -> str:
    """Why the Triton kernels cannot take w, or the empty string."""
    if kind == "general":
        return paths.no_kernel(w)
    n = w.size(-1)
    if reason := paths.kernel_declines(f"{kind}_exp", w, n):
        return reason
    return f"n = {n} is beyond the kernel's {_KERNEL_MAX_N}" if n > _KERNEL_MAX_N else ""


def kernel_file(n: int, dtype: torch.dtype) -> str:
    """The file of kernels for n x n matrices, skew or symmetric, or the empty string."""
    if n > _KERNEL_MAX_N:
        return ""
    if n > _TILE_MAX_N:
        return "expm_gemm"
    return "expm" if n <= _REGISTERS_MAX_N and dtype != torch.float64 else "expm_scratch"


def n_launches(w: Tensor, kind: Kind) -> tuple[int, int]:
    """How many kernels a forward and a backward pass launch."""
    if not w.numel():
        return 0, 0
    kernels, sign, fwd = _kernels(w, kind, "fwd")
    bwd = _kernels(w, kind, "bwd")[2]
    return kernels.n_launches(sign, compute_dtype(w.dtype), fwd, bwd)


def _kernels(w: Tensor, kind: Kind, phase: str) -> tuple[Any, int, Any]:
    """The file of kernels that takes w, the sign that stands for the kind, the configuration."""
    n = w.size(-1)
    kernels = paths.kernels(kernel_file(n, w.dtype))
    default = getattr(kernels, f"{phase}_config", kernels.config)
    choice = (f"{kind}_exp", phase, w, default)
    config = configs.launch(*choice, n, compute_dtype(w.dtype), paths.backend())
    return kernels, _SIGN[kind], config


def _argument(w: Tensor, kind: Kind) -> Tensor:
    """What is exponentiated, [b, n, n] in the compute dtype."""
    x = as_batch(w.to(compute_dtype(w.dtype)))
    if kind == "skew":
        upper = x.triu(1)
        return upper - upper.mT
    return x.triu() + x.triu(1).mT if kind == "symmetric" else x


def _forward(w: Tensor, rounded: bool = False, *, kind: Kind) -> tuple[Tensor, Saved]:
    if paths.path(kernel_declines(w, kind)) == "kernel":
        kernels, sign, config = _kernels(w, kind, "fwd")
        one_tile = w.size(-1) <= _TILE_MAX_N
        rounding = (w.dtype,) if rounded and one_tile else ()
        try:
            with torch.cuda.device_of(w):
                y, saved = kernels.expm_fwd(w, sign, config, *rounding)
            paths.count("kernel")
            return y, (w, *saved)
        except Exception as error:
            paths.fall_back(error, f"{kind}_exp", w, w.size(-1))
    paths.count("closed")
    return _value(w, kind)


def _resume(y: Tensor, w: Tensor, rounded: bool = False, *, kind: Kind) -> Saved:
    if paths.path(kernel_declines(w, kind)) == "kernel":
        kernels, sign, config = _kernels(w, kind, "fwd")
        try:
            with torch.cuda.device_of(w):
                return (w, *kernels.prepare(w, sign, config))
        except Exception as error:
            paths.fall_back(error, f"{kind}_exp", w, w.size(-1))
    return _value(w, kind)[1]


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
        try:
            with torch.cuda.device_of(w):
                return (kernels.expm_bwd(g, w, tuple(rest), sign, config),)
        except Exception as error:
            paths.fall_back(error, f"{kind}_exp", w, w.size(-1))
            saved = _value(w, kind)[1]  # the closed form keeps more
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
        keeps=True,
    )


_skew_exp = _map("skew_exp", "skew")
_symmetric_exp = _map("symmetric_exp", "symmetric")
_matrix_exp = _map("matrix_exp", "general")
_skew_exps, _symmetric_exps = stacked(_skew_exp, 1), stacked(_symmetric_exp, 1)


def _evaluate(fused: FusedMap, w: Tensor, left: Tensor | None = None) -> Tensor:
    # A kernel rounds a half once, but an operator's result, and a factor, has the compute dtype.
    return fused.left(left, w, left is None and not torch.compiler.is_compiling())


def skew_exp(w: Tensor, left: Tensor | None = None) -> Tensor:
    """The rotation exp(X), X = triu(w, 1) - triu(w, 1)ᵀ.

    Arguments:
        w: [..., n, n], fp16, bf16, fp32 or fp64; the first two are computed in fp32.
        left: a matrix to multiply on from the left, of the compute dtype; it has no gradient.

    Returns:
        A fresh contiguous tensor of w's shape and dtype, twice differentiable in w.
    """
    return _evaluate(_skew_exp, w, left)


def symmetric_exp(w: Tensor) -> Tensor:
    """The positive definite exp(S), S = triu(w) + triu(w, 1)ᵀ; exactly symmetric.

    Arguments and result as for ``skew_exp``. Where exp(S) has a condition beyond 1 / eps its
    smallest eigenvalues are lost in the rounding of the largest.
    """
    return _evaluate(_symmetric_exp, w)


def matrix_exp(a: Tensor) -> Tensor:
    """exp(a) of any square matrices [..., n, n]; dtypes and result as for ``skew_exp``."""
    return _evaluate(_matrix_exp, a)


def skew_exps(ws: Sequence[Tensor]) -> list[Tensor]:
    """``skew_exp`` of many tensors, all of one shape and dtype, in the launches of one."""
    return _skew_exps([(w,) for w in ws])


def symmetric_exps(ws: Sequence[Tensor]) -> list[Tensor]:
    """``symmetric_exp`` of many tensors, all of one shape and dtype, in the launches of one."""
    return _symmetric_exps([(w,) for w in ws])
