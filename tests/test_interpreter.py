"""What the tests change in the interpreter: once a launch, undone after it; bf16 as on a GPU."""

import inspect
import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

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
