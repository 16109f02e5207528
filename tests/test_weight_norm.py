"""Weight norm against torch's own link."""

from __future__ import annotations

import gc
import io
import weakref
from functools import partial

import pytest
import torch

import tritonparam as tp
from tests.norms import (
    HALVES,
    assert_equal_maps,
    assert_near,
    composed,
    second,
    tolerance,
    weight_pair,
)
from tritonparam.ops import weight_norm as ops
from tritonparam.ops.weight_norm import weight_norm

WEIGHT = [
    ((1, 1), 0),
    ((1, 7), 0),
    ((13, 5), 0),
    ((13, 5), 1),
    ((13, 5), -1),
    ((13, 5), None),
    ((33, 130), 0),
    ((33, 130), 1),
    ((6, 5, 3, 3), 0),
    ((6, 5, 3, 3), 1),
    ((6, 5, 3, 3), 2),
    ((6, 5, 3, 3), 3),
    ((6, 5, 3, 3), -2),
    ((6, 5, 3, 3), None),
    ((9,), 0),
    ((9,), -1),
    ((0, 3), 0),
]


@pytest.mark.parametrize(("shape", "dim"), WEIGHT)
@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e6])
def test_weight_norm_equals_torch(shape, dim, norm, device):
    link, g, v = weight_pair(shape, dim, device=device)
    v = (norm * v).detach().requires_grad_()
    assert_equal_maps(lambda g, v: weight_norm(link, g, v), composed(link), (g, v))


@pytest.mark.parametrize(("shape", "dim"), WEIGHT[:-1])  # torch's own crashes on an empty one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_norm_equals_torchs_link(shape, dim, dtype, device):
    link, g, v = weight_pair(shape, dim, dtype, device)
    grad = torch.randn_like(v)
    got, want = weight_norm(link, g, v), link(g, v)
    assert_near(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got, (g, v), grad),
        torch.autograd.grad(want, (g, v), grad),
        strict=True,
    ):
        assert_near(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "dim", "few"),
    [((4, 3), 0, 99), ((4, 3), 1, 99)]
    + [(shape, dim, few) for shape, dim in (((4, 3), None), ((2, 3, 2), 1)) for few in (99, 0)],
)
def test_weight_norm_gradcheck(shape, dim, few, monkeypatch):
    monkeypatch.setattr(ops, "_FEW", few)  # torch's graph, or a function of ours
    link, g, v = weight_pair(shape, dim)
    assert torch.autograd.gradcheck(lambda g, v: weight_norm(link, g, v), (g, v))
    assert torch.autograd.gradgradcheck(lambda g, v: weight_norm(link, g, v), (g, v))


def test_a_dimension_counted_from_the_last_is_fused(device):
    layer = tp.weight_norm(torch.nn.Conv1d(3, 4, 2, device=device), dim=-2)
    want = composed(layer.parametrizations.weight[0])(*layer.parametrizations.weight.parameters())
    assert_near(layer.weight, want)
    assert tp.stats()["composed"] == 0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("dim", [0, -1])
def test_weight_norm_of_nothing_has_no_gradient(shape, dim, device):
    link, g, v = weight_pair(shape, dim, device=device)
    w = weight_norm(link, g, v)
    for x in torch.autograd.grad(w, (g, v), torch.ones_like(w)):
        assert not x.any()


def test_weight_norm_with_hooks_on_saved_tensors(device):
    link, g, v = weight_pair((5, 4), 0, device=device)
    before = [x.detach().clone().requires_grad_() for x in (g, v)]

    def gradients(y, xs):
        dxs = torch.autograd.grad(y.sin().sum(), xs, create_graph=True)
        return dxs, torch.autograd.grad(sum(dx.sin().sum() for dx in dxs), xs)

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        y = weight_norm(link, g, v)
    with torch.no_grad():
        v.mul_(2)  # after which a copy is what was saved
    (first, _), (want, _) = gradients(y, (g, v)), gradients(composed(link)(*before), before)
    for a, b in zip(first, want, strict=True):
        assert_near(a, b)


def test_a_graph_of_weight_norm_is_freed_at_once(device):
    link, g, v = weight_pair((5, 4), 0, device=device)
    inside = v * 1.0
    dies = weakref.ref(inside)
    gc.disable()
    try:
        y = weight_norm(link, g, inside)
        del inside
        torch.autograd.grad(y.sum(), v, create_graph=True)
        del y
        assert dies() is None
    finally:
        gc.enable()


def test_any_pass_over_a_graph_of_weight_norm_may_be_the_one_that_is_differentiated(device):
    link, g, v = weight_pair((5, 4), 0, device=device)

    def passes(f):
        w = f(g, v)
        y = w.sin()
        seen = []
        handle = w.register_hook(lambda dw: seen.append(dw.requires_grad))
        found = [*torch.autograd.grad(y.sum(), w, create_graph=True)]  # stops above the norm
        for differentiated in (False, True, False, True):
            torch.manual_seed(0)
            grad = torch.randn_like(y)
            dxs = torch.autograd.grad(
                y, (g, v), grad, retain_graph=True, create_graph=differentiated
            )
            found += dxs
            if differentiated:
                twice = sum(dx.sin().sum() for dx in dxs)
                found += torch.autograd.grad(twice, (g, v), retain_graph=True)
        handle.remove()
        with torch.no_grad():
            w.mul_(2)
        return seen, [*found, w]

    (seen, got), (want_seen, want) = (
        passes(f) for f in (partial(weight_norm, link), composed(link))
    )
    assert seen == want_seen
    for a, b in zip(got, want, strict=True):
        assert_near(a, b)


def test_saving_a_weight_with_a_graph_warns_of_no_hooks(device, recwarn):
    link, g, v = weight_pair((5, 4), 0, device=device)
    torch.save(weight_norm(link, g, v), io.BytesIO())
    assert not recwarn.list


@pytest.mark.parametrize("only", [0, 1])
def test_weight_norm_of_one_parameter(only, device):
    link, g, v = weight_pair((5, 4), 0, device=device)
    x = (g, v)[only]
    (g, v)[1 - only].requires_grad_(False)
    (got,) = torch.autograd.grad(weight_norm(link, g, v).sin().sum(), x)
    (want,) = torch.autograd.grad(composed(link)(g, v).sin().sum(), x)
    assert_near(got, want)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "dim"), WEIGHT[:-1])
def test_weight_norm_of_halves(shape, dim, dtype, device):
    link, g, v = weight_pair(shape, dim, device=device)
    g, v = (x.detach().to(dtype).requires_grad_() for x in (g, v))
    xs = [x.detach().double().requires_grad_() for x in (g, v)]
    grad = torch.randn(shape, device=device).to(dtype)
    got, want = weight_norm(link, g, v), composed(link)(*xs)
    pairs = [(got, want)]
    pairs += zip(
        torch.autograd.grad(got, (g, v), grad),
        torch.autograd.grad(want, xs, grad.double()),
        strict=True,
    )
    half_ulp = torch.finfo(dtype).eps / 2
    for y, z in pairs:
        assert y.dtype == dtype
        # One rounding, and those of fp32 inside, of terms that may cancel.
        terms = grad.double().norm() * want.norm() / min(x.norm() for x in xs)
        size = max(float(z.detach().norm()), float(terms.detach()))
        slack = tolerance(v, torch.float32) * size + torch.finfo(dtype).tiny * half_ulp
        assert ((y.double() - z).abs() <= half_ulp * z.abs() + slack).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_zero_slices_of_weight_norm(dim, dtype, device):
    # torch: NaN. Value and gradients of a zero slice are 0, the others as without it.
    link, g, v = weight_pair((4, 3, 5), dim, device=device)
    zero = v.detach().clone()
    (zero if dim is None else zero.select(dim, 1)).zero_()
    g, zero = (x.detach().to(dtype).requires_grad_() for x in (g, zero))
    results = second(lambda g, v: weight_norm(link, g, v), (g, zero))
    assert all(x.isfinite().all() for x in results)
    y, dg, dv = results[:3]
    if dim is None:
        assert not any(x.any() for x in (y, dg, dv))
        return
    assert not any(x.select(dim, 1).any() for x in (y, dg, dv))
    others = [i for i in range(v.size(dim)) if i != 1]
    kept = [torch.tensor(others, device=device)]
    torch.manual_seed(1)
    grad = torch.randn(y.shape, dtype=y.dtype, device=y.device).index_select(dim, *kept)
    xs = [x.detach().index_select(dim, *kept).requires_grad_() for x in (g, zero)]
    alone = weight_norm(link, *xs)
    expected = (alone, *torch.autograd.grad(alone, xs, grad))
    for got, want in zip((y, dg, dv), expected, strict=True):
        assert_near(got.index_select(dim, *kept), want)
