"""Triton's interpreter, made to patch its language once a launch.

It does so anew for every device function that a kernel calls, which is a third of its time and
changes nothing: what was patched for the launch stays patched until the launch is over.
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
