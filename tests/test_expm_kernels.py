"""The exponential's kernels, launched directly, against torch in fp64."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tritonparam as tp

pytest.importorskip("triton")

from tests.cases import errors
from tests.interpreter import compute_as_a_gpu
from tests.spectra import SPECTRA, with_norm
from tritonparam.kernels import expm, expm_gemm, expm_scratch

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
ROUNDING = (expm, expm_scratch)  # gradients are stored in the dtype of w
kinds = pytest.mark.parametrize("sign", [-1, 1], ids=["skew", "symmetric"])


def argument(w, sign):
    return w.triu(1) - w.triu(1).mT if sign == -1 else w.triu() + w.triu(1).mT


def original(n, norm, sign, batch=5):
    """A batch whose argument has this spectral norm."""
    w = torch.randn(batch, n, n, dtype=torch.float64)
    size = torch.linalg.matrix_norm(argument(w, sign), 2)[:, None, None]
    return torch.where(size > 0, w * norm / size, w).float()


def reference(w, g, sign, dtype):
    """exp and dw by torch; what comes in is made small, since its size costs torch digits."""
    w = w.to(dtype).requires_grad_()
    y = torch.linalg.matrix_exp(argument(w, sign))
    (dw,) = torch.autograd.grad(y, w, g.to(dtype) * 2.0**-20)
    return y.detach().double(), dw.double() * 2.0**20


def run(w, g, sign, kernels=expm, **numbers_of_its_own):
    """exp and dw by a file of kernels, on DEVICE; the default configuration, or parts replaced."""
    w, g = w.to(DEVICE), g.to(DEVICE)
    compute = torch.promote_types(w.dtype, torch.float32)
    numbers = replace(kernels.config(w.size(-1), compute), **numbers_of_its_own)
    y, saved = kernels.expm_fwd(w, sign, numbers)
    dw = kernels.expm_bwd(g.to(compute), w, saved, sign, numbers)
    for out, dtype in ((y, compute), (dw, w.dtype if kernels in ROUNDING else compute)):
        assert out.shape == w.shape
        assert out.dtype == dtype
        assert out.is_contiguous()
    assert not dw.tril(-1).any()
    if sign == 1:
        assert torch.equal(y.nan_to_num(), y.mT.nan_to_num())
    return y.double().cpu(), dw.double().cpu()


def check(w, g, sign, kernels=expm, **numbers_of_its_own):
    """As exact as torch's in fp32, by the median of the batch: 3 times its error, and 4 eps.

    In fp64, where torch's is the reference, its error is scaled by the eps and counts twice, and 16
    eps remain. A gradient in 16 bits is rounded once, to nearest.
    """
    y, dw = reference(w, g, sign, torch.float64)
    y32, dw32 = reference(w, g, sign, torch.float32)
    eps = torch.finfo(torch.promote_types(w.dtype, torch.float32)).eps
    scale, few = (1.0, 4 * eps) if eps == EPS else (2 * eps / EPS, 16 * eps)
    got_y, got_dw = run(w, g, sign, kernels, **numbers_of_its_own)
    half = kernels in ROUNDING and w.dtype.itemsize == 2
    stored = torch.finfo(w.dtype).eps / 2 if half else 0.0
    for got, by_torch, exact, last in ((got_y, y32, y, 0.0), (got_dw, dw32, dw, stored)):
        tolerance = 3 * scale * errors(by_torch, exact).median() + few + last
        assert errors(got, exact).median() <= tolerance


@kinds
@pytest.mark.parametrize("norm", [1e-3, 0.5, 2.1, 9.0, 80.0])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 29, 32])
def test_as_exact_as_torch(n, norm, sign):
    batch = 15 if norm > 9 else 5  # errors of single matrices differ by ten there
    check(original(n, norm, sign, batch), torch.randn(batch, n, n), sign)


@pytest.mark.parametrize(
    ("kernels", "n", "norm", "batch"),
    [(expm, 7, 9.0, 5), (expm_scratch, 7, 9.0, 5), (expm_gemm, 20, 80.0, 1)],
)
def test_squarings_do_not_amplify_what_tensor_cores_truncate(kernels, n, norm, batch, monkeypatch):
    if DEVICE == "cpu" and not compute_as_a_gpu(monkeypatch):
        pytest.skip("Triton's interpreter is not as the tests know it")
    check(original(n, norm, 1, batch), torch.randn(batch, n, n), 1, kernels)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_rotations_of_any_angle_stay_orthogonal(spectrum):
    for n, norm in ((6, 300.0), (24, 1e4)):
        w = with_norm(spectrum(n), norm).triu(1).float()[None]
        y, _ = run(w, torch.randn(1, n, n), -1)
        # Squarings double what the polynomial and each product are off by.
        assert float((y.mT @ y - torch.eye(n)).abs().max()) <= norm * EPS * 4


@pytest.mark.parametrize("mean", [-3.0, -30.0, -80.0])
def test_small_eigenvalues_keep_their_digits(mean):
    # exp of a matrix near mean · I: without the shift the series would cancel all of them.
    w = original(9, 1.0, 1) + mean * torch.eye(9)
    check(w, torch.randn(5, 9, 9), 1)
    y, _ = reference(w, torch.zeros(5, 9, 9), 1, torch.float64)
    # A - mu I and mu are rounded as large as the mean is.
    assert errors(run(w, torch.zeros(5, 9, 9), 1)[0], y).max() <= EPS * (1 - mean)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs Triton's interpreter")
@pytest.mark.parametrize("kernels", ROUNDING)
def test_squarings_do_not_amplify_the_error_of_an_exponential_in_fp32(kernels, monkeypatch):
    # A GPU's is off by up to 2^-22, which three squarings make 2^-19.
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact = InterpreterBuilder.create_exp

    def rough(self, x):
        y = exact(self, x)
        off = 2**-22 if y.data.itemsize < 8 else 0
        return TensorHandle(y.data * y.data.dtype.type(1 + off), y.dtype)

    w, g = original(4, 9.0, 1, 1) - 20 * torch.eye(4), torch.randn(1, 4, 4)
    expected = run(w, g, 1, kernels)
    monkeypatch.setattr(InterpreterBuilder, "create_exp", rough)
    for x, y in zip(run(w, g, 1, kernels), expected, strict=True):
        assert torch.equal(x, y)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype, sign):
    w = original(11, 1.5, sign).to(dtype)
    check(w, torch.randn(5, 11, 11), sign)


@kinds
@pytest.mark.parametrize(("n", "matrices"), [(3, 4), (3, 8), (8, 1), (8, 2), (13, 2)])
def test_matrices_of_one_program_are_scaled_each_for_itself(n, matrices, sign):
    # Seven: the last program is not full. An error of eps is doubled by each squaring.
    norms = torch.tensor([1e-3, 40.0, 1.0, 9.0, 0.1, 20.0, 3.0])
    w = torch.cat([original(n, float(norm), sign, 1) for norm in norms])
    g = torch.randn(7, n, n)
    y, dw = reference(w, g, sign, torch.float64)
    got_y, got_dw = run(w, g, sign, matrices=matrices)
    assert (errors(got_y, y) <= 4 * EPS * (1 + norms)).all()
    assert (errors(got_dw, dw) <= 8 * EPS * (1 + norms)).all()


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_is_read_and_written_by_the_kernel(dtype, sign):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **kwargs or {})

    names = []
    w = original(11, 1.5, sign).to(DEVICE, dtype).requires_grad_()
    g = torch.randn(5, 11, 11).to(w)
    function = tp.functional.skew_exp if sign == -1 else tp.functional.symmetric_exp
    with tp.use_path("kernel"), Names():
        y = function(w)
        (dw,) = torch.autograd.grad(y, w, g)
    assert not [name for name in names if "_to_copy" in name]
    assert y.dtype == dw.dtype == dtype
    exact_y, exact_dw = run(w.detach(), g, sign)
    eps = torch.finfo(dtype).eps
    assert ((y.cpu() - exact_y).abs() <= eps * exact_y.abs()).all()
    assert torch.equal(dw.double().cpu(), exact_dw)


@kinds
def test_any_strides(sign):
    n = 13
    w, g = original(n, 1.0, sign, 2), torch.randn(2, n, n)
    check(w.mT, g.mT, sign)
    check(w[:1].expand(2, n, n), torch.ones(()).expand(2, n, n), sign)
    check(w.permute(1, 2, 0).contiguous().permute(2, 0, 1), g, sign)
    wide = torch.randn(2, n + 3, 2 * n) / 5
    check(wide[:, 2 : n + 2, 1 : n + 1], wide[:, :n, :n], sign)
    check(wide[:, :n, ::2], wide[:, 3:, 1::2], sign)


@kinds
def test_batch_dimensions(sign):
    flat, g = original(5, 1.0, sign, 6), torch.randn(6, 5, 5)
    y, dw = run(flat, g, sign)
    ys, dws = run(flat.view(2, 3, 5, 5), g.view(2, 3, 5, 5), sign)
    assert torch.equal(y, ys.view(6, 5, 5))
    assert torch.equal(dw, dws.view(6, 5, 5))
    assert torch.equal(run(flat[0], g[0], sign)[0], y[0])


@kinds
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 17, 17), (3, 0, 0)])
def test_empty(shape, sign):
    y, dw = run(torch.zeros(shape), torch.zeros(shape), sign)
    assert y.numel() == dw.numel() == 0


@kinds
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", [3, 20])
def test_nan_stays_in_its_matrix(n, bad, sign):
    w, g = original(n, 3.0, sign, 3), torch.randn(3, n, n)
    y, dw = run(w, g, sign)
    w[1, 0, n - 1] = bad
    bad_y, bad_dw = run(w, g, sign)
    assert bad_y[1].isnan().any()
    assert bad_dw[1].isnan().any()
    assert torch.equal(bad_y[::2], y[::2])
    assert torch.equal(bad_dw[::2], dw[::2])


def test_overflow_is_not_a_number_that_looks_right():
    w = torch.diag_embed(torch.tensor([[100.0, 0.0, -5.0]]))
    assert not run(w, torch.ones(1, 3, 3), 1)[0][0, 0, 0].isfinite()


@kinds
def test_what_is_below_the_diagonal_is_not_read(sign):
    w, g = original(6, 1.0, sign), torch.randn(5, 6, 6)
    below = torch.where(torch.ones(6, 6).triu(1 if sign == -1 else 0) > 0, w, torch.nan)
    for out, want in zip(run(below, g, sign), run(w, g, sign), strict=True):
        assert torch.equal(out, want)
