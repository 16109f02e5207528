"""Every launch of every map by its default configuration, compiled as Triton specializes it.

A program of its own, which needs no GPU and for each target half an hour, most of it for norms:
``python -m tests.every_launch``, or with some targets and kinds of maps, ``python -m
tests.every_launch sm_90 small``. Launchers run on the CPU, by a driver that launches nothing, so
that what is compiled has the types, alignments, sizes and constants of real launches.
``tests/test_aot.py`` compiles a choice in every run.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime import driver

from tritonparam import info
from tritonparam.kernels import (
    aot,
    cayley,
    expm,
    expm_gemm,
    expm_scratch,
    householder,
    newton_schulz,
    spectral_norm,
    tall_cayley,
    tall_expm,
    weight_norm,
)
from tritonparam.kernels.launch import compute_dtype

HALVES = (torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)
LARGE = (128, 100, 512, 500)  # of products: by tiles of 32 and 64, of sizes 16 divides or not
KS = (8, 16, 20, 50, 64)
# [before, n, after] in every tile that a norm may take.
SHAPES = [(1, 64, n) for n in (27, 64, 500, 512, 4096, 8191, 16384, 32767, 32768)]
SHAPES += [(1, 1, 500), (1, 1, 8192), (1, 1, 32768), (27, 64, 1), (27, 50, 1), (128, 64, 1)]
SHAPES += [(128, 50, 1), (8, 64, 9), (64, 64, 9), (4096, 64, 16), (64, 4, 9)]


def small(backend: str) -> Iterator[Callable]:
    """Maps of one program for each matrix."""
    for n, dtype in itertools.product((4, 8, 16, 32, 64), (*HALVES, *WIDE)):
        numbers = (n, dtype, backend)
        w, d = torch.empty(64, n, n, dtype=dtype), torch.empty(64, n, dtype=dtype)
        q = w.to(compute_dtype(dtype))
        yield partial(cayley.cayley_fwd, w, d, cayley.fwd_config(*numbers))
        yield partial(cayley.cayley_bwd, q, q, d, dtype, cayley.bwd_config(*numbers))
        kernels: Any = expm_scratch if n > 32 or dtype == torch.float64 else expm
        fwd, bwd = (kernels.candidates(phase, n, q.dtype, backend)[0] for phase in ("fwd", "bwd"))
        for sign, x in itertools.product((-1, 1), (q, w) if dtype in HALVES else (w,)):
            yield partial(kernels.expm_fwd, w, sign, fwd, x.dtype)
            yield partial(kernels.expm_bwd, x, w, (), sign, bwd)


def large(backend: str) -> Iterator[Callable]:
    """Sequences of products."""
    for n, dtype in itertools.product(LARGE, (*HALVES, *WIDE)):
        w, d = torch.empty(2, n, n, dtype=dtype), torch.empty(2, n, dtype=dtype)
        q = w.to(compute_dtype(dtype))
        config = newton_schulz.fwd_config(n, q.dtype, backend)
        yield partial(newton_schulz.cayley_fwd, w, d, config)
        yield partial(newton_schulz.cayley_bwd, q, q, d, dtype, config)
        for sign in (-1, 1):
            yield partial(_expm_gemm, w, q, sign, config)


def _expm_gemm(w, q, sign, config) -> None:
    saved = expm_gemm.expm_fwd(w, sign, config)[1]
    expm_gemm.expm_bwd(q, w, saved, sign, config)


def tall(backend: str) -> Iterator[Callable]:
    """Tall maps, which compute 16 bits as fp32."""
    for k, dtype, based in itertools.product(KS, WIDE, (False, True)):
        config = tall_cayley.candidates("fwd", k, dtype, backend)[0]
        for n in (1024, 1000):  # of rows, which 16 divides or not
            x = torch.empty(2, n, k, dtype=dtype)
            for file, *numbers in ((householder,), (tall_cayley, 0.5), (tall_expm,)):
                yield partial(_tall, file, x, x if based else None, numbers, config)


def _tall(file, x, base, numbers, config) -> None:
    name = file.__name__.rpartition(".")[2]
    y, saved = getattr(file, f"{name}_fwd")(x, base, *numbers, config)
    getattr(file, f"{name}_bwd")(y, x, base, saved, *numbers, config)


def norms(backend: str) -> Iterator[Callable]:
    """Spectral and weight norm of one tensor in every tile, and of groups."""
    for shape, dtype in itertools.product(SHAPES, (*HALVES, *WIDE)):
        for length in (1, 16):
            yield partial(_norms, shape, dtype, length)


def _norms(shape, dtype, length) -> None:
    before, n, after = shape
    config, compute = weight_norm.default_config(dtype), compute_dtype(dtype)
    vs = [torch.empty(shape, dtype=dtype) for _ in range(length)]
    gs = [torch.empty(n, dtype=dtype) for _ in vs]
    norms = [torch.empty(n, dtype=compute) for _ in vs]
    weight_norm.weight_norm_fwd(gs, vs, dtype, config)
    weight_norm.weight_norm_bwd(vs, gs, vs, norms, config)
    others = [torch.empty(before * after, dtype=dtype) for _ in vs]
    for steps in (0, 1, 2):
        found = spectral_norm.spectral_norm_fwd(vs, gs, others, steps, 1e-12, dtype, config)
    _, us, others, sigmas = zip(*found, strict=True)
    spectral_norm.spectral_norm_bwd(vs, vs, us, others, sigmas, config)


KINDS = (small, large, tall, norms)


class _Driver:
    """Of a target that is the name of its only device; launches nothing."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self):
        return aot.gpu_target(self.target)

    def get_current_device(self):
        return self.target

    def get_current_stream(self, device):
        return 0


class _Nothing:
    """A compiled kernel that is launched in vain."""

    function = packed_metadata = None

    def launch_metadata(self, *args) -> None:
        pass

    run = launch_metadata


def launches(target: str, kinds: Iterable[Callable] = KINDS) -> list[tuple]:
    """What Triton would compile for the launches of these kinds, each once: (source, options)."""
    found: dict[str, tuple] = {}

    def record(src, target, options, **_):
        found.setdefault(f"{src.hash()} {sorted(options.items())}", (src, options))
        return _Nothing()

    compile_, triton.compiler.compile = triton.compiler.compile, record
    driver.set_active(_Driver(target))
    try:
        for step in itertools.chain(*(kind(aot.gpu_target(target).backend) for kind in kinds)):
            step()
    finally:
        triton.compiler.compile = compile_
    return list(found.values())


def compiled(launch: tuple, target: str) -> aot.Resources:
    """What one of them uses; its name has the types of tensors and the constants."""
    src, options = launch
    types = sorted({str(kind) for kind in src.signature.values()} - {"constexpr", "i32"})
    values = [f"{src.fn.arg_names[at[0]]}={value}" for at, value in src.constants.items()]
    few = [value for value in values if len(value) < 30]
    name = " ".join((src.fn.__name__, *types, *few, f"num_warps={options['num_warps']}"))
    return aot.resources(name, triton.compile(src, aot.gpu_target(target), options), target)


def main(arguments: list[str]) -> int:
    """Compiles, prints what spills or takes too much shared memory, and counts that."""
    known = [*aot.TARGETS, *(kind.__name__ for kind in KINDS)]
    if unknown := set(arguments) - {*known}:
        sys.exit(f"every_launch: takes some of {', '.join(known)}, got {', '.join(unknown)}")
    kinds = [kind for kind in KINDS if kind.__name__ in arguments] or KINDS
    bad = 0
    for target in [target for target in aot.TARGETS if target in arguments] or aot.TARGETS:
        with info.compilers() as pool:
            found = list(pool.map(partial(compiled, target=target), launches(target, kinds)))
        for used in found:
            if used.stack or used.shared > aot.SHARED_LIMIT[target]:
                bad += 1
                print(used)
        most = max(used.regs for used in found)
        print(f"{target}, triton {triton.__version__}: {len(found)} kernels, {most} registers")
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
