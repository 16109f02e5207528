"""What the tests change in the interpreter: once a launch, undone after it; bf16 as on a GPU."""

import inspect
import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import compute_as_a_gpu

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels run on a GPU", allow_module_level=True)


@triton.jit
def _twice(x):
    return 2 * tl.where(x > 0, x, tl.zeros_like(x))


@triton.jit
def _kernel(x_ptr, y_ptr):
    at = tl.arange(0, 4)
    x = tl.load(x_ptr + at)
    for _ in range(8):
        x = _twice(x) / 2
    tl.store(y_ptr + at, x + tl.sum(_twice(x)))


def test_the_language_is_patched_once_a_launch(monkeypatch):
    once = interpreter._patch_lang
    if "patch" not in inspect.getclosurevars(once).nonlocals:
        pytest.skip("Triton's interpreter is not as the tests know it")
    before = {name: getattr(tl, name) for name in dir(tl)}
    tensor = {name: getattr(tl.tensor, name) for name in dir(tl.tensor)}
    scopes = []
    monkeypatch.setattr(
        interpreter, "_patch_lang", lambda fn: scopes.append(once(fn)) or scopes[-1]
    )
    x, y = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.empty(4)
    for launches in (1, 2):
        scopes.clear()
        _kernel[(1,)](x, y)
        assert torch.equal(y, x.relu() + 16)
        assert len(scopes) > 9
        real = [scope for scope in scopes if isinstance(scope, interpreter._LangPatchScope)]
        assert len(real) <= 2, launches  # of tl, and of its core for what tl itself wrote in Triton
        assert {name: getattr(tl, name) for name in before} == before
        for name, member in tensor.items():
            assert name.startswith("__") or getattr(tl.tensor, name) == member


@triton.jit
def _copy(x_ptr, y_ptr):
    at = tl.arange(0, 1024)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


def test_bf16_is_rounded_to_nearest():
    special = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("inf"), -float("inf"), 1e-39]
    x = torch.cat([torch.tensor([*special, float("nan")]), torch.randn(1015)])
    y = torch.empty(1024, dtype=torch.bfloat16)
    _copy[(1,)](x, y)
    assert torch.equal(y[:-1016].view(torch.int16), x[:-1016].bfloat16().view(torch.int16))
    assert y[8].isnan()
    assert torch.equal(y[9:], x[9:].bfloat16())


@triton.jit
def _quotients_and_products(x_ptr, y_ptr, z_ptr, PRECISION: tl.constexpr):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(z_ptr + at, x / y)
    tl.store(z_ptr + 1024 + at, tl.dot(x, y, input_precision=PRECISION))


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("ieee", 0, 3e-7), ("tf32x3", 0, 1e-6), ("tf32", 1e-4, 2e-3)]
)
def test_the_arithmetic_of_a_gpu(precision, least, most, monkeypatch):
    if not compute_as_a_gpu(monkeypatch):
        pytest.skip("Triton's interpreter is not as the tests know it")
    x, y, z = torch.randn(32, 32), torch.randn(32, 32), torch.empty(2, 32, 32)
    y[0] = 0.5
    _quotients_and_products[(1,)](x, y, z, precision)
    assert torch.equal(z[0, 0], 2 * x[0])
    ulps = (z[0].double() * y / x - 1).abs().max() * 2**23
    assert 1 < ulps <= 2.5  # 2 from the nearest
    exact = x.double() @ y.double()
    assert least <= (z[1] - exact).norm() / exact.norm() <= most
    lost = ((exact - z[1]) * exact.sign()).mean() / exact.abs().mean()
    assert (lost > 4e-8) == (precision != "ieee")  # truncated sums are too small
