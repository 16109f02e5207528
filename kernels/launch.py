"""What launchers share: batches as one dimension, matrices in tiles, names of dtypes."""

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
