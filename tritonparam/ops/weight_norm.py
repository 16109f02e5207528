"""Weight norm: w = g v/‖v‖, a norm for every index of one dimension, as torch's ``_WeightNorm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonparam import configs, paths
from tritonparam.autograd import FusedMap, Gradients, Saved, differentiated_by, one_by_one
from tritonparam.numerics import cast, compute_dtype
from tritonparam.slices import divisor, norms, slices, sums
from tritonparam.together import GroupedMap

# torch's own loops for the first and the last dimension, in fp32 for fp16 and bf16. Their
# second derivatives are wrong on the CPU (torch 2.13 fails gradgradcheck), those here are not.
_torch_forward = torch._weight_norm_interface
_torch_backward = torch.ops.aten._weight_norm_interface_backward.default


def kernel_declines(g: Tensor, v: Tensor) -> str:
    """Why the Triton kernel cannot take the pair, or the empty string."""
    declined = paths.kernel_declines("weight_norm", v, v.numel())
    return declined or ("" if v.numel() else "the original is empty")


def n_launches(link: Any, v: Tensor) -> tuple[int, int]:
    """How many kernels a forward and a backward pass launch."""
    if not v.numel():
        return 0, 0
    shape = slices(v.to("meta"), dim_of(link, v)).shape
    n_launches = paths.kernels("weight_norm").n_launches
    return n_launches(shape, _config("fwd", [v])), n_launches(shape, _config("bwd", [v]))


def _fused(v: Tensor, dim: int) -> bool:
    return dim in (0, v.dim() - 1) and v.numel() > 0


Call = tuple[Tensor, Tensor, int, bool]
_FEW = 1 << 15  # numbers, up to which the number of operators is what counts
_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _config(phase: str, vs: Sequence[Tensor]) -> Any:
    """The launch numbers of all, those that suit the largest."""
    v, default = max(vs, key=Tensor.numel), paths.kernels("weight_norm").default_of_size
    return configs.launch("weight_norm", phase, v, default, v.numel(), v.dtype)


def _kernel_fwd(calls: Sequence[Call]) -> list[tuple[Tensor, Saved]]:
    kernels = paths.kernels("weight_norm")
    gs, vs, dims, rounded = zip(*calls, strict=True)
    dtype = vs[0].dtype if rounded[0] else compute_dtype(vs[0].dtype)
    with torch.cuda.device_of(vs[0]):
        config = _config("fwd", vs)
        xs = [slices(v.contiguous(), dim) for v, dim in zip(vs, dims, strict=True)]
        results = kernels.weight_norm_fwd([g.reshape(-1) for g in gs], xs, dtype, config)
    pairs = zip(gs, vs, results, strict=True)
    return [(w.view(v.shape), (g, v, norm.view(g.shape))) for g, v, (w, norm) in pairs]


def _kernel_bwd(
    grads: Sequence[Tensor], saved: Sequence[Saved], dims: Sequence[int]
) -> list[Gradients]:
    kernels = paths.kernels("weight_norm")
    gs, vs, norms = zip(*saved, strict=True)
    with torch.cuda.device_of(vs[0]):
        config = _config("bwd", vs)
        dws, xs = (
            [slices(x.contiguous(), dim) for x, dim in zip(tensors, dims, strict=True)]
            for tensors in (grads, vs)
        )
        gs_flat, norms_flat = ([x.reshape(-1) for x in tensors] for tensors in (gs, norms))
        results = kernels.weight_norm_bwd(dws, gs_flat, xs, norms_flat, config)
    pairs = zip(gs, vs, results, strict=True)
    return [(dg.view(g.shape), dv.view(v.shape)) for g, v, (dg, dv) in pairs]


def _forward(g: Tensor, v: Tensor, dim: int, rounded: bool) -> tuple[Tensor, Saved]:
    dtype = compute_dtype(v.dtype)
    if paths.path(kernel_declines(g, v)) == "kernel":
        try:
            result = _kernel_fwd([(g, v, dim, rounded)])[0]
            paths.count("kernel")
            return result
        except Exception as error:
            paths.fall_back(error, "weight_norm", v, v.numel())
    paths.count("closed")
    if v.device.type == "cpu" and _fused(v, dim):
        w, norm = _torch_forward(v.contiguous(), g.contiguous(), dim)
        if not norm.all():  # on the CPU nobody waits for this
            w.masked_fill_(norm == 0, 0)
            norm = divisor(norm)
        return w if rounded else cast(w, dtype), (g, v, norm)
    x = v.to(dtype).contiguous()
    norm = norms(x, dim)
    w = slices(x, dim) * (g.to(dtype).reshape(norm.shape) / norm)
    return w.view(v.shape), (g, v, norm.view(g.shape))


def _backward(grad: Tensor, saved: Saved, dtype: torch.dtype, dim: int, rounded: bool) -> Gradients:
    # dg = <G, v>/‖v‖,  dv = g/‖v‖ (G - dg v/‖v‖)
    g, v, norm = saved
    if paths.path(kernel_declines(g, v)) == "kernel":
        try:
            return _kernel_bwd([grad], [saved], [dim])[0]
        except Exception as error:
            paths.fall_back(error, "weight_norm", v, v.numel())
    if _fused(v, dim):
        grad = cast(grad, v.dtype).contiguous()
        dv, dg = _torch_backward(grad, v.contiguous(), g.contiguous(), norm, dim)
        return dg, dv
    x, grad = slices(v, dim).to(norm.dtype), slices(grad, dim).to(norm.dtype)
    norm = norm.view(1, -1, 1)
    dg = sums(grad, x) / norm
    scale = g.to(norm.dtype).reshape(norm.shape) / norm
    dv = (grad * scale).addcmul_(x, scale * dg / norm, value=-1)
    return dg.view(g.shape), dv.reshape(v.shape)


class _Gradients(torch.autograd.Function):
    """The gradients, differentiable: G, g, v, ‖v‖, dim -> dg, dv."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, g: Tensor, v: Tensor, *rest: Any) -> Gradients:
        norm, ctx.dim = rest
        dg, dv = _weight_norm.backward(grad, (g, v, norm), v.dtype, ctx.dim, True)
        ctx.save_for_backward(grad, g, v, norm, dg)
        return dg, dv

    @staticmethod
    def backward(ctx: Any, q: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        return *_second(q, h, *ctx.saved_tensors, ctx.dim), None, None


@one_by_one
def _second(q: Tensor, h: Tensor, *rest: Any) -> Gradients:
    # With q, H the gradients of dg, dv; a = <G, v>/‖v‖, b = <H, v>/‖v‖, c = <H, G>, s = g/‖v‖:
    # dG = s H + (q - s b) v/‖v‖,  dg = (c - a b)/‖v‖,
    # dv = ((q - s b) G - s a H + (3 s a b - s c - q a) v/‖v‖)/‖v‖. Differentiable.
    *gv, norm, a, dim = rest
    norm = norms(gv[2], dim) if torch.is_grad_enabled() else norm.view(1, -1, 1)
    grad, x, h = (slices(t, dim) for t in (gv[0], gv[2], h))
    g, q, a = (t.reshape(norm.shape) for t in (gv[1], q, a))
    b, c, s = sums(h, x) / norm, sums(h, grad), g / norm
    p = q - s * b
    d_grad = torch.addcmul(h * s, x, p / norm)
    dg = (c - a * b) / norm
    dv = grad * (p / norm)
    dv = dv.addcmul_(h, s * a / norm, value=-1)
    dv = dv.addcmul_(x, (s * (3 * a * b - c) - q * a) / norm / norm)
    return tuple(t.reshape(y.shape) for t, y in zip((d_grad, dg, dv), gv, strict=True))


def _graph(grad: Tensor, saved: Saved, dtype: torch.dtype, dim: int, rounded: bool) -> Gradients:
    g, v, norm = saved
    kind = norm.dtype
    return _Gradients.apply(grad.to(kind), g.to(kind), v.to(kind), norm, dim)


def _torchs(g: Tensor, v: Tensor, dim: int) -> Tensor | None:
    """The value with the graph of torch's own operators, the least that costs; or None.

    None where it does not take them, or a norm is 0 or NaN.
    """
    if not (v.is_contiguous() and g.is_contiguous() and v.numel()):
        return None
    if fused := dim == 0 or dim == v.dim() - 1:
        if _saved_hooks(True):  # our second derivatives would not see what they make of tensors
            return None
        w, norm = _torch_forward(v, g, dim)
    elif compute_dtype(v.dtype) == v.dtype and (v.numel() <= _FEW or not torch.is_grad_enabled()):
        norm = torch.norm_except_dim(v, 2, dim)
        w = v * (g / norm)
    else:
        return None
    if not norm.min().item() > 0:  # on the CPU nobody waits for this
        return None
    if fused and w.requires_grad:
        differentiated_by(w, _in_torchs_order, (g, v, norm), dim)
    paths.count("closed")
    return w


def _in_torchs_order(grad: Tensor, saved: Saved, dim: int) -> Gradients:
    v = saved[1]
    dg, dv = _graph(grad, saved, v.dtype, dim, True)
    return cast(dv, v.dtype), cast(dg, v.dtype)


def _resume(w: Tensor, g: Tensor, v: Tensor, dim: int, rounded: bool) -> Saved:
    norm = norms(v.to(compute_dtype(v.dtype)), dim)
    return g, v, norm.view(g.shape)


_weight_norm = FusedMap(
    "weight_norm",
    "Tensor magnitude, Tensor v, int dim, bool rounded",
    _forward,
    _backward,
    graph=_graph,
    n_gradients=2,
    like=1,
    resume=_resume,
)


def _forwards(calls: Sequence[Call]) -> list[tuple[Tensor, Saved]]:
    for _ in calls:
        paths.count("kernel")
    return _kernel_fwd(calls)


_weight_norms = GroupedMap(
    _weight_norm,
    _forwards,
    lambda gs, saved, dtype, numbers: _kernel_bwd(gs, saved, [dim for dim, _ in numbers]),
)


def weight_norms(chains: Sequence[tuple[Any, Tensor, Tensor]]) -> list[Tensor]:
    """``weight_norm`` of many (link, g, v) of one dtype, which the kernel takes: few launches."""
    return _weight_norms([(g, v, dim_of(link, v), True) for link, g, v in chains])


def dim_of(link: Any, v: Tensor) -> int:
    """The link's dimension, counted from the first of v; -1 stands for the whole tensor."""
    return link.dim if link.dim >= -1 else link.dim + v.dim()


def weight_norm(link: Any, g: Tensor, v: Tensor) -> Tensor:
    """The weight g v/‖v‖, with one norm for every index of the link's dimension.

    Equals ``torch.nn.utils.parametrizations._WeightNorm.forward``. Where ‖v‖ is zero, so are the
    value and both gradients (torch: NaN).

    Arguments:
        link: a ``_WeightNorm``; its dim -1 means one norm for the whole tensor.
        g: of the shape ``norm_shape(v, link.dim)`` and of v's dtype.
        v: fp16, bf16, fp32 or fp64; the first two are computed in fp32.

    Returns:
        A fresh contiguous tensor of v's shape and dtype, twice differentiable in g and v.

    >>> link = torch.nn.utils.parametrizations._WeightNorm(0)
    >>> weight_norm(link, torch.full((2, 1), 10.0), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[6., 8.],
            [0., 0.]])
    """
    dim = dim_of(link, v)
    if torch.compiler.is_compiling():  # an operator's result has the compute dtype
        return _weight_norm(g, v, dim, False)
    if paths.on_cpu(v):
        w = _torchs(g, v, dim)
        if w is not None:
            return w
    return _weight_norm(g, v, dim, True)  # torch's loops round a half once
