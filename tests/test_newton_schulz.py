"""The Cayley map as a sequence of products, launched directly, against torch in fp64."""

import pytest
import torch
from torch.linalg import matrix_norm

pytest.importorskip("triton")

from tests.spectra import SPECTRA, gaussian, low_rank, with_norm
from tests.test_cayley_kernels import (
    BACKEND,
    DEVICE,
    NORMS,
    check,
    check_bound,
    reference,
    run,
    signs,
)
from tritonparam.kernels import newton_schulz

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CASES = [
    (n, norm, spectrum) for n in (1, 65, 100, 128, 200) for norm in NORMS for spectrum in SPECTRA
]
if DEVICE == "cpu":  # the interpreter takes one to three seconds per matrix
    CASES = [case for case in CASES if case[0] == 65]
    CASES += [(n, norm, SPECTRA[i % 4]) for n in (100,) for i, norm in enumerate(NORMS)]
    CASES += [(128, 1000.0, gaussian), (200, 10.0, gaussian), (1, 1.0, gaussian)]


def weights(n, *norms, spectrum=gaussian, dtype=torch.float32):
    return torch.stack([with_norm(spectrum(n), norm).triu(1) for norm in norms]).to(dtype)


@pytest.mark.parametrize(("n", "norm", "spectrum"), CASES)
def test_as_exact_as_the_pivoted_solve(n, norm, spectrum):
    w = weights(n, norm, spectrum=spectrum)
    check(w, signs(1, n).float(), torch.randn(1, n, n), newton_schulz)


# The last R is as large as it may be; the one before it was as rough.
@pytest.mark.parametrize("norm", [0.19, 2.3])
def test_within_the_bound_of_accuracy_in_the_arithmetic_of_a_gpu(norm, monkeypatch):
    check_bound(32, norm, monkeypatch, newton_schulz, "cuda" if DEVICE == "cpu" else BACKEND)


@pytest.mark.parametrize("norm", [0.1, 10.0, 1000.0])
def test_fp64_stays_fp64(norm):
    n = 66
    w = torch.stack([with_norm(spectrum(n), norm).triu(1) for spectrum in SPECTRA])
    check(w, signs(4, n), torch.randn(4, n, n, dtype=torch.float64), newton_schulz)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype):
    w = weights(65, 0.1, 10.0, dtype=dtype)
    check(w, signs(2, 65).to(dtype), torch.randn(2, 65, 65), newton_schulz)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_tiles(dtype):
    n = 40  # 2 x 2 tiles of the configuration that a GPU gets
    config = newton_schulz.fwd_config(n, dtype, "cuda" if BACKEND == "interpreter" else BACKEND)
    assert config.block < n
    w, d, g = weights(n, 1.0, dtype=dtype), signs(1, n).to(dtype), torch.randn(1, n, n).to(dtype)
    q, dw = reference(w, d, g, torch.float64)
    w, d, g = w.to(DEVICE), d.to(DEVICE), g.to(DEVICE)
    got_q = newton_schulz.cayley_fwd(w, d, config)
    got_dw = newton_schulz.cayley_bwd(g, got_q, d, dtype, config)
    few = 4 * torch.finfo(dtype).eps
    assert matrix_norm(got_q.cpu() - q) <= few * matrix_norm(q)
    assert matrix_norm(got_dw.cpu() - dw) <= few * matrix_norm(g.cpu())


def test_matrices_of_one_batch_do_not_share_a_schedule():
    norms = (0.0, 0.1, 9.0, 100.0, 1e6)
    w, d, g = weights(6, *norms), signs(5, 6).float(), torch.randn(5, 6, 6)
    q, dw = run(w, d, g, newton_schulz)
    for i in range(5):
        alone = run(w[i : i + 1], d[i : i + 1], g[i : i + 1], newton_schulz)
        for one, all_ in zip(alone, (q, dw), strict=True):
            assert torch.equal(one[0].nan_to_num(7.0), all_[i].nan_to_num(7.0))
    assert torch.equal(q[0], torch.diag(d[0]).double())  # of nothing, exactly
    assert q[4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", [gaussian, low_rank])
def test_beyond_the_rounds_is_nan_and_never_wrong(spectrum, dtype):
    norms = (2e3, 3e3, 4e3, 6e3, 2e4, 1e6, 1e12, 1e25)
    w = weights(8, *norms, spectrum=spectrum, dtype=dtype)
    d, g = torch.ones(8, 8, dtype=dtype), torch.ones(8, 8, 8, dtype=dtype)
    q, dw = run(w, d, g, newton_schulz)
    q64, _ = reference(w, d, g, torch.float64)
    nan = q.isnan().all(-1).all(-1)
    assert not nan[0]
    assert nan[4:].all()
    assert torch.equal(dw.isnan().any(-1).any(-1), nan)
    # What is nearly in the kernel of X turns by eps times its norm.
    few = 2 * torch.finfo(dtype).eps * torch.tensor(norms)
    assert (matrix_norm(q - q64) <= few)[~nan].all()


def test_any_strides():
    n = 6
    w, g = torch.randn(2, n, n), torch.randn(2, n, n)
    one = torch.ones(())
    check(w.mT, signs(n).float().expand(2, n), g.mT, newton_schulz)
    check(w[:1].expand(2, n, n), one.expand(2, n), one.expand(2, n, n), newton_schulz)
    check(torch.randn(n, n, 2).permute(2, 0, 1), signs(n, 2).float().T, g, newton_schulz)
    wide = torch.randn(2, n + 3, 2 * n)
    d = signs(2, 2 * n).float()
    check(wide[:, 2 : n + 2, 1 : n + 1], d[:, 1 : n + 1], wide[:, :n, :n], newton_schulz)
    check(wide[:, :n, ::2], d[:, ::2], wide[:, 3:, 1::2], newton_schulz)


def test_batch_dimensions():
    check(torch.randn(5, 5), signs(5).float(), torch.randn(5, 5), newton_schulz)
    w = torch.randn(3, 2, 9, 9).transpose(0, 1)
    check(w, signs(9).float().expand(2, 3, 9), torch.randn(2, 3, 9, 9), newton_schulz)


@pytest.mark.parametrize("shape", [(0, 70, 70), (2, 0, 70, 70), (3, 0, 0)])
def test_empty(shape):
    q, dw = run(torch.randn(shape), torch.ones(shape[:-1]), torch.randn(shape), newton_schulz)
    assert q.numel() == dw.numel() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_in_its_matrix(bad, dtype):
    n = 9
    w, g = torch.randn(3, n, n, dtype=dtype), torch.randn(3, n, n, dtype=dtype)
    d = signs(3, n).to(dtype)
    q, dw = run(w, d, g, newton_schulz)
    w[1, 0, n - 1] = bad
    bad_q, bad_dw = run(w, d, g, newton_schulz)
    assert bad_q[1].isnan().all()
    assert bad_dw[1].triu(1)[torch.ones(n, n).triu(1) > 0].isnan().all()
    assert torch.equal(bad_q[::2], q[::2])
    assert torch.equal(bad_dw[::2], dw[::2])
