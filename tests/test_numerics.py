"""LU that is right: large batches on several threads, and elimination without pivots."""

from __future__ import annotations

import pytest
import torch

from tests.cases import errors
from tests.spectra import SPECTRA, gaussian, with_norm, zero_diagonal_blocks
from tritonparam import numerics


@pytest.mark.parametrize("kind", SPECTRA, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("shape", "leaf"),
    [
        ((32, 48, 48), 16),
        ((40, 57, 57), 16),
        ((32, 65, 65), 16),
        ((1, 385, 385), 64),
        ((1, 512, 512), 64),
    ],
)
@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0, 30.0, 100.0, 1e3, 1e4])
def test_inverse_is_as_exact_as_a_pivoted_solve(kind, shape, leaf, norm):
    n = shape[-1]
    x = torch.stack([with_norm(kind(n), norm) for _ in range(shape[0])])
    a = (torch.eye(n) - x).float()
    ours = 2 * numerics.eliminated(a, leaf) - torch.eye(n)
    assert ours.is_contiguous()
    exact = torch.stack([2 * torch.linalg.inv(ai) - torch.eye(n) for ai in a.double()])
    solved = torch.stack([torch.linalg.solve(ai, 2 * torch.eye(n) - ai) for ai in a])
    baseline = float(errors(solved, exact).max())
    assert float(errors(ours, exact).max()) <= 3 * baseline + 4 * torch.finfo(torch.float32).eps


def test_each_way_is_taken(monkeypatch):
    calls = []
    lapack, block = numerics._lapack_inverse, numerics._block_inverse
    monkeypatch.setattr(numerics, "_lapack_inverse", lambda a: calls.append(len(a)) or lapack(a))
    x = with_norm(zero_diagonal_blocks(400), 1.0).float()
    eye = torch.eye(400)
    assert torch.equal(numerics.eliminated(eye - x, 64), block(eye - x, 64))
    assert max(calls) <= 64
    refined = numerics.eliminated(eye - 30 * x, 64)
    assert not torch.equal(refined, block(eye - 30 * x, 64))
    assert max(calls) <= 64
    numerics.eliminated(eye - 1e6 * x, 64)
    assert max(calls) == 400


@pytest.mark.parametrize(
    ("shape", "leaf"),
    [((32, 48, 48), 16), ((31, 48, 48), None), ((767, 767), None), ((768, 768), 64)],
)
def test_what_is_eliminated_in_blocks(monkeypatch, shape, leaf):
    monkeypatch.setattr(numerics, "eliminated", lambda a, leaf: leaf)
    monkeypatch.setattr(numerics, "_lapack_inverse", lambda a: None)
    assert numerics.inverse_definite(torch.empty(shape)) == leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("n", [100, 200])
def test_large_batches_on_several_threads(n, dtype):
    # Batched LU on the CPU raises or is silently wrong for n > 150 (pytorch #142815).
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    try:
        x = torch.stack([with_norm(gaussian(n), 2.0) for _ in range(4)])
        a = (torch.eye(n) - x).to(dtype)
        single = torch.stack([torch.linalg.inv(ai) for ai in a.double()])
        eps = torch.finfo(dtype).eps
        b = torch.randn(4, n, n).to(dtype)
        for inverse in (numerics.inverse_definite(a), numerics.inv_ex(a)[0]):
            assert float(errors(inverse, single).max()) <= 16 * eps
        solved = numerics.solve(a, b)
        assert float(errors(solved, single @ b.double()).max()) <= 16 * eps
    finally:
        torch.set_num_threads(before)


def test_info_of_singular_matrices():
    a = torch.eye(200).expand(3, 200, 200).clone()
    a[1, 5, 5] = 0
    assert (numerics.inv_ex(a)[1] != 0).tolist() == [False, True, False]
