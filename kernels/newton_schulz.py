"""Cayley map of large matrices, and its gradient, as sequences of products: nothing is waited for.

The signatures are those of `kernels/cayley.py`, which computes what fits on one tile.
"""

import torch
import triton
import triton.language as tl

from tritonparam.kernels.gemm import Config, n_tiles, product, product_config
from tritonparam.kernels.gemm import candidates as product_candidates
from tritonparam.kernels.gemm import launches as product_launches
from tritonparam.kernels.launch import TRITON_DTYPE, compute_dtype, launch
from tritonparam.kernels.mirror import launches as square_launches
from tritonparam.kernels.mirror import skew_square
from tritonparam.kernels.rounds import Step, rounds
from tritonparam.kernels.rounds import candidates as round_candidates
from tritonparam.kernels.rounds import launches as round_launches
from tritonparam.kernels.rounds import n_launches as n_round_launches

# Enough for norms of X up to 3500, less what `_start_kernel` loses by its bound, at most a factor
# of (n / 2)^(1/4) and half of that for normal entries. Even, so that the result is in q.
ROUNDS = 16
ROUGH_UP_TO = 100.0  # the bound of ||X||^2 up to which TF32 products correct themselves

# Y <- s (Y R + Y) and R <- (I - Y) + X Y of every round but the last, which has a product of its
# own.
Q, Y, R, X = range(4)
STEPS = (
    Step((Q, Y), (R, R), (Y, Q), (Q, Y), beta=1.0, column=0, rough=ROUNDS),
    Step((X, X), (Y, Q), (R, R), (Y, Q), beta=-1.0, gamma=1.0, rough=ROUNDS - 3),
)


@triton.jit(do_not_specialize=["n_tiles"])
def _start_kernel(
    x_ptr,
    h_ptr,
    sums_ptr,
    q_ptr,
    y_ptr,
    factor_ptr,
    first_ptr,
    rough_ptr,
    arrived_ptr,
    n_cols,
    n_tiles,
    ROUNDS: tl.constexpr,
    ROUGH_UP_TO: tl.constexpr,
    TINY: tl.constexpr,
    SLACK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Where each matrix starts, and its schedule: from H = I - X^2 and the sums of its tiles,

        l >= ||H||,  c = 2 / (1 + l),  Y = c (I + X),  R = I - c H (over H).

    Eigenvalues of H come in pairs, with one 1 more if n is odd. Of n // 2 values with a given mean
    and mean square none is above mean + deviation sqrt(n // 2 - 1) (Samuelson 1968); SLACK is for
    what the sums lose. Round by round the least eigenvalue of (I - X) Y is at least a, and
    ||R|| <= r = 1 - a; the factor 2 / (1 + a (2 - a)) centres what Y + Y R leaves. The rounds are
    counted until r is below TINY, half of eps, from an a that has lost eps in rounding; the last
    has the factor 1, or NaN where ROUNDS rounds are not enough. They are aligned to their end:
    round `first` is the first that runs. Y goes to q where that is even, and to y where it is odd.
    """
    n_blocks = tl.cdiv(n_cols * n_cols, BLOCK)
    matrix = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    tile = tl.arange(0, BLOCK_TILES)
    trace = tl.zeros([BLOCK_TILES], ACC)
    squares = tl.zeros([BLOCK_TILES], ACC)
    sums_ptr += matrix * n_tiles * 2
    for tile0 in range(0, n_tiles, BLOCK_TILES):
        mask = tile0 + tile < n_tiles
        trace += tl.load(sums_ptr + (tile0 + tile) * 2, mask=mask, other=0.0)
        squares += tl.load(sums_ptr + (tile0 + tile) * 2 + 1, mask=mask, other=0.0)
    single = tl.cast(n_cols % 2, ACC)
    pairs = tl.maximum(n_cols // 2, 1).to(ACC)
    mean = (tl.sum(trace, axis=0) - single) / (2.0 * pairs)
    square = (tl.sum(squares, axis=0) - single) / (2.0 * pairs)
    variance = tl.maximum(square - mean * mean, 0.0) + SLACK * square
    bound = tl.maximum(mean + tl.sqrt(variance * (pairs - 1.0)), 1.0)
    c = 2.0 / (1.0 + bound) + (square - square)  # NaN if anything is not finite

    a = tl.maximum(c - 2.0 * TINY, 0.0)
    r = tl.where(a < 0.5, 1.0 - a, (bound - 1.0) / (bound + 1.0))
    needed = 1
    for _ in range(ROUNDS):
        m = a * (2.0 - a)
        a = 2.0 * m / (1.0 + m)
        r = tl.where(a < 0.5, 1.0 - a, r * r / (1.0 + m))  # r for small r, a for small a
        needed += tl.where(r < TINY, 0, 1)
    first = tl.maximum(ROUNDS - needed, 0)
    if block == 0:
        tl.store(first_ptr + matrix, first)
        tl.store(rough_ptr + matrix, tl.where(bound - 1.0 <= ROUGH_UP_TO, 1, 0))
        tl.store(arrived_ptr + matrix, 0)
        a = c
        for turn in range(ROUNDS):
            m = a * (2.0 - a)
            factor = tl.where(turn < ROUNDS - 1, 2.0 / (1.0 + m), 1.0)
            factor = tl.where(needed <= ROUNDS, factor, float("nan"))
            tl.store(factor_ptr + matrix * ROUNDS + turn, factor)
            a = tl.where(turn < first, a, m * factor)

    entry = block * BLOCK + tl.arange(0, BLOCK)
    mask = entry < n_cols * n_cols
    offset = matrix * n_cols * n_cols + entry
    eye = tl.where(entry % (n_cols + 1) == 0, 1.0, 0.0)
    h = tl.load(h_ptr + offset, mask=mask, other=0.0)
    tl.store(h_ptr + offset, eye - c * h, mask=mask)
    y = c * (tl.load(x_ptr + offset, mask=mask, other=0.0) + eye)
    if first % 2 == 0:
        tl.store(q_ptr + offset, y, mask=mask)
    else:
        tl.store(y_ptr + offset, y, mask=mask)


def fwd_config(n: int, dtype: torch.dtype, backend: str = "cuda") -> Config:
    """The default of the forward: that of its products."""
    return product_config(n, dtype, backend)


def bwd_config(n: int, dtype: torch.dtype, backend: str = "cuda") -> Config:
    """The default of the backward: that of its products."""
    return product_config(n, dtype, backend)


def candidates(phase: str, n: int, dtype: torch.dtype, backend: str = "cuda") -> list[Config]:
    """Configurations to measure for the products of a phase, the default first."""
    found = product_candidates(n, dtype, backend)
    return found + round_candidates(n, dtype, backend) if phase == "fwd" else found


def launches(phase: str, chain: str, n: int, dtype: torch.dtype, config: Config) -> list[tuple]:
    """Products that a phase launches, for compiling ahead of time, as in `cayley.launches`."""
    forms = {"fwd": [("full", "nnn")], "bwd": [("full", "ntn"), ("skew_gradient", "tnt")]}
    rows = product_launches(config, compute_dtype(dtype), forms[phase])
    if phase == "bwd":
        return rows
    rows += round_launches("cayley", STEPS, ROUNDS - 1, config, compute_dtype(dtype))
    return rows + square_launches(config, dtype, "skew")


def cayley_fwd(w: torch.Tensor, signature: torch.Tensor, config: Config) -> torch.Tensor:
    """Q = (I + X)(I - X)^{-1} diag(signature), X = triu(w, 1) - triu(w, 1)^T.

    `w` is [..., n, n] and `signature` [..., n], of any strides. Q is new and contiguous, in the
    compute dtype `torch.promote_types(w.dtype, torch.float32)`. Where w is not finite, or X too
    large for ROUNDS rounds, Q is NaN.

    Newton-Schulz for Y = (I - X)^{-1}: R = I - (I - X) Y and Y + Y R, scaled (`_start_kernel`).
    Tensor cores truncate their sums, so R is computed as (I - Y) + X Y, whose product is small
    where X is and has no I to cancel. Products are plain TF32 as long as the iteration corrects
    them: the last two residuals never are, as R^2 is what stays of an error in the one before the
    last, nor is the last product, as the last R may be as large as sqrt(eps).
    """
    q = torch.empty(w.shape, dtype=compute_dtype(w.dtype), device=w.device)
    if q.numel() == 0:
        return q
    d = signature.reshape(-1, w.size(-1))
    w = w.reshape(-1, *w.shape[-2:])
    n_matrices, n, _ = w.shape
    sums = q.new_empty(n_matrices, n_tiles(n, config, "symmetric"), 2)
    x, r = skew_square(w, config, alpha=-1.0, gamma=1.0, sums=sums)  # r is I - X^2
    q_flat, y = q.view_as(x), torch.empty_like(x)
    factor = x.new_empty(n_matrices, ROUNDS)
    first, rough, arrived = torch.empty(3, n_matrices, dtype=torch.int32, device=x.device)
    options = _start_options(q.dtype)
    grid = (n_matrices * triton.cdiv(n * n, options["BLOCK"]),)
    counts, sizes = (first, rough, arrived), (n, sums.size(1))
    launch(_start_kernel, grid, x, r, sums, q_flat, y, factor, *counts, *sizes, **options)
    counted = {"first": first, "arrived": arrived, "scales": factor, "rough": rough}
    rounds(STEPS, ROUNDS - 1, (q_flat, y, r, x), config, **counted)
    last = {"alpha": 2, "beta": 2, "gamma": -1, "u": d, "v": d, "scale": factor[:, -1]}
    product(y, r, config, c=y, out=q_flat, **last)
    return q


def cayley_bwd(
    g: torch.Tensor,
    q: torch.Tensor,
    signature: torch.Tensor,
    dtype: torch.dtype,
    config: Config,
) -> torch.Tensor:
    """The gradient of w from `g`, that of Q, both [..., n, n] in the compute dtype.

    `q` is what `cayley_fwd` returned; the result is new and contiguous, in `dtype`.

    With D = diag(signature) and T = G (Q + D)^T it is triu(Z - Z^T, 1) / 2,
    Z = D (Q + D)^T T, computed as Z^T = T^T Q D + T^T.
    """
    dw = torch.empty(q.shape, dtype=dtype, device=q.device)
    if dw.numel() == 0:
        return dw
    n = q.size(-1)
    g, q, d = g.reshape(-1, n, n), q.reshape(-1, n, n), signature.reshape(-1, n)
    t = product(g, q.mT, config, c=g, v=d)
    product(
        t.mT,
        q,
        config,
        alpha=-0.5,
        u=d,
        c=t.mT,
        beta=-0.5,
        form="skew_gradient",
        out=dw.view(-1, n, n),
    )
    return dw


def n_launches(config: Config) -> tuple[int, int]:
    """Of `cayley_fwd` with this configuration: X with I - X^2, the start, the rounds and the last
    product; and of `cayley_bwd`: two products."""
    return 3 + n_round_launches(STEPS, ROUNDS - 1, config), 2


def _start_options(dtype: torch.dtype) -> dict:
    options: dict = {"ROUNDS": ROUNDS, "ROUGH_UP_TO": ROUGH_UP_TO, "BLOCK_TILES": 256}
    eps = torch.finfo(dtype).eps
    options |= {"TINY": eps / 2, "SLACK": 100 * eps}
    # Every program reads all sums: it shall have as much else to do.
    options |= {"BLOCK": 4096, "ACC": TRITON_DTYPE[dtype]}
    return options | {"num_warps": 8, "enable_fp_fusion": True}


def shipped(backend: str) -> list[tuple]:
    """Launches for compiling ahead of time, as in `cayley.shipped`; `gemm` has the products."""
    rows: list[tuple] = []
    for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        types = {f"{x}_ptr": f"*{name}" for x in ("x", "h", "sums", "q", "y", "factor")}
        types |= dict.fromkeys(("first_ptr", "rough_ptr", "arrived_ptr"), "*i32")
        rows.append((f"newton_schulz_{name}", _start_kernel, types, _start_options(dtype)))
    for config in round_candidates(128, torch.float32, backend)[:1]:
        rows += round_launches("cayley", STEPS, ROUNDS - 1, config, torch.float32)
    return rows
