"""Every chain on every path against its composed meaning in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tritonparam as tp
from tests.cases import CASES, Case, composed, error, errors, fused

FUSED = ("closed", "kernel")
chains = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
on_each_path = pytest.mark.parametrize("path", FUSED)


def runs(case: Case, path: str, n: int) -> bool:
    return path != "kernel" or n <= case.max_kernel_n


def tolerance(dtype: torch.dtype, baseline: float) -> float:
    """What an algorithm as stable as torch's own may be off by: 3 × torch's error, and rounding.

    `baseline` is the error of torch's own chain in the compute dtype on the same matrices. Where
    torch happens to be exact, four eps of the compute dtype remain; in fp64 the reference itself is
    no better, which makes it sixteen; rounding to 16 bits costs one eps of theirs.
    """
    compute = torch.promote_types(dtype, torch.float32)
    floor = (16 if compute == torch.float64 else 4) * torch.finfo(compute).eps
    return 3 * baseline + floor + (torch.finfo(dtype).eps if dtype != compute else 0.0)


@chains
@on_each_path
@pytest.mark.parametrize("dtype", tp.registry.DTYPES, ids=lambda d: str(d)[6:])
def test_values_and_gradients(case, path, dtype, device):
    compute = torch.promote_types(dtype, torch.float32)
    for shape in case.shapes:
        if not runs(case, path, shape[-1]):
            continue
        original = case.original(shape, 1.0, dtype).to(device)
        g = torch.randn(shape, device=device).to(dtype)
        y64, dw64 = composed(case, original.double(), g.double())
        y32, dw32 = composed(case, original.to(compute), g.to(compute))
        y, dw = fused(case.module(original), g, path)
        assert y.dtype == dw.dtype == dtype
        assert error(y, y64) <= tolerance(dtype, error(y32, y64)), shape
        # Relative to what comes in: a 2×2 gradient is one number, which can be near zero.
        assert error(dw, dw64, g) <= tolerance(dtype, error(dw32, dw64, g)), shape


@chains
@on_each_path
@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 32, 64, 128, 512])
@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0, 100.0, 1000.0])
def test_accuracy_up_to_large_norms(case, path, n, norm, device):
    if not runs(case, path, n):
        pytest.skip("the kernel takes smaller matrices")
    # The median over a batch: the error of a small matrix depends on how torch happens to round it.
    shape = (9 if n < 32 else 3 if n < 64 else 1, n, n)
    original = case.original(shape, norm, torch.float32).to(device)
    g = torch.randn(shape, device=device)
    y64, dw64 = composed(case, original.double(), g.double())
    y32, dw32 = composed(case, original, g)
    y, dw = fused(case.module(original), g, path)
    for x, x32, x64 in ((y, y32, y64), (dw, dw32, dw64)):
        baseline = float(errors(x32, x64).median())
        assert float(errors(x, x64).median()) <= tolerance(torch.float32, baseline)


@chains
@on_each_path
def test_noncontiguous_originals_and_gradients(case, path, device):
    base = case.original((4, 9, 9), 1.0, torch.float32).to(device)
    for view in (base.mT, base[::2], base[:, 1:, 1:], base[0].expand(3, 9, 9)):
        g = torch.randn(view.mT.shape, device=device).mT
        y64, dw64 = composed(case, view.double(), g.double())
        module = case.module(view)
        module.parametrizations.weight.original = torch.nn.Parameter(view)
        y, dw = fused(module, g, path)
        assert error(y, y64) <= 1e-6  # norm 1: 8 eps
        assert error(dw, dw64) <= 1e-6


@chains
@on_each_path
def test_zero_original(case, path, device):
    module = case.module(torch.zeros(2, 6, 6, device=device))
    y, _ = fused(module, torch.randn(2, 6, 6, device=device), path)
    assert torch.equal(y, torch.eye(6, device=device).expand(2, 6, 6))


@chains
@on_each_path
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_matrix(case, path, bad, device):
    original = case.original((3, 5, 5), 1.0, torch.float32).to(device)
    module = case.module(original)
    expected = composed(case, original.double(), torch.ones_like(original).double())[0]
    with torch.no_grad():
        module.parametrizations.weight.original[1, 0, 1] = bad
    y, _ = fused(module, torch.ones(3, 5, 5, device=device), path)
    assert y[1].isnan().any()
    assert error(y[::2], expected[::2]) <= 1e-6


@chains
def test_result_is_fresh_storage(case, device, fused_path):
    module = case.module(torch.randn(4, 4, device=device))
    first = module.weight
    kept = first.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(first, kept)
    assert tp.stats()[fused_path] >= 2


@chains
@pytest.mark.parametrize("shape", [(5, 5), (64, 64), (3, 160, 160), (33, 48, 48), (400, 400)])
def test_closed_results_are_contiguous(case, shape, device):
    # torch.compile is told so, whichever algorithm a size takes.
    original = case.original(shape, 1.0, torch.float32).to(device)
    module = case.module(original)
    module.parametrizations.weight.original = torch.nn.Parameter(original.mT)
    y, dw = fused(module, torch.randn_like(original).mT, "closed")
    assert y.is_contiguous()
    y64, dw64 = composed(case, original.mT.double(), torch.zeros_like(original).double())
    assert error(y, y64) <= 1e-6
    assert dw.shape == dw64.shape


def _as_function(case: Case, links, path: str):
    (rule,) = [rule for rule in tp.rules.RULES if rule.name == case.name]

    def function(w: Tensor) -> Tensor:
        with tp.use_path(path):
            return rule.op(links, w)

    return function


@chains
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (2, 3, 3)])
@pytest.mark.parametrize("signs", [1.0, -1.0])
def test_gradcheck_closed(case, shape, signs, device):
    module = case.module(torch.randn(shape, dtype=torch.float64, device=device))
    for link in module.parametrizations.weight:
        for buffer in link.buffers():
            buffer[..., 0] = signs
    w = module.parametrizations.weight.original.detach().clone().requires_grad_()
    function = _as_function(case, list(module.parametrizations.weight), "closed")
    assert torch.autograd.gradcheck(function, w)
    assert torch.autograd.gradgradcheck(function, w)


@chains
def test_gradcheck_kernel(case, device):
    for shape in ((3, 3), (2, 4, 4)):
        module = case.module(torch.randn(shape, dtype=torch.float64, device=device))
        w = module.parametrizations.weight.original.detach().clone().requires_grad_()
        function = _as_function(case, list(module.parametrizations.weight), "kernel")
        with tp.use_path("kernel"):  # the backward too
            assert torch.autograd.gradcheck(function, w)
            assert torch.autograd.gradgradcheck(function, w)


@chains
def test_gradient_does_not_depend_on_the_scale_of_what_comes_in(case, device):
    original = case.original((2, 12, 12), 1.0, torch.float32).to(device)
    g = torch.randn(2, 12, 12, device=device)
    for path in FUSED:
        _, dw = fused(case.module(original), g, path)
        for scale in (2.0**-20, 2.0**20):
            _, scaled = fused(case.module(original), g * scale, path)
            assert torch.equal(scaled, dw * scale)


@chains
def test_large_batches_on_several_threads(case):
    # Batched LU on the CPU is wrong here in torch (pytorch #142815).
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    try:
        original = case.original((4, 200, 200), 1.0, torch.float32)
        g = torch.randn(4, 200, 200)
        y, dw = fused(case.module(original), g, "closed")
        weight = torch.linalg.qr(torch.randn(4, 200, 200))[0]
        module = case.module(original)
        module.weight = weight
        assigned = module.weight.detach()
    finally:
        torch.set_num_threads(before)
    for i in range(4):
        y64, dw64 = composed(case, original[i].double(), g[i].double())
        assert error(y[i], y64) <= 1e-6  # norm 1: 8 eps
        assert error(dw[i], dw64) <= 2e-6  # two more products
    # The original of a random orthogonal matrix has a norm of up to 42: 40 times 4 eps.
    assert error(assigned, weight) <= 2e-5
