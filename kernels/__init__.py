"""Triton kernels with their launchers and configurations; nothing here decides which map runs."""

import triton

# Whether TRITON_INTERPRET was set when triton was imported: kernels then run on CPU tensors.
INTERPRETED: bool = triton.knobs.runtime.interpret
