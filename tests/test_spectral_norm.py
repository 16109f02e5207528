"""Spectral norm against torch's own link."""

from __future__ import annotations

import copy

import pytest
import torch

import tritonparam as tp
from tests.norms import HALVES, assert_equal_maps, assert_near, second, spectral_link, tolerance
from tritonparam.ops.spectral_norm import _divide, spectral_norm

# (shape of the weight, dim): one, odd, past a vector's width, convolutions and transposed ones.
SPECTRAL = [
    ((1, 1), 0),
    ((1, 7), 0),
    ((7, 1), 1),
    ((13, 5), 0),
    ((13, 5), 1),
    ((33, 130), -1),
    ((6, 5, 3, 3), 0),
    ((6, 5, 3, 3), 1),
    ((4, 3, 5), 2),
    ((0, 3), 0),
]
VECTORS = [((1,), 0), ((9,), 0)]


@pytest.mark.parametrize(("shape", "dim"), SPECTRAL + VECTORS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e6])
def test_spectral_norm_equals_torch(shape, dim, training, norm, device):
    w = (norm * torch.randn(shape, dtype=torch.float64, device=device)).requires_grad_()
    theirs = spectral_link(w, dim, n_power_iterations=2).train(training)
    ours = copy.deepcopy(theirs)
    assert_equal_maps(lambda w: spectral_norm(ours, w), theirs, (w,))


@pytest.mark.parametrize(("shape", "dim"), [c for c in SPECTRAL if 0 not in c[0]])
@pytest.mark.parametrize("training", [True, False])
def test_buffers_follow_torchs(shape, dim, training, device):
    w = torch.randn(shape, dtype=torch.float64, device=device)
    theirs = spectral_link(w, dim, n_power_iterations=1)
    # From the links' start after 15 iterations little would move.
    for buffer in (theirs._u, theirs._v):
        buffer.copy_(torch.nn.functional.normalize(torch.randn_like(buffer), dim=0))
    theirs.train(training)
    ours = copy.deepcopy(theirs)
    start, u = ours._u.clone(), ours._u
    for read in range(3):
        weight = w + read
        with torch.set_grad_enabled(read != 1):
            got, want = spectral_norm(ours, weight), theirs(weight)
        assert_near(got, want)
        assert_near(ours._u, theirs._u)
        assert_near(ours._v, theirs._v)
    assert ours._u is u
    if not training:
        assert torch.equal(u, start)
    elif u.numel() > 1:
        assert not torch.equal(u, start)


@pytest.mark.parametrize("training", [True, False])
def test_two_reads_before_one_backward(training, device):
    # The buffers move between the reads, and after them; each gradient takes its own u and v.
    w = torch.randn(7, 5, dtype=torch.float64, device=device, requires_grad=True)
    real, fake = torch.randn_like(w), torch.randn_like(w)
    theirs = spectral_link(w)
    for buffer in (theirs._u, theirs._v):
        buffer.copy_(torch.nn.functional.normalize(torch.randn_like(buffer), dim=0))
    ours = copy.deepcopy(theirs)

    def gradient(read, link):
        link.train(training)
        loss = (read(w) * real).sum() - (read(w) * fake).sum()
        link.train()
        read(w)
        return torch.autograd.grad(loss, w)[0]

    want = gradient(theirs, theirs)
    assert_near(gradient(lambda w: spectral_norm(ours, w), ours), want)


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((2, 3, 2), 1), ((5,), 0)])
def test_spectral_norm_gradcheck(shape, dim):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    link = spectral_link(w, dim).eval()
    assert torch.autograd.gradcheck(lambda w: spectral_norm(link, w), w)
    assert torch.autograd.gradgradcheck(lambda w: spectral_norm(link, w), w)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "dim"), [*SPECTRAL[:-1], ((9,), 0)])
def test_spectral_norm_of_halves(shape, dim, dtype, device):
    """Computed in fp32 and rounded once: half an ulp of the result, and fp32's own rounding.

    W/σ is compared with the exact quotient by the σ of the vectors before they are rounded, so
    the eval mode is the test, where the buffers are those vectors.
    """
    w = torch.randn(shape, device=device).to(dtype).requires_grad_()
    grad = torch.randn(shape, device=device).to(dtype)
    link = spectral_link(w.float(), dim).to(dtype).eval()
    exact = copy.deepcopy(link).double()
    x = w.detach().double().requires_grad_()
    got, want = spectral_norm(link, w), exact(x)
    assert got.dtype == dtype
    (dw,) = torch.autograd.grad(got, w, grad)
    (dx,) = torch.autograd.grad(want, x, grad.double())
    half_ulp = torch.finfo(dtype).eps / 2
    for y, z, size in ((got, want, want.abs()), (dw, dx, dx.abs())):
        assert y.dtype == dtype
        # Subnormals of fp16 are rounded by half of their constant spacing.
        slack = tolerance(z, torch.float32) * z.norm() + torch.finfo(dtype).tiny * half_ulp
        assert ((y.double() - z).abs() <= half_ulp * size + slack).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_buffers_follow_the_iteration(dtype, device):
    w = torch.randn(17, 9, device=device).to(dtype)
    ours = spectral_link(w.float()).to(dtype)
    theirs = copy.deepcopy(ours).double()
    spectral_norm(ours, w)
    theirs(w.double())
    half_ulp = torch.finfo(dtype).eps / 2
    for got, want in ((ours._u, theirs._u), (ours._v, theirs._v)):
        assert got.dtype == dtype
        slack = tolerance(want, torch.float32)
        assert ((got.double() - want).abs() <= half_ulp * want.abs() + slack).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2)])
def test_zero_weight_of_spectral_norm(shape, training, dtype, device):
    # torch: NaN. Value and gradient are 0; so is what a gradient penalty adds.
    w = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    link = spectral_link(torch.randn(shape, device=device)).to(dtype).train(training)
    y, dw, *rest = second(lambda w: spectral_norm(link, w), (w,))
    assert not y.any()
    assert not dw.any()
    assert not any(x.any() for x in rest)


def test_no_iterations_in_training(device):
    link = spectral_link(torch.randn(4, 3, device=device))
    link.n_power_iterations = 0
    w = torch.randn(4, 3, device=device)
    expected = spectral_norm(link.eval(), w)
    assert torch.equal(spectral_norm(link.train(), w), expected)


def test_zero_vector_is_torchs(device):
    w = torch.zeros(3, device=device, requires_grad=True)
    link = spectral_link(w)
    (got,) = torch.autograd.grad(spectral_norm(link, w).sum(), w)
    (want,) = torch.autograd.grad(link(w).sum(), w)
    assert got.isfinite().all()
    assert torch.equal(got, want)


def test_a_weight_that_sigma_misses_is_not_zeroed_silently(device):
    # After a zero weight the buffers are zero, in torch too, and so is σ: the quotient is ±inf.
    link = spectral_link(torch.zeros(2, 2, device=device))
    w = torch.tensor([[1.0, -2.0], [0.5, 3.0]], device=device)
    assert torch.equal(spectral_norm(link, w), link(w))
    assert spectral_norm(link, w).isinf().all()


def test_small_sigma_is_divided_by_as_it_is(device):
    # The smallest number that is added to σ may not change one that is merely small.
    tiny = torch.finfo(torch.float32).tiny
    w = torch.eye(3, device=device) * tiny * 8
    link = spectral_link(torch.eye(3, device=device)).eval()
    assert torch.equal(spectral_norm(link, w), link(w))


def test_gradient_penalty(device):
    x = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    theirs = spectral_link(w)
    ours = copy.deepcopy(theirs)

    def penalty(read):
        score = (x @ read(w).mT).tanh().sum()
        (dx,) = torch.autograd.grad(score, x, create_graph=True)
        return torch.autograd.grad((dx.norm(dim=1) - 1).square().sum(), w)[0]

    assert_near(penalty(lambda w: spectral_norm(ours, w)), penalty(theirs))


def test_results_are_fresh(device):
    w = torch.randn(4, 3, device=device)
    link = spectral_link(w).eval()
    y = spectral_norm(link, w)
    before = y.clone()
    link.train()
    spectral_norm(link, w + 1)
    assert torch.equal(y, before)
    sigma = torch.ones((), device=device)
    assert _divide(w, link._u, link._v, sigma, 0).data_ptr() != w.data_ptr()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_dense_layout_is_kept_as_torch_keeps_it(dim, device):
    w = torch.randn(4, 3, 5, 2, device=device, dtype=torch.float64)
    w = w.to(memory_format=torch.channels_last).requires_grad_()
    link = spectral_link(w, dim).eval()
    with tp.use_path("closed"):
        got, want = spectral_norm(link, w), link(w)
        assert got.stride() == want.stride() == w.stride()
        g = torch.randn_like(want)
        assert_near(got, want)
        assert_near(*(torch.autograd.grad(y, w, g)[0] for y in (got, want)))
        sliced = w[:, :, ::2]
        other = spectral_link(sliced, dim).eval()
        assert_near(spectral_norm(other, sliced), other(sliced))
    torch._dynamo.reset()
    run = torch.compile(lambda w: spectral_norm(link, w), fullgraph=True, backend="aot_eager")
    assert_near(run(w), want)
