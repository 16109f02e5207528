"""Tiled products of batches of matrices with fused epilogues."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tritonparam.kernels.launch import NAME, TRITON_DTYPE, launch
from tritonparam.kernels.tile_grid import product_tile, tiles_of

FORMS = ("full", "symmetric", "skew", "sum", "difference", "symmetric_gradient", "skew_gradient")


@triton.jit(do_not_specialize=["turn"])
def _product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    u_ptr,
    v_ptr,
    scale_ptr,
    first_ptr,
    rough_ptr,
    sums_ptr,
    turn,
    n_rows,
    n_cols,
    n_inner,
    a_stride_matrix,
    b_stride_matrix,
    c_stride_matrix,
    u_stride,
    v_stride,
    scale_stride,
    a_stride,
    b_stride,
    c_stride,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GAMMA: tl.constexpr,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    TRANS_C: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Z = scale (ALPHA A B diag(u) + (BETA C + GAMMA I) diag(v)) in one of the FORMS.

    One program for each tile, or for each pair of tiles (i, j), (j, i) where the form is not
    "full". ALPHA, BETA and GAMMA are constants, because numbers are passed in fp32.
    """
    n_tiles = tiles_of(n_rows, n_cols, FORM, BLOCK)
    matrix = (tl.program_id(0) // n_tiles).to(tl.int64)
    if first_ptr is not None and turn < tl.load(first_ptr + matrix):
        return
    rough = None
    if rough_ptr is not None:
        rough = tl.load(rough_ptr + matrix)
    a = (a_ptr, a_stride_matrix, a_stride)
    b = (b_ptr, b_stride_matrix, b_stride)
    c = None
    if c_ptr is not None:
        c = (c_ptr, c_stride_matrix, c_stride)
    u, v, scale = None, None, None
    if u_ptr is not None:
        u = (u_ptr, u_stride)
    if v_ptr is not None:
        v = (v_ptr, v_stride)
    if scale_ptr is not None:
        scale = (scale_ptr, scale_stride)
    product_tile(
        matrix,
        tl.program_id(0) % n_tiles,
        a,
        b,
        c,
        out_ptr,
        u,
        v,
        scale,
        rough,
        sums_ptr,
        (n_rows, n_cols, n_inner),
        ALPHA,
        BETA,
        GAMMA,
        TRANS_A,
        TRANS_B,
        TRANS_C,
        FORM,
        BLOCK,
        BLOCK_K,
        GROUP,
        PRECISION,
        ACC,
    )


@dataclass(frozen=True)
class Config:
    """Launch numbers of a product: tiles of block x block, sums in slices of block_k.

    With `programs` a map carries out all its rounds in one launch of at most so many (`rounds`).
    """

    block: int
    block_k: int
    precision: str
    num_warps: int
    num_stages: int = 3
    group: int = 8
    programs: int = 0


def product_config(n: int, dtype: torch.dtype, backend: str = "cuda") -> Config:
    """The default for n x n matrices: tiles so small that one matrix fills many processors.

    The interpreter runs one program after another, so there ("interpreter") one tile is enough.
    """
    if backend == "interpreter":
        block = min(max(triton.next_power_of_2(n), 16), 256)
        return Config(block, block, "ieee", num_warps=1)
    if dtype == torch.float64:
        return Config(32, 16, "ieee", num_warps=4)
    precision = "ieee" if backend == "hip" else "tf32x3"  # hip does not compile tf32x3
    if n <= 256:
        return Config(32, 32, precision, num_warps=4)
    return Config(64, 16, precision, num_warps=8)


def n_tiles(n: int, config: Config, form: str = "full") -> int:
    """How many programs work on one n x n result."""
    n = triton.cdiv(n, config.block)
    return n * n if form == "full" else n * (n + 1) // 2


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    config: Config,
    *,
    out: torch.Tensor | None = None,
    alpha: float = 1.0,
    u: torch.Tensor | None = None,
    c: torch.Tensor | None = None,
    beta: float = 1.0,
    gamma: float = 0.0,
    v: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    form: str = "full",
    first: torch.Tensor | None = None,
    turn: int = 0,
    rough: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """Z = scale (alpha a b diag(u) + (beta c + gamma I) diag(v)), or what `form` makes of it.

    Arguments:
        a, b, c: [matrices, m, k], [matrices, k, n] and [matrices, m, n], fp32 or fp64; a transpose
            is read in place.
        out: contiguous [matrices, m, n], of any dtype; none of the operands. None makes one like a.
        alpha, beta, gamma: numbers; each new one is compiled for.
        u, v: [matrices, n], ones where None.
        scale: [matrices], of any stride, 1 where None.
        form: "full" is Z. For m = n, "symmetric" and "skew" compute its upper triangle and write
            the other as a mirror image. "sum" and "difference" are Z + Z^T and Z - Z^T.
            "symmetric_gradient", triu(Z + Z^T) with the diagonal of Z, and "skew_gradient",
            triu(Z - Z^T, 1), are the gradients of w in triu(w) + triu(w, 1)^T and in
            triu(w, 1) - triu(w, 1)^T where Z is that of the result.
        first, turn: int32 [matrices]; a matrix is left alone while turn < first.
        rough: int32 [matrices]; where it is not zero, products of fp32 are plain TF32.
        sums: [matrices, n_tiles(n, config, form), 2], of out's dtype; receives the trace and the
            sum of squares of each tile of "full", or with its mirror image of the next two.
    """
    assert form in FORMS
    n_matrices, n_rows, n_inner = a.shape
    n_cols = b.size(2)
    if out is None:
        out = torch.empty((n_matrices, n_rows, n_cols), dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(n_rows, config.block) * triton.cdiv(n_cols, config.block)
    if form != "full":
        tiles = n_tiles(n_cols, config, form)
    a, a_stride, trans_a = _by_rows_or_columns(a)
    b, b_stride, trans_b = _by_rows_or_columns(b)
    c_stride, trans_c = 0, False
    if c is not None:
        c, c_stride, trans_c = _by_rows_or_columns(c)
    rough = rough if a.dtype == torch.float32 else None
    u, v = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (u, v))
    launch(
        _product_kernel,
        (n_matrices * tiles,),
        a,
        b,
        c,
        out,
        u,
        v,
        scale,
        first,
        rough,
        sums,
        turn,
        n_rows,
        n_cols,
        n_inner,
        *(0 if x is None else x.stride(0) for x in (a, b, c, u, v, scale)),
        a_stride,
        b_stride,
        c_stride,
        TRANS_A=trans_a,
        TRANS_B=trans_b,
        TRANS_C=trans_c,
        **_product_options(config, a.dtype, form, alpha, beta, gamma),
    )
    return out


def _by_rows_or_columns(x: torch.Tensor) -> tuple[torch.Tensor, int, bool]:
    """x, the stride between its rows or columns, and whether it is stored by columns."""
    if x.stride(2) == 1 and x.stride(1) < _MAX_STRIDE:
        return x, x.stride(1), False
    if x.stride(1) == 1 and x.stride(2) < _MAX_STRIDE:
        return x, x.stride(2), True
    return x.contiguous(), x.size(2), False


def _product_options(
    config: Config, dtype: torch.dtype, form: str, alpha: float, beta: float, gamma: float
) -> dict:
    options: dict = {"ALPHA": alpha, "BETA": beta, "GAMMA": gamma, "FORM": form}
    options |= {"BLOCK": config.block, "BLOCK_K": config.block_k, "GROUP": config.group}
    options |= {"PRECISION": config.precision, "ACC": TRITON_DTYPE[dtype]}
    return options | launch_options(config)


def launch_options(config: Config) -> dict:
    """The options of a launch that are no constants of the kernel."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.precision == "tf32x3":
        options["maxnreg"] = 255  # of itself ptxas spills a little for one more program at a time
    return options | {"enable_fp_fusion": True}


_MAX_STRIDE = 1 << 24


def candidates(n: int, dtype: torch.dtype, backend: str = "cuda") -> list[Config]:
    """Configurations to measure for products of n x n matrices, the default first."""
    default = product_config(n, dtype, backend)
    blocks = [block for block in (32, 64, 128) if block <= max(triton.next_power_of_2(n), 32)]
    numbers = itertools.product(blocks, (16, 32), (4, 8), (2, 3))
    others = (
        Config(block, k, default.precision, warps, stages) for block, k, warps, stages in numbers
    )
    return list(dict.fromkeys([default, *others]))


FORMS_SHIPPED = (
    ("full", "tnn"),
    ("full", "ntn"),
    ("symmetric", "tnt"),
    ("skew", "nnn"),
    ("sum", "tnt"),
    ("difference", "tnt"),
    ("symmetric_gradient", "tnt"),
    ("skew_gradient", "tnt"),
)


def launches(
    config: Config, dtype: torch.dtype, forms: Sequence[tuple[str, str]] = FORMS_SHIPPED
) -> list[tuple]:
    """Launches with one configuration, for compiling ahead of time, as in `cayley.shipped`.

    Every form with every operand and epilogue at once, and sizes that 16 does not divide: what a
    map launches is part of it. A form goes with how its factors and c are stored, "t" by columns.
    """
    name = NAME[dtype]
    types = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr", "out_ptr"), f"*{name}")
    types |= dict.fromkeys(("u_ptr", "v_ptr", "scale_ptr", "sums_ptr"), f"*{name}")
    types |= {"first_ptr": "*i32", "rough_ptr": "*i32"}
    rows: list[tuple] = []
    for form, stored in forms:
        options = _product_options(config, dtype, form, 2.0, 3.0, -1.0)
        options |= {f"TRANS_{x}": t == "t" for x, t in zip("ABC", stored, strict=True)}
        options |= {"rough_ptr": None} if dtype == torch.float64 else {}
        row = f"product_{form}_{stored}_{config.block}_{name}"
        rows.append((row, _product_kernel, types, options))
    return rows


def shipped(backend: str) -> list[tuple]:
    """Launches of every default configuration."""
    return [
        row
        for dtype in (torch.float32, torch.float64)
        for config in {product_config(n, dtype, backend): None for n in (128, 512, 4096)}
        for row in launches(config, dtype)
    ]
