"""The Cayley kernels, launched directly, against torch in fp64."""

from dataclasses import replace

import pytest
import torch
from torch.linalg import matrix_norm

pytest.importorskip("triton")

from benchmarks.accuracy import allowed
from tests.interpreter import compute_as_a_gpu
from tests.spectra import SPECTRA, gaussian, log_spread, low_rank, with_norm, zero_diagonal_blocks
from tritonparam.kernels import cayley

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "interpreter" if DEVICE == "cpu" else "hip" if torch.version.hip else "cuda"
SIZES = (1, 2, 3, 5, 8, 13, 17, 29, 32, 33, 48, 60, 64)
NORMS = (0.1, 1.0, 10.0, 100.0, 1000.0)


def signs(*shape):
    return torch.randint(0, 2, shape).double() * 2 - 1


def reference(w, d, g, dtype):
    """Q and dw by torch's pivoted solve and its autograd, computed in `dtype`."""
    w = w.to(dtype).requires_grad_()
    x = w.triu(1) - w.triu(1).mT
    eye = torch.eye(w.shape[-1], dtype=dtype, device=w.device)
    q = torch.linalg.solve(eye - x, eye + x) * d.to(dtype).unsqueeze(-2)
    (dw,) = torch.autograd.grad(q, w, g.to(dtype))
    return q.detach().double(), dw.double()


def run(w, d, g, kernels=cayley, backend=BACKEND):
    """Q and dw by the kernels, on DEVICE and with the default configurations of a backend."""
    size = (w.shape[-1], w.dtype, backend)
    w, d, g = w.to(DEVICE), d.to(DEVICE), g.to(DEVICE)
    q = kernels.cayley_fwd(w, d, kernels.fwd_config(*size))
    dw = kernels.cayley_bwd(g, q, d, w.dtype, kernels.bwd_config(*size))
    for out, dtype in ((q, torch.promote_types(w.dtype, torch.float32)), (dw, w.dtype)):
        assert out.shape == w.shape
        assert out.dtype == dtype
        assert out.is_contiguous()
    assert not dw.tril().any()
    return q.double().cpu(), dw.double().cpu()


def check(w, d, g, kernels=cayley):
    """The kernels are as exact as torch's pivoted solve on the same batch, w [..., n, n].

    The tolerance is 3 times the largest error of that solve in the batch (on one matrix it may be
    zero by luck), and eps sqrt(n): n steps of elimination, each rounding every entry once. Against
    fp64 nothing is more exact, so there the solve's error in fp32 is scaled by the ratio of the
    eps, and its own error in fp64 is added. Errors of dw are relative to the matrix
    Z = D (Q + D)^T G (Q + D)^T of which it is the skew part: rounding is as large as Z, even where
    that part cancels.
    """
    compute = torch.promote_types(w.dtype, torch.float32)
    eps = torch.finfo(compute).eps
    d64, g64 = d.double(), g.double()
    q, dw = reference(w, d, g, torch.float64)
    p = q + torch.diag_embed(d64.expand(q.shape[:-1]))
    size = matrix_norm(p.mT @ g64 @ p.mT).clamp_min(1e-300)
    solve_q, solve_dw = reference(w, d, g, torch.float32)
    got_q, got_dw = run(w, d, g, kernels)
    factor = 3.0 if compute == torch.float32 else 4.0 * eps / torch.finfo(torch.float32).eps
    few = eps * w.shape[-1] ** 0.5
    tolerance = factor * (matrix_norm(solve_q - q) / matrix_norm(q)).max() + few
    assert (matrix_norm(got_q - q) / matrix_norm(q)).max() <= tolerance
    tolerance = factor * (matrix_norm(solve_dw - dw) / size).max() + few
    stored = torch.finfo(w.dtype).eps if w.dtype != compute else 0.0  # dw is rounded to w's dtype
    excess = matrix_norm(got_dw - dw) - stored * matrix_norm(dw)
    assert (excess / size).max() <= tolerance


CASES = [(n, norm, spectrum) for n in SIZES for norm in NORMS for spectrum in SPECTRA]
if DEVICE == "cpu":  # the interpreter takes up to a second per matrix, and five past n = 32
    CASES = [case for case in CASES if case[0] <= 13]
    CASES += [(n, norm, SPECTRA[i % 4]) for n in (17, 29, 32) for i, norm in enumerate(NORMS, n)]
    CASES += [(33, 1000.0, zero_diagonal_blocks), (48, 0.1, low_rank)]
    CASES += [(60, 10.0, log_spread), (64, 1000.0, gaussian)]


@pytest.mark.parametrize(("n", "norm", "spectrum"), CASES)
def test_as_exact_as_the_pivoted_solve(n, norm, spectrum):
    batch = 4 if n <= 8 else 2 if n <= 16 else 1
    w = torch.stack([with_norm(spectrum(n), norm).triu(1) for _ in range(batch)]).float()
    check(w, signs(batch, n).float(), torch.randn(batch, n, n))


def check_bound(n, norm, monkeypatch, kernels=cayley, backend=BACKEND):
    """Value, gradient and orthogonality keep the bound of accuracy in the arithmetic of a GPU."""
    if DEVICE == "cpu" and not compute_as_a_gpu(monkeypatch):
        pytest.skip("Triton's interpreter is not as the tests know it")
    batch = 16 if n <= 8 else 1  # the error of a few small matrices is what luck makes of it
    w = torch.stack([with_norm(gaussian(n), norm).triu(1) for _ in range(batch)]).float()
    d, g = torch.ones(batch, n), torch.randn(batch, n, n)
    exact, solve = reference(w, d, g, torch.float64), reference(w, d, g, w.dtype)
    got = run(w, d, g, kernels, backend)
    defects = [matrix_norm(q.mT @ q - torch.eye(n)).max() / n**0.5 for q in (solve[0], got[0])]
    assert defects[1] <= allowed(float(defects[0]))
    for x, torchs, mine in zip(exact, solve, got, strict=True):
        assert (mine - x).norm() <= allowed(float((torchs - x).norm() / x.norm())) * x.norm()


@pytest.mark.parametrize(("n", "norm"), [(5, 1000.0), (24, 1.0)])
def test_within_the_bound_of_accuracy_in_the_arithmetic_of_a_gpu(n, norm, monkeypatch):
    check_bound(n, norm, monkeypatch)


@pytest.mark.parametrize("norm", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("n", [1, 5, 17, 33])
def test_fp64_stays_fp64(n, norm):
    w = torch.stack([with_norm(spectrum(n), norm).triu(1) for spectrum in SPECTRA])
    check(w, signs(4, n), torch.randn(4, n, n, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [3, 17])
def test_low_precision_is_computed_in_fp32(n, dtype):
    w = torch.stack([with_norm(gaussian(n), norm).triu(1) for norm in (0.1, 1.0, 10.0)]).to(dtype)
    check(w, signs(3, n).to(dtype), torch.randn(3, n, n))


@pytest.mark.parametrize("n", [5, 13])
def test_any_strides(n):
    w = torch.randn(2, n, n)
    g = torch.randn(2, n, n)
    one = torch.ones(())
    check(w.mT, signs(n).float().expand(2, n), g.mT)
    check(w[:1].expand(2, n, n), one.expand(2, n), one.expand(2, n, n))
    check(torch.randn(n, n, 2).permute(2, 0, 1), signs(n, 2).float().T, g)
    wide = torch.randn(2, n + 3, 2 * n)
    check(wide[:, 2 : n + 2, 1 : n + 1], signs(2, 2 * n).float()[:, 1 : n + 1], wide[:, :n, :n])
    check(wide[:, :n, ::2], signs(2, 2 * n).float()[:, ::2], wide[:, 3:, 1::2])


@pytest.mark.parametrize(("n", "matrices"), [(3, 2), (5, 2), (8, 1), (8, 4), (13, 2)])
def test_any_number_of_matrices_to_a_program(n, matrices):
    w, d, g = torch.randn(5, n, n), signs(5, n).float(), torch.randn(5, n, n)  # the last not full
    w, d, g = w.to(DEVICE), d.to(DEVICE), g.to(DEVICE)
    config = cayley.bwd_config(n, torch.float32, BACKEND)
    q = cayley.cayley_fwd(w, d, cayley.fwd_config(n, torch.float32, BACKEND))
    dw = cayley.cayley_bwd(g, q, d, w.dtype, replace(config, block_matrices=matrices))
    p = q.double() + torch.diag_embed(d.double())
    z = d.double().unsqueeze(-1) * (p.mT @ g.double() @ p.mT)
    exact = (z - z.mT).triu(1) / 2
    assert (matrix_norm(dw.double() - exact) <= 4e-7 * matrix_norm(z)).all()


def test_batch_dimensions():
    check(torch.randn(3, 3), signs(3).float(), torch.randn(3, 3))
    check(torch.randn(2, 3, 5, 5), signs(2, 3, 5).float(), torch.randn(2, 3, 5, 5))
    w = torch.randn(3, 2, 9, 9).transpose(0, 1)
    check(w, signs(9).float().expand(2, 3, 9), torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 33, 33), (3, 0, 0)])
def test_empty(shape):
    w = torch.randn(shape)
    q, dw = run(w, w[..., 0].reshape(shape[:-1]) if shape[-1] else torch.ones(3, 0), w)
    assert q.numel() == dw.numel() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("n", "dtype"),
    [(1, torch.float32), (3, torch.float32), (16, torch.float32), (33, torch.float64)],
)
def test_nan_stays_in_its_matrix(n, bad, dtype):
    w = torch.randn(3, n, n, dtype=dtype)
    d = signs(3, n).to(dtype)
    g = torch.randn(3, n, n, dtype=dtype)
    q, dw = run(w, d, g)
    w[1, 0, n - 1] = bad
    bad_q, bad_dw = run(w, d, g)
    if n > 1:  # the diagonal is not read
        assert bad_q[1].isnan().all()
        assert bad_dw[1].triu(1)[torch.ones(n, n).triu(1) > 0].isnan().all()
    keep = [0, 2]
    assert torch.equal(bad_q[keep], q[keep])
    assert torch.equal(bad_dw[keep], dw[keep])


def test_what_is_not_above_the_diagonal_is_not_read():
    w = torch.randn(2, 6, 6)
    d = torch.ones(2, 6)
    g = torch.randn(2, 6, 6)
    expected = run(w, d, g)
    below = torch.where(torch.ones(6, 6).triu(1) > 0, w, torch.nan)
    for out, want in zip(run(below, d, g), expected, strict=True):
        assert torch.equal(out, want)
