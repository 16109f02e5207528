"""Spectral norm: W/σ with σ = uᵀ W v by power iteration, as torch's ``_SpectralNorm``."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from tritonparam import configs, paths, registry
from tritonparam.autograd import EagerMap, FusedMap, Gradients, Saved, one_by_one
from tritonparam.numerics import cast, compute_dtype, same_device, without_autocast
from tritonparam.together import GroupedMap


def kernel_declines(link: Any, w: Tensor) -> str:
    """Why the Triton kernel cannot take w and the link's buffers, or the empty string."""
    return _declines(w, *_buffers(link, w))


def n_launches(link: Any, w: Tensor) -> tuple[int, int]:
    """How many kernels a forward and a backward pass launch."""
    return paths.kernels("spectral_norm").n_launches(steps(link)[0])


def steps(link: Any) -> tuple[int, float]:
    """How many iterations the link makes in a read now, and its eps."""
    return link.n_power_iterations if link.training else 0, link.eps


def misfit(link: Any, w: Tensor) -> str:
    """Why the link's vectors are not those of w, or the empty string."""
    if w.dim() < 2:
        return ""  # normalised without buffers
    rows = w.size(link.dim)
    sizes = rows, w.numel() // max(rows, 1)
    for buffer, size in zip(_buffers(link, w), sizes, strict=True):
        if not same_device(buffer, w) or buffer.dtype != w.dtype or buffer.numel() != size:
            return "the power iteration's vectors do not fit the original"
    return ""


def _buffers(link: Any, w: Tensor) -> tuple[Tensor, ...]:
    if w.dim() == 1:
        return ()
    known = link._buffers  # the module's own lookup is slower
    return (known["_u"], known["_v"]) if "_u" in known else (link._u, link._v)


def _declines(w: Tensor, *vectors: Tensor) -> str:
    if reason := paths.kernel_declines("spectral_norm", w, w.numel()):
        return reason
    if w.dim() < 2:
        return "the original is a vector"
    if w.numel() == 0:
        return "the original is empty"
    return "" if all(x.is_contiguous() for x in vectors) else "u or v is not contiguous"


def _matrix(w: Tensor, dim: int) -> Tensor:
    return (w.movedim(dim, 0) if dim else w).flatten(1)  # [w.size(dim), the rest]


def _slices(x: Tensor, dim: int) -> Tensor:
    """x as a contiguous [before, x.size(dim), after]."""
    return x.contiguous().view(x.shape[:dim].numel(), x.size(dim), x.shape[dim + 1 :].numel())


def _sub_outer(x: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """X - u vᵀ in place, for a contiguous x in the layout of the weight."""
    if dim == 0:
        x.flatten(1).addr_(u, v, alpha=-1)
    else:
        before, n, after = x.shape[:dim].numel(), x.size(dim), x.shape[dim + 1 :].numel()
        x.view(before, n, after).addcmul_(u.view(n, 1), v.view(before, 1, after), value=-1)
    return x


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.flatten(), y.flatten())


def _divisor(sigma: Tensor) -> Tensor:
    # Gradients are 0 where σ = 0, as that of torch's own norm is there.
    return sigma.masked_fill(sigma == 0, torch.inf)


def _forward(w: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int) -> tuple[Tensor, Saved]:
    paths.count("closed")
    # The smallest number changes no σ beyond its last digit but 0, and makes 0/0 a 0.
    info = torch.finfo(w.dtype)
    return w / (sigma + info.tiny * info.eps), (w, u, v, sigma)


def _backward(g: Tensor, saved: Saved, dtype: torch.dtype, dim: int) -> Gradients:
    # dW = (G - (<G, W>/σ) u vᵀ)/σ
    w, u, v, sigma = saved
    if paths.path(_declines(w, u, v)) == "kernel":
        try:
            return _kernel_bwd([g], [saved], [dim])[0]
        except Exception as error:
            paths.fall_back(error, "spectral_norm", w, w.numel())
    if g.is_cpu and w.dim() == 2 and dim == 0 and not registry.transforms_active():
        number = sigma.item() or math.inf  # on the CPU nobody waits, and operators cost more
        dw = g.contiguous() / number
        return (dw.addr_(u, v, alpha=-_dot(dw, w).item() / number),)
    s = _divisor(sigma)
    dw = g.contiguous() / s
    return (_sub_outer(dw, u * (_dot(dw, w) / s), v, dim),)


class _Gradient(torch.autograd.Function):
    """The gradient, differentiable: G, W, u, v, σ, dim -> dW."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, u: Tensor, v: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(g, w, u, v)
        sigma, ctx.dim = rest
        return _divide.backward(g, (w, u, v, sigma), w.dtype, ctx.dim)[0]

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        return *_second(h, *ctx.saved_tensors, ctx.dim), None, None, None, None


@one_by_one
def _second(h: Tensor, g: Tensor, w: Tensor, u: Tensor, v: Tensor, dim: int) -> Gradients:
    # With H the gradient of dW and p = uᵀ H v / σ:
    # dG = (H - p W)/σ,  dW = -(p/σ) G - (<H, G> - 2 p <G, W>)/σ² u vᵀ. Differentiable.
    s = _divisor(torch.dot(u, torch.mv(_matrix(w, dim), v)))
    p = torch.dot(u, torch.mv(_matrix(h, dim), v)) / s
    dg = torch.addcmul(h, w, p, value=-1) / s
    c = (_dot(h, g) - 2 * p * _dot(g, w)) / s / s
    return dg, _sub_outer(g.contiguous() * (-p / s), u * c, v, dim)


def _graph(g: Tensor, saved: Saved, dtype: torch.dtype, dim: int) -> Gradients:
    w, u, v, sigma = saved
    return (_Gradient.apply(cast(g, u.dtype), cast(w, u.dtype), u, v, sigma, dim),)


_divide = FusedMap(
    "spectral_norm",
    "Tensor w, Tensor u, Tensor v, Tensor sigma, int dim",
    _forward,
    _backward,
    graph=_graph,
    resume=lambda y, w, u, v, sigma, dim: (w, u, v, sigma),
)


_FEW = 1 << 14  # numbers, up to which torch's own graph takes less time than a function of ours
Call = tuple[Tensor, Tensor, Tensor, int, int, float]


def _config(phase: str, ws: Sequence[Tensor]) -> Any:
    """The launch numbers of all, those that suit the largest."""
    w, default = max(ws, key=Tensor.numel), paths.kernels("spectral_norm").default_of_size
    return configs.launch("spectral_norm", phase, w, default, w.numel(), w.dtype)


def _kernel_fwd(calls: Sequence[Call]) -> list[tuple[Tensor, Saved]]:
    kernels = paths.kernels("spectral_norm")
    ws, us, vs, dims, (steps, *_), (eps, *_) = zip(*calls, strict=True)
    with torch.cuda.device_of(ws[0]):
        config = _config("fwd", ws)
        xs = [_slices(w, dim) for w, dim in zip(ws, dims, strict=True)]
        results = kernels.spectral_norm_fwd(xs, us, vs, steps, eps, ws[0].dtype, config)
    for _ in calls:
        paths.count("kernel")
    if steps:
        torch.autograd.graph.increment_version((*us, *vs))
    return [(y.view(w.shape), (w, *vectors)) for w, (y, *vectors) in zip(ws, results, strict=True)]


def _kernel_bwd(
    gs: Sequence[Tensor], saved: Sequence[Saved], dims: Sequence[int]
) -> list[Gradients]:
    kernels = paths.kernels("spectral_norm")
    ws, us, vs, sigmas = zip(*saved, strict=True)
    with torch.cuda.device_of(ws[0]):
        config = _config("bwd", ws)
        slices = [[_slices(x, dim) for x, dim in zip(xs, dims, strict=True)] for xs in (gs, ws)]
        dws = kernels.spectral_norm_bwd(*slices, us, vs, sigmas, config)
    return [(dw.view(w.shape),) for w, dw in zip(ws, dws, strict=True)]


# Iteration and division in one, which no operator can be: it changes the buffers.
_iterate_and_divide = EagerMap(
    lambda *call: _kernel_fwd([call])[0],
    lambda g, saved, dtype, dim, *_: _backward(g, saved, dtype, dim),
    lambda g, saved, dtype, dim, *_: _graph(g, saved, dtype, dim),
    n_tensors=3,
)
_iterate_and_divide_all = GroupedMap(
    _iterate_and_divide,
    _kernel_fwd,
    lambda gs, saved, dtype, numbers: _kernel_bwd(gs, saved, [dim for dim, *_ in numbers]),
)


def _iterate(link: Any, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and Wᵀu in fresh storage, after the link's iterations, which its buffers keep."""
    v = cast(link._v, w.dtype)
    for _ in range(link.n_power_iterations):
        u = torch.mv(w, v)
        u = u / vector_norm(u).clamp_min_(link.eps)
        q = torch.mv(w.mT, u)
        v = q / vector_norm(q).clamp_min_(link.eps)
    link._u.copy_(u)
    link._v.copy_(v)
    return u, v, q


def _power_iteration(link: Any, w: Tensor, tracked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and σ = uᵀ W v; in train mode after the link's iterations.

    σ has the graph of W, if that has one.
    """
    if not steps(link)[0]:
        u, v = (cast(x, w.dtype) for x in _buffers(link, w))
        if tracked:  # copies: the buffers may change between this read and its backward pass
            u, v = u.clone(), v.clone()
        return u, v, torch.dot(u, torch.mv(w, v))
    u, v, q = _iterate(link, w.detach())
    if w.requires_grad and torch.is_grad_enabled():
        return u, v, torch.dot(u, torch.mv(w, v))
    return u, v, torch.dot(q, v)  # qᵀ v = uᵀ W v, without a third product


@torch.no_grad()
def advance(link: Any, w: Tensor) -> None:
    """Run the link's power iterations on w, as a read in train mode does, and compute no value."""
    if w.dim() > 1:
        x = _matrix(cast(w, compute_dtype(w.dtype)), link.dim)
        without_autocast(w, _iterate, link, x)


def advance_all(chains: Sequence[tuple[Any, Tensor]]) -> None:
    """``advance`` of many (link, w); what the kernel takes, of one kind in few launches."""
    kinds: dict[Hashable, list[tuple[Any, Tensor]]] = {}
    for link, w in chains:
        if kernel_declines(link, w) or paths.override() == "closed" or misfit(link, w):
            advance(link, w)
        else:
            kind = w.device, w.dtype, link.n_power_iterations, link.eps
            kinds.setdefault(kind, []).append((link, w))
    for same in kinds.values():
        try:
            _kernel_advance(same)
        except Exception as error:  # before the last launch, the one that writes u and v
            w = max((w for _, w in same), key=Tensor.numel)
            paths.fall_back(error, "spectral_norm", w, w.numel())
            for link, w in same:
                advance(link, w)


def _kernel_advance(chains: Sequence[tuple[Any, Tensor]]) -> None:
    links, ws = zip(*chains, strict=True)
    us, vs = [link._u for link in links], [link._v for link in links]
    with torch.cuda.device_of(ws[0]), torch.no_grad():
        xs = [_slices(w, link.dim) for link, w in chains]
        number = links[0].n_power_iterations, links[0].eps
        config = _config("fwd", ws)
        paths.kernels("power_iteration").advance(xs, us, vs, *number, config)
    torch.autograd.graph.increment_version((*us, *vs))


def spectral_norms(chains: Sequence[tuple[Any, Tensor]]) -> list[Tensor]:
    """``spectral_norm`` of many (link, w) that the kernel takes, of one dtype and equal `steps`."""
    calls = [(w, link._u, link._v, link.dim, *steps(link)) for link, w in chains]
    return _iterate_and_divide_all(calls)


def spectral_norm(link: Any, w: Tensor) -> Tensor:
    """The weight divided by its spectral norm σ = uᵀ W v, with u and v held constant.

    Equals ``torch.nn.utils.parametrizations._SpectralNorm.forward``, and runs the power iteration
    on the link's own buffers at the same moments: on every call in train mode, on none in eval
    mode. A weight of one dimension is divided by its norm. Where the weight is zero the value is
    zero (torch: NaN), and with two dimensions and more so is the gradient.

    Arguments:
        link: a ``_SpectralNorm`` made for a weight of this shape.
        w: fp16, bf16, fp32 or fp64; the first two are computed in fp32.

    Returns:
        A fresh tensor of w's shape and dtype, of w's strides too where it is dense and no kernel
        computes it, contiguous otherwise; twice differentiable in w.

    >>> link = torch.nn.utils.parametrizations._SpectralNorm(torch.eye(2))
    >>> spectral_norm(link.eval(), 3 * torch.eye(2)).norm()
    tensor(1.4142)
    """
    vectors = _buffers(link, w)
    path = "closed" if paths.on_cpu(w) else paths.path(_declines(w, *vectors))
    if path == "kernel" and not torch.compiler.is_compiling():
        try:
            return _iterate_and_divide(w, *vectors, link.dim, *steps(link))
        except Exception as error:  # before the last launch, the one that writes u and v
            paths.fall_back(error, "spectral_norm", w, w.numel())
    x = cast(w, compute_dtype(w.dtype))
    if w.dim() == 1:
        if not torch.compiler.is_compiling():
            paths.count("closed")
        return F.normalize(x, dim=0, eps=link.eps).to(w.dtype)
    tracked = torch.is_grad_enabled() and w.requires_grad
    few = w.is_cpu and not (tracked and w.numel() > _FEW) and not torch.compiler.is_compiling()
    matrix = _matrix(x if few else x.detach(), link.dim)
    u, v, sigma = without_autocast(w, _power_iteration, link, matrix, tracked)
    if few and sigma.item():  # on the CPU nobody waits; of a σ of 0 torch's gradient is NaN
        paths.count("closed")
        return cast(x / sigma, w.dtype)
    return cast(_divide(x, u, v, sigma.detach(), link.dim), w.dtype)
