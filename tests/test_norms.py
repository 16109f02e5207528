"""What spectral norm and weight norm share: strides, NaN, higher derivatives, compilers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.parametrizations import _WeightNorm

import tritonparam as tp
from tests.norms import assert_equal_maps, assert_near, composed, spectral_link, weight_pair
from tritonparam.ops.spectral_norm import spectral_norm
from tritonparam.ops.weight_norm import weight_norm
from tritonparam.slices import norm_shape


def test_third_derivatives():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    link = spectral_link(w).eval()
    wlink, g, v = weight_pair((3, 4), 0)

    def first(f):
        def gradients(*xs):
            return torch.autograd.grad(f(*xs).sin().sum(), xs, create_graph=True)

        return gradients

    assert torch.autograd.gradgradcheck(first(lambda w: spectral_norm(link, w)), (w,))
    assert torch.autograd.gradgradcheck(first(lambda g, v: weight_norm(wlink, g, v)), (g, v))


@pytest.mark.parametrize("training", [True, False])
def test_non_contiguous(training, device):
    w = torch.randn(5, 9, dtype=torch.float64, device=device).mT.requires_grad_()
    conv = torch.randn(4, 3, 3, 3, dtype=torch.float64, device=device)
    conv = conv.to(memory_format=torch.channels_last).requires_grad_()
    for x in (w, conv):
        for dim in (0, 1):
            theirs = spectral_link(x, dim).train(training)
            ours = copy.deepcopy(theirs)
            assert_equal_maps(lambda x, link=ours: spectral_norm(link, x), theirs, (x,))
            y = spectral_norm(ours, x)
            assert y.stride() == (x if device == "cpu" else y.contiguous()).stride()
            link = _WeightNorm(dim)
            g = torch.randn(norm_shape(x, dim), dtype=x.dtype, device=device, requires_grad=True)
            assert_equal_maps(lambda *a, link=link: weight_norm(link, *a), composed(link), (g, x))
            assert weight_norm(link, g, x).is_contiguous()
            grad = torch.randn(x.shape[::-1], dtype=x.dtype, device=device).permute(
                *reversed(range(x.dim()))
            )
            (got,) = torch.autograd.grad(spectral_norm(ours.eval(), x), x, grad)
            (want,) = torch.autograd.grad(spectral_norm(ours, x), x, grad.contiguous())
            assert_near(got, want)
            (got,) = torch.autograd.grad(weight_norm(link, g, x), x, grad)
            (want,) = torch.autograd.grad(weight_norm(link, g, x), x, grad.contiguous())
            assert_near(got, want)


@pytest.mark.parametrize("training", [True, False])
def test_nan_stays_nan(training, device):
    w = torch.randn(4, 3, device=device)
    w[1, 2] = torch.nan
    w.requires_grad_()
    link = spectral_link(torch.randn(4, 3, device=device)).train(training)
    y = spectral_norm(link, w)
    assert y.isnan().all()
    assert torch.autograd.grad(y.sum(), w)[0].isnan().all()
    vector = w.detach()[1]
    assert spectral_norm(spectral_link(vector), vector).isnan().all()
    for dim, nans in ((0, 3), (1, 4), (None, 12)):
        wlink, g, _ = weight_pair((4, 3), dim, torch.float32, device)
        y = weight_norm(wlink, g, w)
        assert y.isnan().sum() == nans
        assert torch.autograd.grad(y.sum(), w)[0].isnan().sum() == nans


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()  # or the recompiles of earlier tests count


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 3)])
def test_compiled_without_a_graph_break(shape, dtype, device):
    w = torch.randn(shape, device=device).to(dtype).requires_grad_()
    eager = spectral_link(w.float()).to(dtype)
    compiled = copy.deepcopy(eager)
    run = torch.compile(lambda w: spectral_norm(compiled, w), fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        eager.train(training)
        compiled.train(training)
        want, got = spectral_norm(eager, w), run(w)
        assert got.dtype == dtype
        grad = torch.randn_like(want)
        assert_near(got, want)
        assert_near(torch.autograd.grad(got, w, grad)[0], torch.autograd.grad(want, w, grad)[0])
        assert_near(compiled._u, eager._u)
        assert_near(compiled._v, eager._v)
    for dim in (0, 1, None):
        link, g, _ = weight_pair(shape, dim, dtype, device)
        run = torch.compile(
            lambda g, v, link=link: weight_norm(link, g, v), fullgraph=True, backend="aot_eager"
        )
        want, got = weight_norm(link, g, w), run(g, w)
        assert got.dtype == dtype
        grad = torch.randn_like(want)
        assert_near(got, want)
        for ours, theirs in zip(
            torch.autograd.grad(got, (g, w), grad),
            torch.autograd.grad(want, (g, w), grad),
            strict=True,
        ):
            assert_near(ours, theirs)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_by_inductor(device):
    w = torch.randn(8, 5, device=device, requires_grad=True)
    eager = spectral_link(w)
    compiled = copy.deepcopy(eager)
    link, g, _ = weight_pair((8, 5), 0, torch.float32, device)

    def both(spectral, g, w):
        return spectral_norm(spectral, w) + weight_norm(link, g, w)

    run = torch.compile(lambda g, w: both(compiled, g, w), fullgraph=True)
    grad = torch.randn(8, 5, device=device)
    got, want = run(g, w), both(eager, g, w)
    assert_near(got, want)
    assert_near(torch.autograd.grad(got, w, grad)[0], torch.autograd.grad(want, w, grad)[0])
    assert_near(compiled._u, eager._u)


def test_operators_pass_torchs_own_check():
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    u, v = torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    sigma = torch.tensor(2.0, dtype=torch.float64)
    torch.library.opcheck(torch.ops.tritonparam.spectral_norm.default, (w, u, v, sigma, 0))
    for dtype in (torch.float64, torch.bfloat16):
        _, g, v = weight_pair((4, 3), 0, dtype)
        # Against finite differences bf16 has too few digits.
        tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
        args = (g, v, 0, False)
        torch.library.opcheck(torch.ops.tritonparam.weight_norm.default, args, test_utils=tests)


def test_autocast_changes_nothing(device):
    w = torch.randn(6, 5, device=device)
    link = spectral_link(w).eval()
    wlink, g, _ = weight_pair((6, 5), 1, torch.float32, device)
    want = spectral_norm(link, w), weight_norm(wlink, g, w)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = spectral_norm(link, w), weight_norm(wlink, g, w)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_every_evaluation_is_counted_once():
    w = torch.randn(4, 3, requires_grad=True)
    link, g, _ = weight_pair((4, 3), 0, torch.float32)
    for read in (
        lambda: spectral_norm(spectral_link(w), w).sum().backward(),
        lambda: spectral_norm(spectral_link(w[0]), w[0]),
        lambda: weight_norm(link, g, w).sum().backward(),
    ):
        tp.stats(reset=True)
        read()
        assert tp.stats() == {"kernel": 0, "closed": 1, "composed": 0}


def test_no_kernel_is_refused_before_the_buffers_move(monkeypatch):
    monkeypatch.setattr(tp.paths, "_HAS_TRITON", False)
    w = torch.randn(4, 3)
    link = spectral_link(w)
    before = link._u.clone()
    link._v.copy_(torch.randn(3))
    with tp.use_path("kernel"):
        with pytest.raises(RuntimeError, match=r"the kernel cannot run because .*closed"):
            spectral_norm(link, w)
        with pytest.raises(RuntimeError, match=r"the kernel cannot run because .*closed"):
            weight_norm(_WeightNorm(0), torch.ones(4, 1), w)
    assert torch.equal(link._u, before)
