"""What launchers share: the launch, batches as one dimension, matrices in tiles, dtypes' names."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
# As in the names of kernels and in the types of pointers, *fp32.
NAME = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
_LEFT_TO_TRITON = triton.knobs.runtime.interpret or torch.version.hip is not None
_STAGES = "add_stages_inspection_hook"
_MOST = 4096
_compiled: dict[Any, tuple[Any, list[Any]]] = {}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute in: fp32 for fp16 and bf16, otherwise the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def flatten(x: torch.Tensor, core: int) -> torch.Tensor:
    """[..., core dims] -> [matrices, core dims]: a view where strides allow, the last one 1."""
    x = x.reshape(-1, *x.shape[-core:])
    return x if x.stride(-1) == 1 else x.contiguous()


def slot(n: int) -> int:
    """The side of the part of a tile that an n x n matrix takes."""
    return max(triton.next_power_of_2(n), 4)


def packing(n: int, block: int, matrices: int) -> dict[str, int]:
    """The constants of `tile.places`: so many matrices on the diagonals of tiles of a side."""
    side = max(slot(n), block // matrices)
    return {"SLOT": side, "TILES": matrices * side // block}


def _as_in_key(x: Any) -> Any:
    if x is None or type(x) is int:
        return x
    if type(x) is tuple:
        return x if x and type(x[0]) is int else tuple([(y.dtype, y.data_ptr() % 16) for y in x])
    return x.dtype, x.data_ptr() % 16


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``, for less of the host's time where it was done before.

    At every launch Triton finds out anew which compiled kernel takes it. Here the one that it took
    is remembered under a key that is finer than Triton's own: of a tensor the dtype and its address
    modulo 16, of all else the value. Triton's interpreter is left alone, and AMD GPUs, whose
    kernels depend on the sizes of storages too.

    Arguments:
        kernel: the function under ``triton.jit``; its constants come after its arguments.
        grid: one to three integers.
        args: tensors, integers and None; tuples of tensors, or of integers.
        options: the constants, and what the compiler takes.
    """
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    if _LEFT_TO_TRITON or kernel.pre_run_hooks or getattr(runtime, _STAGES, None) is not None:
        kernel[grid](*args, **options)
        return
    key = (
        id(kernel),
        triton.runtime.driver.active.get_current_device(),
        # What a debugger or a profiler may ask for between two launches.
        kernel.debug,
        runtime.debug,
        compilation.instrumentation_mode,
        getattr(compilation, "fpsan_homomorphic_casts", None),
        *map(_as_in_key, args),
        *options.items(),
    )
    known = _compiled.get(key)
    if known is not None:
        compiled, constants = known
        compiled[(*grid, 1, 1)](*args, *constants)
        return
    compiled = kernel[grid](*args, **options)
    rest = kernel.params[len(args) :]
    assert all(p.is_constexpr for p in rest), f"an argument of {kernel} comes after a constant"
    if isinstance(compiled, triton.compiler.CompiledKernel):  # a hook may keep it from compiling
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = compiled, [options.get(p.name, p.default) for p in rest]
