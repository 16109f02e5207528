"""The exponential as a sequence of products, launched directly, against torch in fp64."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import tritonparam as tp
from tests.cases import errors, through
from tests.test_expm_kernels import EPS, kinds, original, reference
from tests.test_expm_kernels import check as expm_check
from tests.test_expm_kernels import run as expm_run
from tritonparam.kernels import expm_gemm
from tritonparam.kernels.expm_gemm import ROUNDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
run = partial(expm_run, kernels=expm_gemm)
check = partial(expm_check, kernels=expm_gemm)


@kinds
@pytest.mark.parametrize(("n", "norm"), [(1, 0.5), (33, 0.5), (40, 9.0), (20, 80.0)])
def test_as_exact_as_torch(n, norm, sign):
    check(original(n, norm, sign, 1), torch.randn(1, n, n), sign)


@kinds
def test_fp64_stays_fp64(sign):
    check(original(6, 3.0, sign, 2).double(), torch.randn(2, 6, 6).double(), sign)


@kinds
def test_an_empty_batch_keeps_nothing(sign):
    w, config = torch.empty(0, 100, 100, device=DEVICE), expm_gemm.config(100, torch.float32)
    y, saved = expm_gemm.expm_fwd(w, sign, config)
    assert (y.shape, saved) == (w.shape, expm_gemm.prepare(w, sign, config)) == (w.shape, ())


@kinds
def test_each_matrix_has_its_own_squarings(sign):
    w = torch.cat([original(7, norm, sign, 1) for norm in (0.1, 30.0, 3.0)])
    g = torch.randn(3, 7, 7)
    y, dw = reference(w, g, sign, torch.float64)
    got_y, got_dw = run(w, g, sign)
    assert errors(got_y, y).max() <= 2**4 * EPS  # of the squarings at norm 30
    assert errors(got_dw, dw).max() <= 2**4 * EPS
    one_y, one_dw = run(w[1:2], g[1:2], sign)
    assert torch.equal(one_y, got_y[1:2])
    assert torch.equal(one_dw, got_dw[1:2])


def test_small_eigenvalues_keep_their_digits():
    w = original(9, 1.0, 1, 1) - 80.0 * torch.eye(9)
    check(w, torch.randn(1, 9, 9), 1)


def test_what_the_rounds_do_not_reach_is_nan():
    w = original(5, 2.0 ** (ROUNDS + 2), -1, 2)
    w[0] /= 2.0**8
    w[1, 0, 1] = 2.0 ** (ROUNDS + 2)
    y, dw = run(w, torch.randn(2, 5, 5), -1)
    assert y[0].isfinite().all()
    assert dw[0].isfinite().all()
    assert y[1].isnan().all()
    assert dw[1].triu(1)[torch.ones(5, 5).triu(1) > 0].isnan().all()


@kinds
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_matrix(bad, sign):
    w, g = original(4, 1.0, sign, 2), torch.randn(2, 4, 4)
    y, dw = run(w, g, sign)
    w[1, 0, 3] = bad
    bad_y, bad_dw = run(w, g, sign)
    assert bad_y[1].isnan().all()
    assert bad_dw[1].isnan().any()
    assert torch.equal(bad_y[0], y[0])
    assert torch.equal(bad_dw[0], dw[0])


def test_any_strides_and_16_bits():
    w, g = original(6, 1.0, -1, 2).mT, torch.randn(2, 6, 6).mT
    check(w, g, -1)
    check(w.bfloat16(), g, -1)


@kinds
@pytest.mark.parametrize("shape", [(0, 40, 40), (0, 0)])
def test_empty(shape, sign):
    y, dw = run(torch.zeros(shape), torch.zeros(shape), sign)
    assert y.numel() == dw.numel() == 0


@kinds
def test_the_op_takes_it_beyond_one_program(sign):
    function = tp.ops.expm.skew_exp if sign == -1 else tp.ops.expm.symmetric_exp
    w = original(65, 1.0, sign, 1).to(DEVICE)
    g = torch.randn(1, 65, 65, device=DEVICE)
    with tp.use_path("kernel"):
        y, dw = through(function, w, g)
    y64, dw64 = reference(w.cpu(), g.cpu(), sign, torch.float64)
    assert errors(y.cpu(), y64).max() <= 8 * EPS
    assert errors(dw.cpu(), dw64).max() <= 8 * EPS
    assert tp.stats()["kernel"] == 1
