"""Skew→Cayley: Q = (I + X)(I - X)⁻¹ D with X = triu(W, 1) - triu(W, 1)ᵀ and D = diag(d), d = ±1."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tritonparam import registry
from tritonparam.numerics import compute_dtype, inverse_definite, no_autocast

_KERNEL_MAX_N = 64
_BACKEND = "hip" if torch.version.hip else "cuda"
_kernels: ModuleType | None = None


def kernel_declines(w: Tensor) -> str:
    """Why the Triton kernel cannot take w, or the empty string."""
    if reason := registry.device_declines(w):
        return reason
    n = w.size(-1)
    return f"n = {n} is beyond the kernel's {_KERNEL_MAX_N}" if n > _KERNEL_MAX_N else ""


def _load() -> Any:
    global _kernels
    if _kernels is None:
        from tritonparam.kernels import cayley

        _kernels = cayley
    return _kernels


def _closed_fwd(w: Tensor, d: Tensor) -> Tensor:
    # One inverse and no product: Q = (2M - I) D with M = (I - X)⁻¹.
    upper = w.to(compute_dtype(w.dtype)).triu(1)
    a = torch.sub(upper.mT, upper, out=torch.empty_like(upper))  # by rows, as the result shall be
    a.diagonal(dim1=-2, dim2=-1).fill_(1)
    # LU takes infinity for a good pivot; where W is not finite this is NaN, as in torch's solve.
    nan = upper.sum((-2, -1), keepdim=True) * 0
    q = inverse_definite(a) * torch.add(nan, d.unsqueeze(-2), alpha=2)
    q.diagonal(dim1=-2, dim2=-1).sub_(d)
    return q


def _closed_bwd(g: Tensor, q: Tensor, d: Tensor) -> Tensor:
    # dW = triu(Z - Zᵀ, 1) / 2 with Z = 4 Mᵀ G D Mᵀ, and 2M = (Q + D) D. Differentiable.
    e = q.clone()
    e.diagonal(dim1=-2, dim2=-1).add_(d)
    z = (d.to(q.dtype) / 2).unsqueeze(-1) * (e.mT @ (g @ e.mT))
    return (z - z.mT).triu(1)


def _forward(w: Tensor, d: Tensor) -> Tensor:
    path = registry.path(kernel_declines(w))
    registry.count(path)
    if path == "closed":
        with no_autocast(w):
            return _closed_fwd(w, d)
    kernels = _load()
    with torch.cuda.device_of(w):
        return kernels.cayley_fwd(w, d, kernels.fwd_config(w.size(-1), w.dtype, _BACKEND))


def _backward(g: Tensor, q: Tensor, d: Tensor, dtype: torch.dtype) -> Tensor:
    if registry.path(kernel_declines(q)) == "closed":
        with no_autocast(q):
            return _closed_bwd(g, q, d).to(dtype)
    kernels = _load()
    with torch.cuda.device_of(q):
        config = kernels.bwd_config(q.size(-1), q.dtype, _BACKEND)
        return kernels.cayley_bwd(g, q, d, dtype, config)


class SkewCayleyFunction(torch.autograd.Function):
    """The eager door: w, d -> Q in the compute dtype. Saves Q and d."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, d: Tensor) -> Tensor:  # noqa: D102
        q = _forward(w, d)
        ctx.save_for_backward(q, d)
        ctx.dtype = w.dtype
        return q

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        q, d = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the formula itself
            with no_autocast(q):
                return _closed_bwd(g, q, d).to(ctx.dtype), None
        return _backward(g, q, d, ctx.dtype), None


@torch.library.custom_op("tritonparam::skew_cayley", mutates_args=())
def _skew_cayley_op(w: Tensor, d: Tensor) -> Tensor:
    return _forward(w, d)


@_skew_cayley_op.register_fake
def _(w: Tensor, d: Tensor) -> Tensor:
    return torch.empty(w.shape, dtype=compute_dtype(w.dtype), device=w.device)


@torch.library.custom_op("tritonparam::skew_cayley_backward", mutates_args=())
def _skew_cayley_backward_op(g: Tensor, q: Tensor, d: Tensor, dtype: torch.dtype) -> Tensor:
    return _backward(g, q, d, dtype).contiguous()


@_skew_cayley_backward_op.register_fake
def _(g: Tensor, q: Tensor, d: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(q.shape, dtype=dtype, device=q.device)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])
    ctx.dtype = inputs[0].dtype


def _compiled_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return _skew_cayley_backward_op(g, *ctx.saved_tensors, ctx.dtype), None


_skew_cayley_op.register_autograd(_compiled_backward, setup_context=_save)


def skew_cayley(w: Tensor, signature: Tensor) -> Tensor:
    """The orthogonal matrix (I + X)(I - X)⁻¹ diag(signature), X = triu(w, 1) - triu(w, 1)ᵀ.

    Arguments:
        w: [..., n, n], fp16, bf16, fp32 or fp64; the first two are computed in fp32.
        signature: ±1, [..., n].

    Returns:
        A fresh contiguous tensor of w's shape and dtype, twice differentiable in w.
    """
    if torch.compiler.is_compiling():
        return _skew_cayley_op(w, signature).to(w.dtype)
    if not (w.requires_grad and torch.is_grad_enabled()):
        return _forward(w, signature).to(w.dtype)
    return SkewCayleyFunction.apply(w, signature).to(w.dtype)
