"""The exponential with its tiles in memory, launched directly, against torch in fp64."""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import tritonparam as tp
from tests.cases import errors, through
from tests.spectra import gaussian, with_norm
from tests.test_expm_kernels import EPS, kinds, original, reference
from tests.test_expm_kernels import check as expm_check
from tests.test_expm_kernels import run as expm_run
from tritonparam.kernels import expm_scratch

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a CPU each product is taken whole: the interpreter's time is that of its operations.
WHOLE = {} if DEVICE == "cuda" else {"block_k": 64}
run = partial(expm_run, kernels=expm_scratch, **WHOLE)
check = partial(expm_check, kernels=expm_scratch, **WHOLE)


@kinds
@pytest.mark.parametrize(("n", "norm"), [(33, 1e-3), (64, 9.0)])
def test_as_exact_as_torch(n, norm, sign):
    check(original(n, norm, sign, 1), torch.randn(1, n, n), sign)


def test_sums_in_slices():
    expm_check(original(35, 1.0, -1, 1), torch.randn(1, 35, 35), -1, expm_scratch)


@kinds
def test_fp64_stays_fp64(sign):
    w, g = original(20, 9.0, sign, 1).double(), torch.randn(1, 20, 20, dtype=torch.float64)
    expm_check(w, g, sign, expm_scratch, block_k=32)


def test_small_eigenvalues_keep_their_digits():
    check(original(33, 1.0, 1, 1) - 80.0 * torch.eye(33), torch.randn(1, 33, 33), 1)


def test_any_strides_and_16_bits():
    wide, g = torch.randn(1, 38, 70) / 20, torch.randn(1, 35, 70)[:, :, ::2]
    check(wide[:, 2:37, ::2].bfloat16(), g.mT, -1)


@kinds
def test_each_matrix_has_its_own_scale_and_its_own_nan(sign):
    w = torch.cat([original(33, norm, sign, 1) for norm in (1.0, 5.0, 0.0)])
    w[0, 0, 32] = torch.inf
    g = torch.randn(3, 33, 33)
    y, dw = run(w, g, sign)
    y64, dw64 = reference(w[1:], g[1:], sign, torch.float64)
    assert errors(y[1:], y64).max() <= 2**4 * EPS
    assert errors(dw[1:], dw64).max() <= 2**4 * EPS
    assert torch.equal(y[2], torch.eye(33, dtype=torch.float64))
    assert y[0].isnan().all()
    assert dw[0].isnan().any()


def test_a_rotation_of_any_angle_stays_orthogonal():
    norm = 1e4
    w = with_norm(gaussian(36), norm).triu(1).float()[None]
    numbers = replace(expm_scratch.config(36, torch.float32), **WHOLE)
    y = expm_scratch.expm_fwd(w.to(DEVICE), -1, numbers)[0].double().cpu()
    assert float((y.mT @ y - torch.eye(36)).abs().max()) <= norm * EPS * 4


def test_what_no_power_of_two_brings_to_norm_1_is_nan():
    w = torch.tensor([[[0.0, 1e39], [torch.nan, 0.0]]], dtype=torch.float64)
    y, dw = expm_run(w, torch.ones(1, 2, 2), -1, expm_scratch, block_k=16)
    assert y.isnan().all()
    assert dw[0, 0, 1].isnan()


@kinds
@pytest.mark.parametrize("shape", [(0, 40, 40), (2, 0, 0)])
def test_empty(shape, sign):
    y, dw = run(torch.zeros(shape), torch.zeros(shape), sign)
    assert y.numel() == dw.numel() == 0


def test_the_op_takes_it_up_to_64():
    w = original(34, 1.0, 1, 1).to(DEVICE, torch.bfloat16)
    g = torch.randn(1, 34, 34, device=DEVICE).bfloat16()
    with tp.use_path("kernel"):
        y, dw = through(tp.ops.expm.symmetric_exp, w, g)
    y64, dw64 = reference(w.cpu(), g.cpu(), 1, torch.float64)
    half_ulp = torch.finfo(torch.bfloat16).eps / 2  # of one rounding
    assert errors(y.cpu(), y64).max() <= half_ulp
    assert errors(dw.cpu(), dw64).max() <= half_ulp
    assert tp.stats()["kernel"] == 1
