"""Spectral norm and weight norm against torch's own links."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm

import tritonparam as tp
from tritonparam.ops.spectral_norm import _divide, spectral_norm
from tritonparam.ops.weight_norm import norm_shape, weight_norm

HALVES = [torch.float16, torch.bfloat16]

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


@pytest.mark.parametrize(("shape", "dim"), SPECTRAL + VECTORS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e6])
def test_spectral_norm_equals_torch(shape, dim, training, norm, device):
    w = (norm * torch.randn(shape, dtype=torch.float64, device=device)).requires_grad_()
    theirs = spectral_link(w, dim, n_power_iterations=2).train(training)
    ours = copy.deepcopy(theirs)
    assert_equal_maps(lambda w: spectral_norm(ours, w), theirs, (w,))


@pytest.mark.parametrize(("shape", "dim"), WEIGHT)
@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e6])
def test_weight_norm_equals_torch(shape, dim, norm, device):
    link, g, v = weight_pair(shape, dim, device=device)
    v = (norm * v).detach().requires_grad_()
    assert_equal_maps(lambda g, v: weight_norm(link, g, v), composed(link), (g, v))


def composed(link):
    """The formula in elementary operators: second derivatives of torch's own link are wrong.

    On the CPU, for the first and the last dimension, torch 2.13 fails gradgradcheck.
    """

    def forward(g, v):
        dims = [i for i in range(v.dim()) if link.dim == -1 or i != link.dim % v.dim()]
        square = v.square().sum(dims, keepdim=link.dim != -1) if dims else v.square()
        return v * (g / square.sqrt())

    return forward


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


@pytest.mark.parametrize(
    ("shape", "dim"), [((4, 3), 0), ((4, 3), 1), ((4, 3), None), ((2, 3, 2), 1)]
)
def test_weight_norm_gradcheck(shape, dim):
    link, g, v = weight_pair(shape, dim)
    assert torch.autograd.gradcheck(lambda g, v: weight_norm(link, g, v), (g, v))
    assert torch.autograd.gradgradcheck(lambda g, v: weight_norm(link, g, v), (g, v))


@pytest.mark.parametrize("only", [0, 1])
def test_weight_norm_of_one_parameter(only, device):
    link, g, v = weight_pair((5, 4), 0, device=device)
    x = (g, v)[only]
    (g, v)[1 - only].requires_grad_(False)
    (got,) = torch.autograd.grad(weight_norm(link, g, v).sin().sum(), x)
    (want,) = torch.autograd.grad(composed(link)(g, v).sin().sum(), x)
    assert_near(got, want)


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
            assert spectral_norm(ours, x).is_contiguous()
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
    monkeypatch.setattr(tp.registry, "_HAS_TRITON", False)
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
