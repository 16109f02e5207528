"""Tall matrices, n x k: how `tall_gram` and `tall_combine` read them, and their launch numbers.

The Gram matrix of a tall matrix squares its condition, so that what is made of it needs fp64. Its
products of fp32 are exact there, and a GPU for computing has tensor cores for it.
"""

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
import triton.language as tl

from tritonparam.kernels import gemm
from tritonparam.kernels.launch import compute_dtype

# What counts of an operand: all of it, what is below its first k rows, or, of reflectors, what is
# below the diagonal, with ones on it.
PARTS = ("all", "below", "unit")


@triton.jit
def load_part(ptr, row, col, n_rows, n_cols, stride_row, stride_col, PART: tl.constexpr):
    """One of the PARTS of a tall operand, in fp64."""
    mask = (row < n_rows) & (col < n_cols)
    if PART == "below":
        mask &= row >= n_cols
    if PART == "unit":
        mask &= row > col
    offset = row.to(tl.int64) * stride_row + col.to(tl.int64) * stride_col
    x = tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float64)
    if PART == "unit":
        x = tl.where((row == col) & (col < n_cols), 1.0, x)
    return x


@dataclass(frozen=True)
class Config:
    """Launch numbers of a tall map: of its sums and products, and of products of k x k matrices."""

    block: int
    block_rows: int
    num_warps: int
    small_block: int
    small_block_k: int
    small_num_warps: int
    small_num_stages: int

    @cached_property
    def small(self) -> gemm.Config:
        """That of the products of k x k matrices, in fp64."""
        numbers = (self.small_num_warps, self.small_num_stages)
        return gemm.Config(self.small_block, self.small_block_k, "ieee", *numbers)


def config(k: int, dtype: torch.dtype, backend: str = "cuda") -> Config:
    """The default for n x k matrices; everything is computed in fp64, whatever the dtype."""
    small = gemm.product_config(4 * k, torch.float64, backend)  # the exponential has 4k x 4k
    numbers = (small.block, small.block_k, small.num_warps, small.num_stages)
    if backend == "interpreter":  # one program after another: few and large ones
        return Config(min(max(triton.next_power_of_2(k), 16), 64), 64, 1, *numbers)
    # With 32 rows to a tile of 32 columns some sums spill, by triton 3.6 on sm_90.
    return Config(32, 16, 8, *numbers) if k <= 32 else Config(64, 32, 8, *numbers)


def candidates(phase: str, k: int, dtype: torch.dtype, backend: str = "cuda") -> list[Config]:
    """Configurations to measure for a phase of an n x k map, the default first."""
    default = config(k, dtype, backend)
    blocks = (32, 64) if k > 32 else (16, 32)
    of_tall = itertools.product(blocks, (16, 32, 64), (4, 8))
    others = [replace(default, block=b, block_rows=r, num_warps=w) for b, r, w in of_tall]
    names = ("small_block", "small_block_k", "small_num_warps")
    for numbers in itertools.product(blocks, (16, 32), (4, 8)):
        others.append(replace(default, **dict(zip(names, numbers, strict=True))))
    return list(dict.fromkeys([default, *others]))


def flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., n, k] -> [matrices, n, k], of any strides, in the compute dtype of `dtype`."""
    return x.to(compute_dtype(dtype)).reshape(-1, *x.shape[-2:])


def strides(*xs: torch.Tensor | None) -> list[int]:
    """Those of every operand, three each, which are 0 for None."""
    return [stride for x in xs for stride in ((0, 0, 0) if x is None else x.stride())]


def launch_options(config: Config) -> dict:
    """Of `tall_gram` and `tall_combine`, beside their constants."""
    return {"num_warps": config.num_warps, "num_stages": 2, "enable_fp_fusion": True}
