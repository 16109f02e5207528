"""exp of any matrices in fp64: Taylor's polynomial of degree 18 in five products, and squarings.

Bader, Blanes & Casas, "Computing the matrix exponential with an optimized Taylor polynomial
approximation", Mathematics 7(12), 2019. How often a matrix is squared is decided on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonparam.kernels import gemm
from tritonparam.kernels.gemm import n_tiles, product
from tritonparam.kernels.launch import launch
from tritonparam.kernels.tile import exponent, power_of_two

# Squarings at most: enough for norms up to THETA 2^ROUNDS = 17,900. Beyond, exp is NaN.
ROUNDS = 14
THETA = 1.091  # up to which the polynomial is exact to fp64 (the paper, table 1)

# L, B1, B2, B3 and R over I, A, A^2, A^3 and A^6: with Y = B3 + L R, exp(A) ~ B1 + (B2 + Y) Y.
TAYLOR = (
    *(0.0, -0.10036558103014462, -0.0080292464824115696, -0.00089213849804572998, 0.0),
    *(0.0, 0.39784974949964508, 1.3678377846041172, 0.49828962252538267, -0.00063789819459472328),
    *(-10.967639605296206, 1.6801581387890621, 0.05717798464788655, -0.0069821012248805206),
    *(3.3497501708607047e-05, -0.090431683239081062, -0.067640451907138188),
    *(0.067596130177045966, 0.029555257042931552, -1.3918025751606069e-05),
    *(0.0, 0.0, -0.092336461936711856, -0.016936493900208172, -1.4008679818203610e-05),
)


@triton.jit
def schedule(square, square2, square3, ROUNDS: tl.constexpr, THETA: tl.constexpr):
    """sigma = 2^-s in fp64, with the least s for which THETA 2^s is above the norm, and s.

    From the squares of the Frobenius norms of A, A^2 and A^3. The norm is max(||A^2||^(1/2),
    ||A^3||^(1/3)), which bounds the remainder (Al-Mohy & Higham 2009, theorem 4.2), kept above
    ||A|| / 4, beyond which the polynomial cancels.
    """
    norm = tl.sqrt(square.to(tl.float32))
    cube = tl.exp2(tl.log2(tl.maximum(square3.to(tl.float32), 1e-37)) / 6.0)
    bound = tl.maximum(tl.sqrt(tl.sqrt(square2.to(tl.float32))), cube)
    bound = tl.minimum(tl.maximum(bound, norm * 0.25), norm) + (norm - norm)
    s = tl.maximum(exponent(bound * (1.0 / THETA)), 0)
    too_large = s > ROUNDS  # or not a number
    s = tl.minimum(s, ROUNDS)
    return tl.where(too_large, float("nan"), power_of_two(-s)).to(tl.float64), s


@triton.jit
def row(a, a2, a3, a6, eye, TAYLOR: tl.constexpr, i: tl.constexpr):
    """A row of TAYLOR; with 0 for `eye` its derivative, for the derivatives of the powers."""
    x = eye * tl.full([], TAYLOR[5 * i], tl.float64)
    x += a * tl.full([], TAYLOR[5 * i + 1], tl.float64)
    x += a2 * tl.full([], TAYLOR[5 * i + 2], tl.float64)
    x += a3 * tl.full([], TAYLOR[5 * i + 3], tl.float64)
    return x + a6 * tl.full([], TAYLOR[5 * i + 4], tl.float64)


@triton.jit
def _total(ptr, n_numbers, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of every STEP-th number, from the last of the first STEP on."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_numbers, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + (STEP * i + STEP - 1), mask=i < n_numbers, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["n_matrices", "n_cols", "n_squares", "n_tiles"])
def _rows_kernel(
    a_ptr,
    a2_ptr,
    a3_ptr,
    a6_ptr,
    squares_ptr,
    sums2_ptr,
    sums3_ptr,
    sigma_ptr,
    first_ptr,
    out_ptr,
    n_matrices,
    n_cols,
    n_squares,
    n_tiles,
    TAYLOR: tl.constexpr,
    ROUNDS: tl.constexpr,
    THETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows of TAYLOR for A sigma, out[row], and, from the sums of A, A^2, A^3, the schedule.

    Every program of a matrix makes the same schedule; where `squares` is None it is given.
    """
    n_entries = n_cols * n_cols
    part = tl.program_id(0) % tl.cdiv(n_entries, BLOCK)
    matrix = (tl.program_id(0) // tl.cdiv(n_entries, BLOCK)).to(tl.int64)
    if squares_ptr is None:
        sigma = tl.load(sigma_ptr + matrix)
    else:
        square = _total(squares_ptr + matrix * n_squares, n_squares, 1, 64)
        square2 = _total(sums2_ptr + matrix * 2 * n_tiles, n_tiles, 2, 64)
        square3 = _total(sums3_ptr + matrix * 2 * n_tiles, n_tiles, 2, 64)
        sigma, s = schedule(square, square2, square3, ROUNDS, THETA)
        if part == 0:
            tl.store(sigma_ptr + matrix, sigma)
            tl.store(first_ptr + matrix, ROUNDS - s)
    entry = part * BLOCK + tl.arange(0, BLOCK)
    mask = entry < n_entries
    offset = matrix * n_entries + entry
    cubed = sigma * sigma * sigma
    a = tl.load(a_ptr + offset, mask=mask, other=0.0) * sigma
    a2 = tl.load(a2_ptr + offset, mask=mask, other=0.0) * (sigma * sigma)
    a3 = tl.load(a3_ptr + offset, mask=mask, other=0.0) * cubed
    a6 = tl.load(a6_ptr + offset, mask=mask, other=0.0) * (cubed * cubed)
    eye = tl.where(entry // n_cols == entry % n_cols, 1.0, 0.0).to(tl.float64)
    for i in tl.static_range(5):
        out = out_ptr + (i * n_matrices * n_entries.to(tl.int64) + offset)
        tl.store(out, row(a, a2, a3, a6, eye, TAYLOR, i), mask=mask)


def exp(
    a: Tensor,
    config: gemm.Config,
    *,
    squares: Tensor | None = None,
    scheduled: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """exp(A) in one of two buffers, and (sigma, first): A sigma, sigma = 2^-s, is small.

    It is the second buffer where s = ROUNDS - first is odd.

    Arguments:
        a: contiguous [matrices, n, n] in fp64.
        config: of the products.
        squares: contiguous [matrices, numbers], which add up to the square of ||A||_F; or
        scheduled: (sigma, first) as they were returned for a matrix of which A is made.
    """
    n_matrices, n, _ = a.shape
    tiles = n_tiles(n, config)
    sums: list[Tensor | None] = [None, None]
    if squares is not None:
        sums = list(torch.empty((2, n_matrices, tiles, 2), dtype=a.dtype, device=a.device))
    a2 = product(a, a, config, sums=sums[0])
    a3 = product(a2, a, config, sums=sums[1])
    a6 = product(a3, a3, config)
    if scheduled is None:
        scheduled = unscheduled(a)
    rows = torch.empty((5, *a.shape), dtype=a.dtype, device=a.device)
    n_squares = 0 if squares is None else squares.size(1)
    sizes = (n_matrices, n, n_squares, tiles)
    options = _rows_options()
    grid = (n_matrices * triton.cdiv(n * n, options["BLOCK"]),)
    launch(_rows_kernel, grid, a, a2, a3, a6, squares, *sums, *scheduled, rows, *sizes, **options)
    left, b1, b2, b3, right = rows.unbind()
    y = product(left, right, config, c=b3)
    ys = product(b2 + y, y, config, c=b1), torch.empty_like(a)
    for turn in range(ROUNDS):  # those with a turn below `first`, the last ones, return at once
        source, out = ys[turn % 2], ys[(turn + 1) % 2]
        product(source, source, config, out=out, first=scheduled[1], turn=ROUNDS - 1 - turn)
    return ys, scheduled


def unscheduled(a: Tensor) -> tuple[Tensor, Tensor]:
    """Room for (sigma, first)."""
    first = torch.empty(a.size(0), dtype=torch.int32, device=a.device)
    return torch.empty(a.size(0), dtype=torch.float64, device=a.device), first


N_LAUNCHES = 6 + ROUNDS  # of `exp`: five products and the rows before the squarings


def _rows_options() -> dict:
    options: dict = {"TAYLOR": TAYLOR, "ROUNDS": ROUNDS, "THETA": THETA, "BLOCK": 512}
    return options | {"num_warps": 4, "enable_fp_fusion": True}


def shipped(backend: str) -> list[tuple]:
    """What is launched beside products, for compiling ahead of time, as `cayley.shipped`."""
    names = ("a_ptr", "a2_ptr", "a3_ptr", "a6_ptr", "sigma_ptr", "out_ptr")
    sums = ("squares_ptr", "sums2_ptr", "sums3_ptr")
    types = dict.fromkeys((*names, *sums), "*fp64") | {"first_ptr": "*i32"}
    given = _rows_options() | dict.fromkeys(sums)
    return [
        ("taylor_rows", _rows_kernel, types, _rows_options()),
        ("taylor_rows_scheduled", _rows_kernel, types, given),
    ]
