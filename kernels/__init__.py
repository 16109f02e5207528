"""Triton kernels with their launchers and configurations; nothing here decides which map runs."""

import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

# Whether TRITON_INTERPRET was set when triton was imported: kernels then run on CPU tensors.
INTERPRETED: bool = triton.knobs.runtime.interpret


def cannot_compile(error: BaseException) -> bool:
    """Whether Triton says with an error that a kernel does not compile, or not fit, here."""
    compilers = isinstance(error, (CompilationError, OutOfResources, PTXASError))
    # MLIR's own passes fail with a bare RuntimeError, and the driver where not all programs of a
    # cooperative launch fit at once.
    known = ("PassManager::run failed", "cooperative launch")
    return compilers or (type(error) is RuntimeError and any(x in str(error) for x in known))
