"""What the tests of spectral norm and weight norm compare with, and how closely."""

from __future__ import annotations

import math

import torch
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm

from tritonparam.slices import norm_shape

HALVES = [torch.float16, torch.bfloat16]


def tolerance(x: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative, in the 2-norm: both sides round sums of numel terms, a few times each."""
    return 8 * torch.finfo(dtype).eps * math.sqrt(max(x.numel(), 1))


def assert_near(got, want, size=0.0):
    """Relative to want, or to the terms that cancel in it, where their size is given."""
    got, want = got.detach().double(), want.detach()
    assert got.shape == want.shape
    bound = tolerance(want, want.dtype) * max(float(want.double().norm()), float(size))
    assert float((got - want).norm()) <= bound


def spectral_link(w, dim=0, **options):
    return _SpectralNorm(w.detach(), dim=dim, **options)


def weight_pair(shape, dim, dtype=torch.float64, device="cpu"):
    v = torch.randn(shape, dtype=dtype, device=device)
    link = _WeightNorm(dim)
    g = torch.randn(norm_shape(v, link.dim), dtype=dtype, device=device)
    return link, g.requires_grad_(), v.requires_grad_()


def second(f, xs, seed=1):
    """The value, the gradients, and the gradients of a random functional of the gradients."""
    torch.manual_seed(seed)
    y = f(*xs)
    upstream = torch.randn(y.shape, dtype=y.dtype, device=y.device).requires_grad_()
    grads = torch.autograd.grad(y, xs, upstream, create_graph=True)
    functional = sum((torch.randn(g.shape, device=g.device) * g).sum() for g in grads)
    return y, *grads, *torch.autograd.grad(functional, (*xs, upstream), materialize_grads=True)


def assert_equal_maps(ours, theirs, xs):
    """Value, gradients and second derivatives, each to the size of the terms it is made of."""
    got, want = second(ours, xs), second(theirs, xs)
    n, y = want[0].numel(), float(want[0].detach().norm())
    sizes = [max(float(x.detach().norm()), 1e-300) for x in xs]
    first = [n**0.5 * y / size for size in sizes]  # n entries of size 1 arrive
    other = [n**0.5 * d / min(sizes) for d in first]
    terms = [y, *first, *other, max(first)]
    for a, b, size in zip(got, want, terms, strict=True):
        assert a.dtype == b.dtype
        assert_near(a, b, size)


def composed(link):
    """The formula in elementary operators: second derivatives of torch's own link are wrong.

    On the CPU, for the first and the last dimension, torch 2.13 fails gradgradcheck.
    """

    def forward(g, v):
        dims = [i for i in range(v.dim()) if link.dim == -1 or i != link.dim % v.dim()]
        square = v.square().sum(dims, keepdim=link.dim != -1) if dims else v.square()
        return v * (g / square.sqrt())

    return forward
