"""Every launch as Triton makes it and as `launch` does, recorded by a driver that launches nothing.

A program of its own, ``python -m tests.launching``: it needs Triton without its interpreter. What
is compiled is a stand-in; which one is taken, and with what it is called, is Triton's own code.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from tritonparam.kernels import launch as launches
from tritonparam.kernels import power_iteration, slices
from tritonparam.kernels.aot import MODULES
from tritonparam.kernels.launch import launch

calls: list[tuple] = []
state = SimpleNamespace(device=0, stream=7)


class Compiled(CompiledKernel):
    """What Triton would have compiled, with a launcher that records."""

    def __init__(self, src, target=None, options=None):
        self.src, self.options, self.name = src, options, "stand-in"
        self.module, self.function, self.packed_metadata = None, object(), object()
        self._run = lambda *args: calls.append((self, args))

    def _init_handles(self):
        pass


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return state.device

    def get_current_stream(self, device):
        return (device, state.stream)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["y_ptr"])
def kernel(x_ptr, y_ptr, z_ptr, n, m, A: tl.constexpr, B: tl.constexpr = 2):
    pass


@triton.jit
def grouped_kernel(x_ptrs, y_ptr, sizes, A: tl.constexpr):
    pass


def recorded(step) -> tuple:
    calls.clear()
    step()
    (call,) = calls
    return call


def plain(x):
    """Itself; what a profiler is told of a launch as a dictionary."""
    return vars(x) if hasattr(x, "extras") else x


def same(grid, *args, kernel=kernel, **options) -> None:
    """Triton's launch and ours, new and known, take one compiled kernel with one list of values."""
    theirs, theirs_with = recorded(lambda: kernel[grid](*args, **options))
    for _ in range(2):
        ours, ours_with = recorded(lambda: launch(kernel, grid, *args, **options))
        assert ours is theirs, (args, options)
        assert len(ours_with) == len(theirs_with)
        for mine, other in zip(ours_with, theirs_with, strict=True):
            assert mine is other or (type(mine) is type(other) and plain(mine) == plain(other))


def some_tensor(rng: random.Random) -> torch.Tensor:
    dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16, torch.int32))
    return torch.empty(64, dtype=dtype)[rng.choice((0, 0, 1, 4)) :]


def main() -> None:
    rng = random.Random(0)
    sizes = (0, 1, -1, 2, 15, 16, 17, 32, 2**31 - 1, 2**31, -(2**31) - 1, 2**35, 2**63)
    for i in range(1500):
        x, y, z = (rng.choice((some_tensor(rng), None)) for _ in range(3))
        options = {"A": rng.choice((1, 2, "text", tl.float32, (1.0, 2.0))), "num_warps": 4}
        if rng.random() < 0.3:
            options["B"] = rng.choice((2, 3))
        if rng.random() < 0.3:
            options["num_stages"] = rng.choice((1, 2))
        state.device, state.stream = rng.choice((0, 1)), rng.choice((7, 8))
        triton.knobs.runtime.debug = i % 10 == 0
        grid = (rng.randrange(1, 5),) * rng.choice((1, 2, 3))
        same(grid, x, y, z, rng.choice(sizes), rng.choice(sizes), **options)
    distinct = {key[:6] for key in launches._compiled}
    assert len(distinct) == 4, distinct  # two devices, with and without debug
    for _ in range(300):
        n = rng.choice((1, 4, 16))
        xs = tuple(torch.empty(64)[rng.choice((0, 0, 0, 1)) :] for _ in range(n))
        numbers = tuple(rng.choice((0, 1, 16, 17, 2**31, 2**35)) for _ in range(7 * n))
        same((3,), xs, torch.empty(4), numbers, A=rng.choice((1, 2)), kernel=grouped_kernel)
    launches._compiled.clear()
    launches._MOST = 1
    same((1,), x, y, z, 5, 6, A=1)
    same((1,), x, y, z, 5, 7, A=1)
    assert len(launches._compiled) == 1

    kernel.add_pre_run_hook(lambda *args, **options: None)
    launches._compiled.clear()
    same((1,), x, y, z, 5, 6, A=1)
    assert not launches._compiled  # it would not see the launch

    def is_constant(p) -> int:
        return p.is_constexpr

    for file in (*MODULES, power_iteration, slices):
        for function in (f for f in vars(file).values() if isinstance(f, triton.JITFunction)):
            if function.__name__.endswith("_kernel"):
                assert function.params == sorted(function.params, key=is_constant), function


if __name__ == "__main__":
    driver.set_active(Driver())
    triton.compiler.compile = Compiled
    main()
