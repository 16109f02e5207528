"""Skew→Cayley: Q = (I + X)(I - X)⁻¹ D with X = triu(W, 1) - triu(W, 1)ᵀ and D = diag(d), d = ±1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonparam import configs, paths
from tritonparam.autograd import EagerMap, FusedMap, Saved
from tritonparam.numerics import cast, compute_dtype, inverse_definite
from tritonparam.together import stacked

_TILE_MAX_N = 64  # one program for each matrix; above, a sequence of products
_KERNEL_MAX_N = 4096
_FEW = 64  # rows of a matrix, up to which the number of operators is what counts


def kernel_declines(w: Tensor, dtype: torch.dtype | None = None) -> str:
    """Why the Triton kernel cannot take w, or the empty string.

    `dtype` is that of the original where w is its value, in the compute dtype.
    """
    n = w.size(-1)
    if reason := paths.kernel_declines("cayley", w, n, dtype):
        return reason
    return f"n = {n} is beyond the kernel's {_KERNEL_MAX_N}" if n > _KERNEL_MAX_N else ""


def kernel_file(n: int, dtype: torch.dtype) -> str:
    """The file of kernels for n x n matrices, or the empty string."""
    if n > _KERNEL_MAX_N:
        return ""
    return "cayley" if n <= _TILE_MAX_N else "newton_schulz"


def n_launches(w: Tensor) -> tuple[int, int]:
    """How many kernels a forward and a backward pass launch."""
    if not w.numel():
        return 0, 0
    kernels, config = _kernels("fwd", w, w.dtype)
    return kernels.n_launches(config)


def _closed_fwd(w: Tensor, d: Tensor) -> tuple[Tensor, Saved]:
    # One inverse and no product: Q = (2M - I) D with M = (I - X)⁻¹.
    w = cast(w, compute_dtype(w.dtype))
    if w.is_cpu and w.dim() == 2 and w.size(0) <= _FEW:
        return _closed_fwd_of_few(w, d)
    upper = w.triu(1)
    a = torch.sub(upper.mT, upper, out=torch.empty_like(upper))  # by rows, as the result shall be
    a.diagonal(0, -2, -1).fill_(1)
    # LU takes infinity for a good pivot; where W is not finite this is NaN, as in torch's solve.
    nan = upper.sum((-2, -1), keepdim=True).mul_(0)
    m = inverse_definite(a)
    q = m * nan.add(d.unsqueeze(-2), alpha=2)
    diagonal = q.diagonal(0, -2, -1)
    if w.is_cpu and _is_small(upper):
        # Of M = I + M X the diagonal, where the rounding of pivots near 1 gathers.
        a.diagonal(0, -2, -1).zero_()
        torch.addcmul(d, d, (a * m).sum(-1), value=2, out=diagonal)
    else:
        diagonal.sub_(d)
    return q, (q, d)


def _is_small(upper: Tensor) -> bool:
    """Whether the eigenvalues of every X, of which `upper` is a triangle, are below 1 in rms."""
    norm = torch.linalg.vector_norm(upper, dim=(-2, -1))
    return bool((norm * norm < upper.size(-1) / 2).all())


def _closed_fwd_of_few(w: Tensor, d: Tensor) -> tuple[Tensor, Saved]:
    """The same of one matrix, by as few operators as it takes: Q = -D - 2 M (-D)."""
    upper = w.triu(1)
    a = (upper.mT - upper).fill_diagonal_(1)
    # The distance is 0, or NaN where W is not finite.
    minus_d = (torch.dist(upper, upper) - cast(d, w.dtype)).diag_embed()
    m = torch.linalg.solve_ex(a, minus_d)[0]
    q = minus_d.sub_(m, alpha=2)
    return q, (q, d, m)


def _closed_bwd(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    # dW = triu(Z - Zᵀ, 1) / 2 with Z = 4 Mᵀ G D Mᵀ, and 2M = (Q + D) D. Differentiable.
    q, d = saved[:2]
    e = q.clone()
    e.diagonal(0, -2, -1).add_(d)
    e = e.mT
    z = (cast(d, q.dtype) / 2).unsqueeze(-1) * (e @ (g @ e))
    return ((z - z.mT).triu_(1),)


def _closed_bwd_of_few(g: Tensor, m: Tensor, d: Tensor) -> tuple[Tensor]:
    # The same with -MD as it was computed: Z = 4 D (MD)ᵀ G (MD)ᵀ.
    m = m.mT
    z = (2 * cast(d, m.dtype)).unsqueeze(-1) * m.mm(g.mm(m))
    return ((z - z.mT).triu_(1),)


def _kernels(phase: str, x: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """The file of kernels that takes x, and the configuration of a phase.

    `dtype` is that of the original: x is its value in the backward pass.
    """
    n = x.size(-1)
    kernels = paths.kernels(kernel_file(n, x.dtype))
    choice = ("cayley", phase, x, getattr(kernels, f"{phase}_config"))
    return kernels, configs.launch(*choice, n, x.dtype, paths.backend(), dtype=dtype)


def _launched(phase: str, x: Tensor, dtype: torch.dtype, *args: Any) -> Tensor:
    """What the launcher of a phase returns for `args`, on x's device and with its configuration."""
    with torch.cuda.device_of(x):
        kernels, config = _kernels(phase, x, dtype)
        return getattr(kernels, f"cayley_{phase}")(*args, config)


def _forward(w: Tensor, d: Tensor) -> tuple[Tensor, Saved]:
    if paths.path(kernel_declines(w)) == "kernel":
        try:
            q = _launched("fwd", w, w.dtype, w, d)
            paths.count("kernel")
            return q, (q, d)
        except Exception as error:
            paths.fall_back(error, "cayley", w, w.size(-1))
    paths.count("closed")
    return _closed_fwd(w, d)


def _backward(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    q, d, *few = saved
    if few:
        return _closed_bwd_of_few(g, few[0], d)
    if paths.path(kernel_declines(q, dtype)) == "kernel":
        try:
            return (_launched("bwd", q, dtype, g, q, d, dtype),)
        except Exception as error:
            paths.fall_back(error, "cayley", q, q.size(-1))
    return _closed_bwd(g, saved, dtype)


_skew_cayley = FusedMap(
    "skew_cayley",
    "Tensor w, Tensor d",
    _forward,
    _backward,
    graph=_closed_bwd,
    resume=lambda q, w, d: (q, d),
)


_skew_cayleys = stacked(_skew_cayley, 2)


def skew_cayley(w: Tensor, signature: Tensor, left: Tensor | None = None) -> Tensor:
    """The orthogonal matrix (I + X)(I - X)⁻¹ diag(signature), X = triu(w, 1) - triu(w, 1)ᵀ.

    Arguments:
        w: [..., n, n], fp16, bf16, fp32 or fp64; the first two are computed in fp32.
        signature: ±1, [..., n].
        left: a matrix to multiply on from the left, of the compute dtype; it has no gradient.

    Returns:
        A fresh contiguous tensor of w's shape and dtype, twice differentiable in w.
    """
    return _skew_cayley.left(left, w, signature)


# torch's (I - A/2)⁻¹ (I + A/2) with A = L - Lᵀ and L = tril(x, -1), of few rows.


def is_few(x: Tensor) -> bool:
    """Whether ``cayley_of_few`` takes x, [n, k] with n >= k, here and now."""
    if not (paths.on_cpu(x) and x.dim() == 2 and x.numel()) or torch.compiler.is_compiling():
        return False
    n, k = x.shape
    if n <= _FEW:
        return True
    # The inverse above is more exact where A is large; beyond so many rows it takes no more time.
    return n == k <= 2 * _FEW and torch.linalg.vector_norm(x.detach()).item() ** 2 < 2 * n


def _rotation(x: Tensor) -> tuple[Tensor, Tensor]:
    # Q and S = 2I + A, with Q Sᵀ = S: by rows, so that the weight is no view.
    n, k = x.shape
    lower = x.tril(-1)
    if k < n:
        lower = torch.constant_pad_nd(lower, (0, n - k))
    s = (lower - lower.mT).fill_diagonal_(2)
    return torch.linalg.solve_ex(s.mT, s, left=False)[0], s


def _few_fwd(x: Tensor) -> tuple[Tensor, Saved]:
    paths.count("closed")
    x = cast(x, compute_dtype(x.dtype))
    q, a = _rotation(x)
    n, k = x.shape
    if n > _FEW:
        # Of Q = I + A (I + Q) / 2 the diagonal, where the rounding of pivots near 2 gathers.
        q.diagonal().copy_(a.fill_diagonal_(0).mul_(q).sum(0).mul_(-0.5).add_(1))
    return (q if k == n else q[:, :k].contiguous()), (x, q)


def _few_bwd(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    # dL = tril(Z - Zᵀ, -1) with Z = (I + Q)ᵀ G (I + Q)ᵀ / 4, G and the second Q of k columns.
    q, k = saved[1], g.size(1)
    t = torch.addmm(g, q.mT, g, beta=0.25, alpha=0.25)
    if k == q.size(0):
        z = torch.addmm(t, t, q.mT)
        return ((z - z.mT).tril_(-1),)
    z = t.mm(q[:, :k].mT)
    z[:, :k] += t
    return ((z - z.mT)[:, :k].tril(-1),)


def _few_graph(g: Tensor, saved: Saved, dtype: torch.dtype) -> tuple[Tensor]:
    return _few_bwd(g, (saved[0], _rotation(saved[0])[0]), dtype)


_of_few = EagerMap(_few_fwd, _few_bwd, _few_graph, n_tensors=1, keeps=True)


def cayley_of_few(x: Tensor, left: Tensor | None = None) -> Tensor:
    """The first k columns of torch's Cayley map of a small x, [n, k], multiplied from the left.

    It is the map of ``torch.nn.utils.parametrizations.orthogonal`` in as few operators as it takes,
    which is what counts here; `left` and the result are as for ``skew_cayley``.
    """
    return _of_few.left(left, x)


def skew_cayleys(calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """``skew_cayley`` of many pairs, all of one shape and dtype, in the launches of one."""
    return _skew_cayleys(calls)
