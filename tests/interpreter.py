"""Triton's interpreter, made to patch its language once a launch, and to round bf16 as a GPU does.

It patches anew for every device function that a kernel calls, which is a third of its time and
changes nothing: what was patched for the launch stays patched until the launch is over. To bf16 it
cuts digits off, up to Triton 3.9 at least, where the instruction rounds to nearest, ties to even.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace


def patch_once_a_launch() -> None:
    """Nothing happens where Triton is not installed, or not as this knows it."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = getattr(interpreter, "_patch_lang", lambda: None)
    restores = hasattr(getattr(interpreter, "_LangPatchScope", None), "restore")
    if not restores or list(inspect.signature(patch).parameters) != ["fn"]:
        return
    languages: dict = {}  # those that a function sees
    patched: set[str] = set()
    nothing = SimpleNamespace(restore=lambda: None)

    def once(fn):
        if fn not in languages:
            seen = (x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core)
            languages[fn] = frozenset(seen)
        if languages[fn] <= patched:
            return nothing
        scope = patch(fn)
        patched.update(languages[fn])
        restore = scope.restore

        def over():
            patched.clear()
            restore()

        scope.restore = over
        return scope

    interpreter._patch_lang = once


def round_to_nearest() -> None:
    """Of fp32 to bf16; nothing happens where Triton is not installed, or not as this knows it."""
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = getattr(interpreter, "_convert_float", None)
    if convert is None:
        return

    def converted(x, source, target, rounding_mode):
        if rounding_mode is not None or (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding_mode)
        bits = np.ascontiguousarray(x).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.reshape(x.shape))

    interpreter._convert_float = converted
