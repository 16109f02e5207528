"""Every chain on every path against its composed meaning in fp64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

import tritonparam as tp
from tests.cases import CASES, Case, composed, error, errors, fused

chains = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
on_each_path = pytest.mark.parametrize(
    ("case", "path"),
    [pytest.param(case, path, id=f"{case.name}-{path}") for case in CASES for path in case.paths],
)
with_kernel = pytest.mark.parametrize(
    "case", [case for case in CASES if case.max_kernel_n], ids=lambda case: case.name
)


def tolerance(dtype: torch.dtype, baseline: float, size: float = 1.0) -> float:
    """What an algorithm as stable as torch's own may be off by: 3 × torch's error, and rounding.

    `baseline` is the error of torch's own chain in fp32 on the same matrices; in fp64, where
    torch's chain is the reference, its error is taken to shrink with eps, and counts twice. Where
    torch happens to be exact, four eps of the compute dtype remain, in fp64 sixteen; rounding to
    16 bits costs one eps of theirs, of what is rounded: `size` is how large that is on the scale
    of the error.
    """
    compute = torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(compute).eps
    floor = (16 if compute == torch.float64 else 4) * eps
    scale = eps / torch.finfo(torch.float32).eps * (2 if compute == torch.float64 else 1)
    return (
        3 * baseline * scale + floor + (size * torch.finfo(dtype).eps if dtype != compute else 0.0)
    )


@on_each_path
@pytest.mark.parametrize("dtype", tp.registry.DTYPES, ids=lambda d: str(d)[6:])
def test_values_and_gradients(case, path, dtype, device):
    for shape in case.shapes:
        if not case.runs(path, shape[-1], dtype):
            continue
        original = case.original(shape, 1.0, dtype).to(device)
        g = torch.randn(shape, device=device).to(dtype)
        module = case.module(original)
        y64, dw64 = composed(module, g)
        y32, dw32 = composed(module, g, torch.float32)
        y, dw = fused(module, g, path)
        assert y.dtype == dw.dtype == dtype
        assert error(y, y64) <= tolerance(dtype, error(y32, y64)), shape
        # Relative to what comes in: a 2×2 gradient is one number, which can be near zero.
        size = max(error(torch.zeros_like(dw64), dw64, g), 1.0)
        assert error(dw, dw64, g) <= tolerance(dtype, error(dw32, dw64, g), size), shape


@on_each_path
@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 32, 64, 128])
@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0, 100.0, 1000.0])
def test_accuracy_up_to_large_norms(case, path, n, norm, device):
    if not case.runs(path, n):
        pytest.skip("the kernel takes smaller matrices")
    # The median over a batch: the error of a small matrix depends on how torch happens to round it.
    batch = 9 if n < 32 else 3 if n < 64 else 1
    shape = case.shape(n, batch)
    original = case.original(shape, norm, torch.float32).to(device)
    g = torch.randn(shape, device=device)
    module = case.module(original)
    y64, dw64 = composed(module, g)
    y32, dw32 = composed(module, g, torch.float32)
    y, dw = fused(module, g, path)
    for x, x32, x64 in ((y, y32, y64), (dw, dw32, dw64)):
        baseline = float(errors(x32, x64).median())
        assert float(errors(x, x64).median()) <= tolerance(torch.float32, baseline)


@on_each_path
def test_noncontiguous_originals_and_gradients(case, path, device):
    for view in _views(case, device):
        g = torch.randn(view.mT.shape, device=device).mT
        module = case.module(view)
        plist = module.parametrizations.weight
        if plist.is_tensor:
            plist.original = torch.nn.Parameter(view)
        y64, dw64 = composed(module, g)
        y, dw = fused(module, g, path)
        assert error(y, y64) <= 1e-6  # norm 1: 8 eps
        assert error(dw, dw64, g) <= 1e-6


def _views(case: Case, device: str) -> list[Tensor]:
    """A transposed, a strided, a shifted and an expanded original of norm 1, or of less."""
    if case.form == "layer":
        rows, cols = case.shape(9)
        base = case.original((rows + 1, cols + 1), 1.0, torch.float32).to(device)
        wide = case.original((cols, rows), 1.0, torch.float32).to(device)
        return [base[1:, 1:], wide.mT, base[::2]]
    rows, cols = case.shape(8)
    base = case.original((4, rows + 1, cols + 1), 1.0, torch.float32).to(device)
    wide = case.original((4, cols, rows), 1.0, torch.float32) if case.form == "square" else None
    views = [base[:, 1:, 1:], base[::2, 1:, 1:], base[0, 1:, 1:].expand(3, rows, cols)]
    return views if wide is None else [*views, wide.to(device).mT]


@on_each_path
def test_zero_original(case, path, device):
    shape = case.shape(6, 2)
    module = case.module(torch.zeros(shape, device=device))
    y, dw = fused(module, torch.randn(shape, device=device), path)
    assert dw.isfinite().all()
    if case.form == "layer":
        assert torch.equal(y, torch.zeros_like(y))
        return
    expected = torch.zeros_like(y)
    expected.diagonal(dim1=-2, dim2=-1).fill_(1)
    if case.name == "householder":
        expected = -expected  # reflections along the axes
    if case.base:
        y64, _ = composed(module, y)
        assert error(y, y64) <= 1e-6
        expected = y.mT @ y
        y = torch.eye(6, device=device).expand_as(expected)
    assert torch.allclose(y, expected, rtol=0, atol=1e-6 if case.base else 0)


@on_each_path
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_matrix(case, path, bad, device):
    if case.form == "layer":
        pytest.skip("no batches")
    shape = case.shape(5, 3)
    original = case.original(shape, 1.0, torch.float32).to(device)
    module = case.module(original)
    expected = composed(module, torch.ones_like(original))[0]
    with torch.no_grad():
        entry = (0, 1) if case.form == "square" else (1, 0)
        module.parametrizations.weight.original[(1, *entry)] = bad
    y, _ = fused(module, torch.ones(shape, device=device), path)
    assert y[1].isnan().any()
    assert error(y[::2], expected[::2]) <= 1e-6


@chains
def test_result_is_fresh_storage(case, device):
    module = case.module(torch.randn(case.shape(4), device=device))
    first = module.weight
    kept = first.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(first, kept)
    assert tp.stats()["composed"] == 0


@chains
@pytest.mark.parametrize("size", [(5,), (64,), (3, 160), (33, 48), (400,)], ids=str)
def test_closed_results_are_contiguous(case, size, device):
    # torch.compile is told so, whichever algorithm a size takes.
    shape = case.shape(size[-1], *size[:-1])
    original = case.original(shape, 1.0, torch.float32).to(device)
    module = case.module(original)
    if case.form == "square":
        module.parametrizations.weight.original = torch.nn.Parameter(original.mT)
    y, dw = fused(module, torch.randn(shape[:-2] + shape[:-3:-1], device=device).mT, "closed")
    assert y.is_contiguous()
    with torch.no_grad(), tp.use_path("composed"):
        y64, y32 = (deepcopy(module).to(dtype).weight for dtype in (torch.float64, torch.float32))
    assert error(y, y64) <= tolerance(torch.float32, error(y32, y64))
    assert dw.numel() == sum(x.numel() for x in module.parametrizations.weight.parameters())


def _as_function(case: Case, module, path: str):
    links = list(module.parametrizations.weight)

    def function(*originals: Tensor) -> Tensor:
        with tp.use_path(path):
            return tp.registry.evaluate(tp.rules.RULES, links, *originals)

    return function


def _double_originals(case: Case, shape, device) -> tuple[torch.nn.Module, list[Tensor]]:
    module = case.module(torch.randn(shape, dtype=torch.float64, device=device))
    parameters = module.parametrizations.weight.parameters()
    return module, [x.detach().clone().requires_grad_() for x in parameters]


@chains
@pytest.mark.parametrize("size", [(1,), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("signs", [1.0, -1.0])
def test_gradcheck_closed(case, size, signs, device):
    if signs < 0 and case.name != "cayley":
        pytest.skip("no signature")
    module, xs = _double_originals(case, case.shape(size[-1], *size[:-1]), device)
    if case.name == "cayley":
        module.parametrizations.weight[1].signature[..., 0] = signs
    function = _as_function(case, module, "closed")
    assert torch.autograd.gradcheck(function, xs)
    assert torch.autograd.gradgradcheck(function, xs)
    assert tp.stats()["composed"] == 0


@with_kernel
def test_gradcheck_kernel(case, device):
    if torch.float64 not in case.kernel_dtypes:
        pytest.skip("the kernel does not compute in fp64 here")
    # Finite differences of few entries: the interpreter takes 20 to 50 ms per evaluation.
    sizes = ((1,), (2,)) if case.form == "layer" else ((3,), (4, 2))
    for size in sizes:
        module, xs = _double_originals(case, case.shape(*size), device)
        function = _as_function(case, module, "kernel")
        with tp.use_path("kernel"):  # the backward too
            assert torch.autograd.gradcheck(function, xs)
            assert torch.autograd.gradgradcheck(function, xs)


@on_each_path
def test_gradient_does_not_depend_on_the_scale_of_what_comes_in(case, path, device):
    shape = case.shape(12, 2)
    module = case.module(case.original(shape, 1.0, torch.float32).to(device))
    g = torch.randn(shape, device=device)
    _, dw = fused(module, g, path)
    for scale in (2.0**-20, 2.0**20):
        _, scaled = fused(module, g * scale, path)
        assert torch.equal(scaled, dw * scale)


@chains
def test_large_batches_on_several_threads(case):
    # Batched LU on the CPU is wrong here in torch (pytorch #142815).
    if case.form == "layer":
        pytest.skip("no batches")
    shape = case.shape(200, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    try:
        module = case.module(case.original(shape, 1.0, torch.float32))
        g = torch.randn(shape)
        y, dw = fused(module, g, "closed")
        y64, dw64 = composed(module, g)
    finally:
        torch.set_num_threads(before)
    assert error(y, y64) <= 1e-6  # norm 1: 8 eps
    assert error(dw, dw64) <= 2e-6  # two more products


def test_large_batches_can_be_assigned():
    case = CASES[0]
    weight = torch.linalg.qr(torch.randn(4, 200, 200))[0]
    module = case.module(torch.zeros(4, 200, 200))
    module.weight = weight
    # The original of a random orthogonal matrix has a norm of up to 42: 40 times 4 eps.
    assert error(module.weight.detach(), weight) <= 2e-5
