"""Triton's interpreter, made to patch its language once a launch, and to round as a GPU does.

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


def compute_as_a_gpu(monkeypatch) -> bool:
    """Division of fp32 up to 2 ulp off, `tl.dot` in TF32 and in three such products.

    A tensor core truncates its operands, aligns eight products, and what they are added to, to the
    largest of them with two digits more, and truncates each and the sum: Fasi, Higham, Mikaitis &
    Pranesh, "Numerical behavior of NVIDIA tensor cores" (2021). Of three products the last one, of
    the large parts, starts from the small ones; Triton adds it to the accumulator in fp32.

    Whether an operation is off, and which way, depends on its operands alone, as on a GPU: programs
    that compute the same thing agree. Returns False where the interpreter is not as this knows it.
    """
    import numpy as np
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if not hasattr(builder, "create_fdiv") or not hasattr(builder, "create_dot"):
        return False
    divide, dot = builder.create_fdiv, builder.create_dot

    def off(self, x, y):
        quotient = divide(self, x, y)
        if quotient.data.dtype != np.float32:
            return quotient
        exact = np.frexp(np.abs(y.data))[0] == 0.5  # by a power of two
        digits = quotient.data.view(np.uint32) * np.uint32(2654435761) >> 16
        near = quotient.data + (digits % 5 - 2.0) * np.spacing(quotient.data)
        keep = exact | ~np.isfinite(quotient.data)
        quotient.data = np.where(keep, quotient.data, near).astype(np.float32)
        return quotient

    def cut(x, add=0):
        return ((x.view(np.uint32) + np.uint32(add)) & np.uint32(0xFFFFE000)).view(np.float32)

    def toward_zero(x):
        y = x.astype(np.float32)
        return np.where(np.abs(y) > np.abs(x), np.nextafter(y, np.float32(0)), y)

    def summed(a, b, acc):
        a, b = cut(a)[..., :, :, None].astype(np.float64), cut(b)[..., None, :, :]
        for k in range(0, a.shape[-2], 8):
            products = a[..., k : k + 8, :] * b[..., k : k + 8, :]
            terms = np.concatenate([products, acc[..., None, :].astype(np.float64)], axis=-2)
            digit = np.ldexp(1.0, np.frexp(np.abs(terms).max(-2))[1] - 26)
            acc = toward_zero(np.trunc(terms / digit[..., None, :]).sum(-2) * digit)
        return acc

    def tensor_core(self, x, y, acc, precision, *rest):
        name = str(precision).upper()
        if "TF32" not in name or acc.data.dtype != np.float32:
            return dot(self, x, y, acc, precision, *rest)
        a, b = (np.ascontiguousarray(z.data) for z in (x, y))
        if "X3" not in name:
            return handle(summed(a, b, acc.data), acc.dtype.scalar)
        large_a, large_b = cut(a, 0x1000), cut(b, 0x1000)  # to nearest
        small = summed(large_a, b - large_b, summed(a - large_a, large_b, np.zeros_like(acc.data)))
        return handle(summed(large_a, large_b, small) + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(builder, "create_fdiv", off)
    monkeypatch.setattr(builder, "create_dot", tensor_core)
    return True


def at_once(monkeypatch) -> None:
    """The programs of a launch run at once: after every atomic operation goes on who is drawn.

    Skips the test where the interpreter is not as this knows it. Programs that wait for what does
    not come are an error, not a test that does not end.
    """
    import itertools
    import random
    import threading

    import pytest
    from triton.runtime import interpreter

    known = ("_implicit_cvt", "_patch_lang", "interpreter_builder", "InterpreterBuilder")
    if not all(hasattr(interpreter, name) for name in known):
        pytest.skip("Triton's interpreter is not as the tests know it")
    builder, of = interpreter.interpreter_builder, interpreter.InterpreterBuilder
    atomic = of.create_atomic_rmw
    rng, draws, locks, errors = random.Random(0), itertools.count(), {}, []

    def go_on() -> None:
        if locks:
            locks[rng.choice([*locks])].release()

    def paused(self, *args):
        found = atomic(self, *args)
        me = self.grid_idx
        go_on()
        locks[me].acquire()
        self.set_grid_idx(*me)
        assert not errors, "another program failed"
        assert next(draws) < 100_000, "programs wait for each other"
        return found

    def launch(self, *args, **kwargs):
        kwargs = {name: x for name, x in kwargs.items() if name in self.arg_names}
        bound = inspect.getcallargs(self.fn, *args, **kwargs)
        bound = {
            name: x if name in self.constexprs else interpreter._implicit_cvt(x)
            for name, x in bound.items()
        }
        (n,) = self.grid
        builder.set_grid_dim(n, 1, 1)

        def program(me):
            locks[me].acquire()
            builder.set_grid_idx(*me)
            try:
                self.fn(**bound)
            except Exception as error:
                errors.append(error)
            del locks[me]
            go_on()

        locks.update({(i, 0, 0): threading.Semaphore(0) for i in range(n)})
        threads = [threading.Thread(target=program, args=(me,)) for me in locks]
        scope = interpreter._patch_lang(self.fn)
        for thread in threads:
            thread.start()
        go_on()
        for thread in threads:
            thread.join()
        scope.restore()
        if errors:
            raise errors[0]

    monkeypatch.setattr(of, "create_atomic_rmw", paused)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
