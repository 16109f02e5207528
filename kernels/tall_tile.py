"""Tall exponentials of few columns: all that is k x k in one program, forward and backward.

What is computed is what `tall_blocks` and `taylor` say, on one tile of 2 x 2 blocks [HALF, HALF];
beside the k x k blocks it is zero, and its exponential the identity.
"""

import triton
import triton.language as tl
from torch import Tensor

from tritonparam.kernels.launch import launch
from tritonparam.kernels.tall_blocks import argument, balance, empty
from tritonparam.kernels.taylor import ROUNDS, TAYLOR, THETA, row, schedule, unscheduled

MAX_K = 16
MAX_K_BWD = 8  # the derivative takes twice the registers: at 16 it spills on sm_90


@triton.jit
def _dot(x, y):
    return tl.dot(x, y, input_precision="ieee", out_dtype=tl.float64)


@triton.jit
def _dots(x, dy, dx, y):
    """The derivative of X Y."""
    acc = tl.dot(x, dy, input_precision="ieee", out_dtype=tl.float64)
    return tl.dot(dx, y, acc=acc, input_precision="ieee", out_dtype=tl.float64)


@triton.jit
def _blocks(n_cols, HALF: tl.constexpr):
    """Entries along a side, block and place in it of rows and columns, and what is not beside."""
    x = tl.arange(0, 2 * HALF)
    i, r = x[:, None] // HALF, x[:, None] % HALF
    j, c = x[None, :] // HALF, x[None, :] % HALF
    return x, i, r, j, c, (r < n_cols) & (c < n_cols)


@triton.jit
def _norm2(x):
    return tl.sum(tl.sum(x * x, axis=1), axis=0)


@triton.jit
def _exp_kernel(
    pp_ptr,
    c_ptr,
    k_ptr,
    b_ptr,
    sigma_ptr,
    first_ptr,
    top_ptr,
    u_ptr,
    n_cols,
    pp_stride,
    pp_stride_row,
    pp_stride_col,
    c_stride,
    c_stride_row,
    c_stride_col,
    LOWER: tl.constexpr,
    TAYLOR: tl.constexpr,
    ROUNDS: tl.constexpr,
    THETA: tl.constexpr,
    HALF: tl.constexpr,
):
    """K, b, its schedule, and E_top and E_bottom / b of its exponential."""
    matrix = tl.program_id(0).to(tl.int64)
    size = n_cols * n_cols
    x, i, r, j, c, inside = _blocks(n_cols, HALF)
    pp_ptr += matrix * pp_stride
    b = balance(pp_ptr, n_cols, pp_stride_row, pp_stride_col, HALF)
    strides = (pp_stride_row, pp_stride_col, c_stride_row, c_stride_col)
    a = argument(pp_ptr, c_ptr + matrix * c_stride, b, i, r, j, c, n_cols, *strides, LOWER)
    k_ptr += matrix * 4 * size
    tl.store(k_ptr + ((i * n_cols + r) * (2 * n_cols) + (j * n_cols + c)), a, mask=inside)
    a2 = _dot(a, a)
    a3 = _dot(a2, a)
    sigma, s = schedule(_norm2(a), _norm2(a2), _norm2(a3), ROUNDS, THETA)
    tl.store(b_ptr + matrix, b)
    tl.store(sigma_ptr + matrix, sigma)
    tl.store(first_ptr + matrix, ROUNDS - s)
    a *= sigma
    a2 *= sigma * sigma
    a3 *= sigma * sigma * sigma
    a6 = _dot(a3, a3)
    eye = tl.where(x[:, None] == x[None, :], 1.0, 0.0).to(tl.float64)
    y = row(a, a2, a3, a6, eye, TAYLOR, 3)
    y += _dot(row(a, a2, a3, a6, eye, TAYLOR, 0), row(a, a2, a3, a6, eye, TAYLOR, 4))
    e = _dot(row(a, a2, a3, a6, eye, TAYLOR, 2) + y, y) + row(a, a2, a3, a6, eye, TAYLOR, 1)
    for _ in range(0, s):
        e = _dot(e, e)
    at = matrix * size + (r * n_cols + c)
    tl.store(top_ptr + at, e, mask=inside & (i == 0) & (j == 0))
    tl.store(u_ptr + at, e / b, mask=inside & (i == 1) & (j == 0))


@triton.jit
def _exp_bwd_kernel(
    k_ptr,
    bg_ptr,
    pg_ptr,
    b_ptr,
    sigma_ptr,
    first_ptr,
    d_ptr,
    v_ptr,
    n_cols,
    bg_stride,
    bg_stride_row,
    bg_stride_col,
    pg_stride,
    pg_stride_row,
    pg_stride_col,
    TAYLOR: tl.constexpr,
    ROUNDS: tl.constexpr,
    HALF: tl.constexpr,
):
    """D and V from the derivative H of exp at K^T in the direction [B^T G, 0] over [P^T G / b, 0].

    D = H_11 - H_11^T and V = -(H_12 + H_12^T) / b. Each step of the forward pass is taken with its
    derivative (Al-Mohy & Higham 2009, algorithm 6.4).
    """
    matrix = tl.program_id(0).to(tl.int64)
    size = n_cols * n_cols
    x, i, r, j, c, inside = _blocks(n_cols, HALF)
    b = tl.load(b_ptr + matrix)
    sigma = tl.load(sigma_ptr + matrix)
    s = ROUNDS - tl.load(first_ptr + matrix)
    k_ptr += matrix * 4 * size
    transposed = (j * n_cols + c) * (2 * n_cols) + (i * n_cols + r)
    a = tl.load(k_ptr + transposed, mask=inside, other=0.0) * sigma
    bg_ptr += matrix * bg_stride + (r.to(tl.int64) * bg_stride_row + c * bg_stride_col)
    da = tl.load(bg_ptr, mask=inside & (i == 0) & (j == 0), other=0.0).to(tl.float64)
    pg_ptr += matrix * pg_stride + (r.to(tl.int64) * pg_stride_row + c * pg_stride_col)
    da += tl.load(pg_ptr, mask=inside & (i == 1) & (j == 0), other=0.0) / b
    da *= sigma
    a2, da2 = _dot(a, a), _dots(a, da, da, a)
    a3, da3 = _dot(a2, a), _dots(a2, da, da2, a)
    a6, da6 = _dot(a3, a3), _dots(a3, da3, da3, a3)
    eye = tl.where(x[:, None] == x[None, :], 1.0, 0.0).to(tl.float64)
    zero = tl.zeros_like(eye)
    y = row(a, a2, a3, a6, eye, TAYLOR, 0)
    dy = row(da, da2, da3, da6, zero, TAYLOR, 0)
    z = row(a, a2, a3, a6, eye, TAYLOR, 4)
    dy = _dots(y, row(da, da2, da3, da6, zero, TAYLOR, 4), dy, z)
    dy += row(da, da2, da3, da6, zero, TAYLOR, 3)
    y = _dot(y, z) + row(a, a2, a3, a6, eye, TAYLOR, 3)
    z = row(a, a2, a3, a6, eye, TAYLOR, 2) + y
    de = _dots(z, dy, row(da, da2, da3, da6, zero, TAYLOR, 2) + dy, y)
    de += row(da, da2, da3, da6, zero, TAYLOR, 1)
    e = _dot(z, y) + row(a, a2, a3, a6, eye, TAYLOR, 1)
    for _ in range(0, s):
        de = _dots(e, de, de, e)
        e = _dot(e, e)
    d = de - tl.trans(de)
    tl.store(d_ptr + matrix * size + (r * n_cols + c), d, mask=inside & (i == 0) & (j == 0))
    blocks = tl.reshape(de, [2, HALF, 2, HALF])
    half = tl.arange(0, 2)
    upper_right = (half[:, None, None, None] == 0) & (half[None, None, :, None] == 1)
    v = tl.sum(tl.sum(tl.where(upper_right, blocks, 0.0), axis=2), axis=0)
    v = (v + tl.trans(v)) / -b
    index = tl.arange(0, HALF)
    r, c = index[:, None], index[None, :]
    v_ptr += matrix * size + (r * n_cols + c)
    tl.store(v_ptr, v, mask=(r < n_cols) & (c < n_cols))


def exp(
    pp: Tensor, c: Tensor, *, lower: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """E_top, and E_bottom / b, K, b, sigma and the first round, for k <= MAX_K."""
    n_matrices, k, _ = pp.shape
    on = pp.device
    top, u = (empty(n_matrices, k, k, device=on) for _ in range(2))
    argument, b = empty(n_matrices, 2 * k, 2 * k, device=on), empty(n_matrices, device=on)
    sigma, first = unscheduled(pp)
    outputs = (argument, b, sigma, first, top, u)
    strides = (*pp.stride(), *c.stride())
    options = _exp_options(k, lower)
    launch(_exp_kernel, (n_matrices,), pp, c, *outputs, k, *strides, **options)
    return top, (u, argument, b, sigma, first)


def exp_bwd(
    bg: Tensor, pg: Tensor, argument: Tensor, b: Tensor, sigma: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of Omega less its transpose, that of P^T P plus its; k <= MAX_K_BWD."""
    n_matrices, k, _ = pg.shape
    d, v = (empty(n_matrices, k, k, device=pg.device) for _ in range(2))
    given = (argument, bg, pg, b, sigma, first)
    strides = (*bg.stride(), *pg.stride())
    launch(_exp_bwd_kernel, (n_matrices,), *given, d, v, k, *strides, **_exp_bwd_options(k))
    return d, v


def _exp_options(k: int, lower: bool) -> dict:
    options: dict = {"LOWER": lower, "THETA": THETA}
    return options | _exp_bwd_options(k)


def _exp_bwd_options(k: int) -> dict:
    half = 8 if k <= 8 else 16
    options: dict = {"TAYLOR": TAYLOR, "ROUNDS": ROUNDS, "HALF": half}
    return options | {"num_warps": half // 2, "num_stages": 1, "enable_fp_fusion": True}


def shipped(backend: str) -> list[tuple]:
    """Launches for compiling ahead of time, as `cayley.shipped`."""
    rows: list[tuple] = []
    names = (
        "pp_ptr",
        "k_ptr",
        "b_ptr",
        "sigma_ptr",
        "top_ptr",
        "u_ptr",
        "pg_ptr",
        "d_ptr",
        "v_ptr",
    )
    types = dict.fromkeys(names, "*fp64") | {"first_ptr": "*i32"}
    for k in (8, 16):
        for name in ("fp32", "fp64"):
            given = types | {"c_ptr": f"*{name}", "bg_ptr": f"*{name}"}
            label, options = f"{k}_{name}", _exp_options(k, name == "fp32")
            launches = [(f"tall_exp_fwd_{label}", _exp_kernel, options)]
            if k <= MAX_K_BWD:
                launches.append((f"tall_exp_bwd_{label}", _exp_bwd_kernel, _exp_bwd_options(k)))
            for row_name, kernel, options in launches:
                own = {key: given[key] for key in kernel.arg_names if key in given}
                rows.append((row_name, kernel, own, options))
    return rows
