"""Compiling kernels ahead of time for a named GPU, present or not, and reading what they use."""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritonparam.kernels import (
    cayley,
    elimination,
    expm,
    expm_gemm,
    expm_scratch,
    gemm,
    mirror,
    newton_schulz,
    spectral_norm,
    tall_blocks,
    tall_combine,
    tall_gram,
    tall_tile,
    taylor,
    weight_norm,
)

# Every file of kernels that has some of its own.
MODULES = (
    *(cayley, newton_schulz, expm, expm_gemm, gemm, mirror, spectral_norm, weight_norm),
    *(expm_scratch, tall_gram, tall_combine, elimination, taylor, tall_blocks, tall_tile),
)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Shared memory one program may use, CUDA C++ Programming Guide, table of technical
# specifications (163 KiB on 8.0, 227 KiB on 9.0 and 10.0); LDS of a CDNA 3 compute unit.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses: registers and bytes of stack per thread, bytes of shared
    memory per program. On gfx942 these are vector registers, scratch and LDS."""

    name: str
    target: str
    regs: int
    stack: int
    shared: int


@cache
def require_target(target: str) -> None:
    """Raise ValueError where Triton does not compile for a target, or it is not named like one.

    What the project does not support is tried in a process of its own: LLVM ends the process
    where it does not know a GPU.
    """
    gpu_target(target)
    if target in TARGETS:
        return
    code = f"from {__name__} import *; compile_kernel(*shipped({target!r})[0], {target!r})"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    if subprocess.run(command, env=environment, capture_output=True).returncode:
        raise ValueError(
            f"aot: target must be a GPU that Triton {triton.__version__} compiles for, as "
            f"{', '.join(TARGETS)}, got {target!r}, on which its compiler gives up"
        )


def shipped(target: str) -> list[tuple]:
    """Every shipped configuration for `target`, for example "sm_90": what `compile_kernel` takes.

    Raises ValueError where the target is not named like one.
    """
    backend = gpu_target(target).backend
    return [row for module in MODULES for row in module.shipped(backend)]


def compile_kernel(name: str, kernel, types: dict, options: dict, target: str) -> Resources:
    """Compile one @triton.jit function; `options` holds its constants and the launch options.

    `types` names the pointers' types, for example {"w_ptr": "*fp32"}; other arguments are i32. A
    tuple of types is one argument, whose members are multiples of 16. Tensors are taken to be
    aligned and below 2 GiB, as new ones are, where Triton asks: it changes what they compile to.
    """
    constants = {key: value for key, value in options.items() if key in kernel.arg_names}
    defaults = {p.name: p.default for p in kernel.params if p.has_default}
    constants = {**defaults, **constants}
    signature = dict.fromkeys(kernel.arg_names, "i32") | types
    signature |= dict.fromkeys(constants, "constexpr")
    gpu = gpu_target(target)
    attrs: dict[tuple, list] = {}
    for i, parameter in enumerate(kernel.params):
        kind = signature[parameter.name]
        if isinstance(kind, tuple):
            for j, member in enumerate(kind):
                attrs[i, j] = _known(member, gpu, multiple=True)
        else:
            aligned = kind[0] == "*" and not parameter.do_not_specialize_on_alignment
            attrs[(i,)] = _known(kind, gpu, multiple=aligned)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    launch = {key: value for key, value in options.items() if key not in constants}
    return resources(name, triton.compile(source, gpu, launch), target)


def _known(kind: str, gpu: GPUTarget, *, multiple: bool) -> list:
    """What Triton tells the compiler of an argument."""
    known: list = [["tt.divisibility", 16]] if multiple else []
    return known + ([["tt.pointer_range", 32]] if kind[0] == "*" and gpu.backend == "hip" else [])


def resources(name: str, compiled, target: str) -> Resources:
    """What a kernel that was compiled for a target uses."""
    if gpu_target(target).backend == "hip":
        regs, stack = _amdgcn_usage(compiled.asm["amdgcn"])
    else:
        regs, stack = _cubin_usage(compiled.asm["cubin"])
    return Resources(name, target, regs, stack, compiled.metadata.shared)


def gpu_target(name: str) -> GPUTarget:
    """Triton's name of a target; raises ValueError where it is not named like one."""
    if re.fullmatch(r"sm_\d{2,3}", name):
        return GPUTarget("cuda", int(name[3:]), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"aot: target must be like sm_90 or gfx942, got {name!r}")


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    suffix = ".exe" if os.name == "nt" else ""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tools / f"cuobjdump{suffix}"), "--dump-resource-usage", str(path)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", report), _number(r"STACK:(\d+)", report)


def _amdgcn_usage(assembly: str) -> tuple[int, int]:
    regs = _number(r"\.vgpr_count:\s+(\d+)", assembly)
    return regs, _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly)


def _number(pattern: str, report: str) -> int:
    match = re.search(pattern, report)
    if match is None:
        raise RuntimeError(f"aot: {pattern} not found in the compiler's report:\n{report}")
    return int(match.group(1))
