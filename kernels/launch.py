"""What launchers share: batches as one dimension, and the names of dtypes."""

import torch
import triton.language as tl

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
# As in the names of kernels and in the types of pointers, *fp32.
NAME = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute in: fp32 for fp16 and bf16, otherwise the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def flatten(x: torch.Tensor, core: int) -> torch.Tensor:
    """[..., core dims] -> [matrices, core dims]: a view where strides allow, the last one 1."""
    x = x.reshape(-1, *x.shape[-core:])
    return x if x.stride(-1) == 1 else x.contiguous()
