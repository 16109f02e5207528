"""exp of larger skew or symmetric matrices and its gradient, as sequences of products.

The algorithms are those of `expm`: the polynomial c(B) + A s(B) of A / 2^s, B = A^2, by Horner in
A^4, and s squarings; for the gradient M <- M Z^T + Z^T M over the squarings of Z, then the series
of sinhc in commutators with A, by Horner. Nothing is decided by the host: a schedule on the device
scales each matrix, and the rounds that it does not need return at once, the first ones, so that
the result always lands in the same buffer.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from tritonparam.kernels.even_odd import EVEN_ODD, THETA
from tritonparam.kernels.gemm import Config, n_tiles, product, product_config
from tritonparam.kernels.gemm import candidates as product_candidates
from tritonparam.kernels.gemm import launches as product_launches
from tritonparam.kernels.launch import NAME, TRITON_DTYPE, compute_dtype, flatten, launch
from tritonparam.kernels.mirror import launches as square_launches
from tritonparam.kernels.mirror import skew_square, symmetric_square
from tritonparam.kernels.rounds import Step, rounds
from tritonparam.kernels.rounds import candidates as round_candidates
from tritonparam.kernels.rounds import launches as round_launches
from tritonparam.kernels.rounds import n_launches as n_round_launches
from tritonparam.kernels.tile import exponent, growth_of, power_of_two

# Squarings that are launched: enough for ||A|| <= THETA 2^ROUNDS = 8192. Beyond that exp is NaN.
ROUNDS = 12

# A tensor core truncates its sums, and squarings double what that makes of a symmetric matrix. Up
# to this n torch's rounding is less: there they are sums in fp32.
EXACT_MAX_N = 128

# Columns of the schedule. From GROWTH on stands what the matrices are multiplied with before each
# round and after the last, from SERIES on the scales of the commutators.
SIGMA, POLYNOMIAL, LAST_POLYNOMIAL, HALF_POLYNOMIAL, GRADIENT, GROWTH = range(6)
SERIES = GROWTH + ROUNDS + 1

# Y <- Y^2 of every round; of its gradient, from the right, M <- M Z^T + Z^T M and Z <- Z^2. What
# symmetric matrices have in a round is scaled by the growth before it, or for squares after it.
Z, Z_NEXT, M, M_NEXT, X = (0, 1), (1, 0), (2, 3), (3, 2), (4, 4)
SQUARE = {-1: Step(Z, Z, Z_NEXT), 1: Step(Z, Z, Z_NEXT, form="symmetric", column=GROWTH + 1)}
_FORTH = {sign: step._replace(turns=ROUNDS - 1, waits=False) for sign, step in SQUARE.items()}
BACK = {
    -1: (
        Step(M, Z, X, trans_b=True),
        _FORTH[-1],
        Step(Z, M, M_NEXT, X, trans_a=True, beta=1.0),
    ),
    1: (Step(M, Z, M_NEXT, form="sum", column=GROWTH), _FORTH[1]),
}


@triton.jit(do_not_specialize=["n_tiles", "n_columns"])
def _schedule_kernel(
    sums_ptr,
    mu_ptr,
    schedule_ptr,
    first_ptr,
    n_tiles,
    n_columns,
    SIGN: tl.constexpr,
    ODD: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """sigma = 2^-s and what follows from it, from ||A^4||_F; one program per matrix.

    With e^mu, the growth, multiplied on before the last min(s, 3) squarings, as in `expm`.
    """
    matrix = tl.program_id(0).to(tl.int64)
    sums_ptr += matrix * n_tiles * 2
    tile = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], ACC)
    for start in range(0, n_tiles, BLOCK):
        inside = start + tile < n_tiles
        squares += tl.load(sums_ptr + 2 * (start + tile) + 1, mask=inside, other=0.0)
    square = tl.sum(squares, axis=0).to(tl.float32)
    if SIGN == -1:
        square = square * 0.5  # eigenvalues come in pairs
    norm = tl.sqrt(tl.sqrt(tl.sqrt(square)))
    s = tl.maximum(exponent(norm * (1.0 / THETA)), 0)
    too_large = s > ROUNDS  # or not a number
    s = tl.minimum(s, ROUNDS)
    sigma = tl.where(too_large, float("nan"), power_of_two(-s)).to(ACC)
    fourth = sigma * sigma * sigma * sigma
    tl.store(first_ptr + matrix, ROUNDS - s)
    schedule_ptr += matrix * n_columns
    tl.store(schedule_ptr, sigma)
    tl.store(schedule_ptr + 1, fourth)
    tl.store(schedule_ptr + 3, fourth * 0.0625)
    if SIGN == -1:
        tl.store(schedule_ptr + 2, fourth)
        tl.store(schedule_ptr + 4, sigma)
    else:
        last = tl.minimum(s, 3)
        growth = growth_of(tl.load(mu_ptr + matrix), last)
        tl.store(schedule_ptr + 2, fourth * tl.where(s == last, growth, 1.0))
        tl.store(schedule_ptr + 4, 2.0 * sigma)
        for turn in range(ROUNDS + 1):
            tl.store(schedule_ptr + 5 + turn, tl.where(turn == ROUNDS - last, growth, 1.0))
    for k in tl.static_range(len(ODD) - 1):
        ratio = tl.full([], ODD[k + 1] / ODD[k], ACC)
        tl.store(schedule_ptr + 6 + ROUNDS + k, sigma * sigma * 0.25 * ratio)


@triton.jit(do_not_specialize=["n_matrices", "n_entries", "n_cols", "n_columns"])
def _blocks_kernel(
    a_ptr,
    b_ptr,
    k_ptr,
    schedule_ptr,
    out_ptr,
    arrived_ptr,
    n_matrices,
    n_entries,
    n_cols,
    n_columns,
    HALF: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Blocks j of c(B) + A s(B), of A sigma, or with HALF of A sigma / 2, out[j].

    EVEN[2j] I + ODD[2j] A + EVEN[2j + 1] B + ODD[2j + 1] A B; all but the last are divided by
    the fourth power of the factor, with which each step of Horner's scheme is multiplied.
    """
    if tl.program_id(0) == 0:
        tl.store(arrived_ptr, 0)
    matrix = (tl.program_id(0) // tl.cdiv(n_entries, BLOCK)).to(tl.int64)
    entry = tl.program_id(0) % tl.cdiv(n_entries, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < n_entries
    offset = matrix * n_entries + entry
    scale = tl.load(schedule_ptr + matrix * n_columns)
    if HALF:
        scale = scale * 0.5
    a = tl.load(a_ptr + offset, mask=mask, other=0.0) * scale
    b = tl.load(b_ptr + offset, mask=mask, other=0.0) * (scale * scale)
    k = tl.load(k_ptr + offset, mask=mask, other=0.0) * (scale * scale * scale)
    diagonal = tl.where(entry // n_cols == entry % n_cols, 1.0, 0.0).to(ACC)
    back = 1.0 / (scale * scale * scale * scale)
    for j in tl.static_range(len(EVEN) // 2):
        block = diagonal * tl.full([], EVEN[2 * j], ACC) + a * tl.full([], ODD[2 * j], ACC)
        block += b * tl.full([], EVEN[2 * j + 1], ACC) + k * tl.full([], ODD[2 * j + 1], ACC)
        if j < len(EVEN) // 2 - 1:
            block *= back
        tl.store(out_ptr + (j * n_matrices * n_entries.to(tl.int64) + offset), block, mask=mask)


def prepare(w: torch.Tensor, sign: int, config: Config) -> tuple[torch.Tensor, ...]:
    """What `expm_bwd` needs: the first active round, the schedule, A, A^2, A^4 and A^3; of an empty
    batch nothing."""
    if w.numel() == 0:
        return ()
    w = w.reshape(-1, *w.shape[-2:])
    mu = None
    if sign == -1:
        a, b = skew_square(w, config)
    else:
        a, b, mu = symmetric_square(w, config)
    tiles = n_tiles(w.size(1), config, "symmetric")
    sums = torch.empty((w.size(0), tiles, 2), dtype=a.dtype, device=a.device)
    b2 = product(b, b, config, form="symmetric", sums=sums)
    k = product(a, b, config, form=_form(sign, "skew"))
    odd = EVEN_ODD[sign, a.dtype][1]
    n_columns = SERIES + len(odd) - 1
    schedule = torch.empty((w.size(0), n_columns), dtype=a.dtype, device=a.device)
    first = torch.empty(w.size(0), dtype=torch.int32, device=a.device)
    options = _schedule_options(sign, a.dtype)
    launch(_schedule_kernel, (w.size(0),), sums, mu, schedule, first, tiles, n_columns, **options)
    return first, schedule, a, b, b2, k


def expm_fwd(
    w: torch.Tensor, sign: int, config: Config
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """exp(A), A = triu(w, 1) - triu(w, 1)^T for sign -1, triu(w) + triu(w, 1)^T for sign 1.

    `w` is [..., n, n] of any strides. The result is new and contiguous, in the compute dtype
    `torch.promote_types(w.dtype, torch.float32)`; beside it stands what `expm_bwd` needs.
    """
    if w.numel() == 0:
        return torch.empty(w.shape, dtype=compute_dtype(w.dtype), device=w.device), ()
    saved = prepare(w, sign, config)
    first, schedule = saved[:2]
    y, arrived = _polynomial(saved, sign, config, half=False)
    counted = {"first": first, "arrived": arrived, "scales": schedule}
    buffers = (y, y.clone())
    rounds((SQUARE[sign],), ROUNDS, buffers, _rounds_config(config, sign, y.size(1)), **counted)
    return buffers[ROUNDS % 2].view(w.shape), saved


def expm_bwd(
    g: torch.Tensor,
    w: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    sign: int,
    config: Config,
) -> torch.Tensor:
    """The gradient of `w` from `g` [..., n, n], that of exp(A), both in the compute dtype.

    `saved` is what `prepare` returned for `w`.
    """
    if g.numel() == 0:
        return torch.empty(g.shape, dtype=g.dtype, device=g.device)
    first, schedule, a, _, _, _ = saved
    z, _ = _polynomial(saved, sign, config, half=True)
    m = product(flatten(g, 2), z.mT, config)
    if sign == -1:
        m = product(z.mT, m, config)
    else:
        m = product(z, m, config, alpha=0.5, scale=schedule[:, GROWTH + ROUNDS], form="sum")
    # Z_h: more exact than the square of Z_(h/2)
    z, arrived = _polynomial(saved, sign, config, half=False)
    counted = {"first": first, "arrived": arrived, "scales": schedule}
    buffers = (z, z.clone(), m, m.clone(), torch.empty_like(m))
    rounds(BACK[sign], ROUNDS, buffers, _rounds_config(config, sign, z.size(1)), **counted)
    m = buffers[M[ROUNDS % 2]]
    t = m - m.mT if sign == -1 else m
    p = t
    for i in reversed(range(schedule.size(1) - SERIES)):
        x = product(a, p, config, scale=schedule[:, SERIES + i], form="difference")
        end = {"form": _form(sign, "difference", "sum")}
        if i == 0:
            end = {"form": _form(sign, "skew_gradient", "symmetric_gradient")}
            end |= {"scale": schedule[:, GRADIENT]}
        p = product(a, x, config, c=t, beta=0.5, **end)
    return p.view(g.shape)


def n_launches(sign: int, dtype: torch.dtype, fwd: Config, bwd: Config) -> tuple[int, int]:
    """Of `expm_fwd` and `expm_bwd`, in the compute dtype, with these configurations."""
    even, odd = EVEN_ODD[sign, dtype]
    prepared = 4  # A with A^2, A^4, A^3, the schedule
    polynomial = len(even) // 2  # the blocks, and Horner's products
    series = 2 * (len(odd) - 1)
    forward = n_round_launches((SQUARE[sign],), ROUNDS, fwd)
    backward = n_round_launches(BACK[sign], ROUNDS, bwd)
    return prepared + polynomial + forward, 2 * polynomial + 2 + backward + series


def _rounds_config(config: Config, sign: int, n: int) -> Config:
    if sign == -1 or n > EXACT_MAX_N or config.precision == "ieee":
        return config
    return replace(config, precision="ieee", block=32, block_k=16)  # slices are in registers


def _form(sign: int, of_skew: str, of_symmetric: str = "symmetric") -> str:
    return of_skew if sign == -1 else of_symmetric


def _polynomial(
    saved: tuple[torch.Tensor, ...], sign: int, config: Config, *, half: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(A sigma), or of half of that, and an int32 that is 0."""
    _, schedule, a, b, b2, k = saved
    n_matrices, n, _ = a.shape
    even, _ = EVEN_ODD[sign, a.dtype]
    blocks = torch.empty((len(even) // 2, *a.shape), dtype=a.dtype, device=a.device)
    grid = (n_matrices * triton.cdiv(n * n, _BLOCK),)
    sizes = (n_matrices, n * n, n, schedule.size(1))
    options = _blocks_options(sign, a.dtype, half)
    arrived = torch.empty(1, dtype=torch.int32, device=a.device)
    launch(_blocks_kernel, grid, a, b, k, schedule, blocks, arrived, *sizes, **options)
    y = blocks[-1]
    for j in reversed(range(len(even) // 2 - 1)):
        column = HALF_POLYNOMIAL if half else POLYNOMIAL if j else LAST_POLYNOMIAL
        scale = schedule[:, column]
        y = product(b2, y, config, c=blocks[j], scale=scale, form=_form(sign, "full"))
    return y, arrived


_BLOCK = 1024  # entries of a program


def _schedule_options(sign: int, dtype: torch.dtype) -> dict:
    options = {"SIGN": sign, "ODD": EVEN_ODD[sign, dtype][1], "ROUNDS": ROUNDS, "BLOCK": 64}
    return options | {"ACC": TRITON_DTYPE[dtype], "num_warps": 1, "enable_fp_fusion": True}


def _blocks_options(sign: int, dtype: torch.dtype, half: bool) -> dict:
    even, odd = EVEN_ODD[sign, dtype]
    options = {"HALF": half, "EVEN": even, "ODD": odd, "BLOCK": _BLOCK}
    return options | {"ACC": TRITON_DTYPE[dtype], "num_warps": 4, "enable_fp_fusion": True}


def config(n: int, dtype: torch.dtype, backend: str = "cuda") -> Config:
    """The default for n x n matrices, that of every product."""
    return product_config(n, dtype, backend)


def candidates(phase: str, n: int, dtype: torch.dtype, backend: str = "cuda") -> list[Config]:
    """Configurations to measure for the products of a phase, the default first."""
    return product_candidates(n, dtype, backend) + round_candidates(n, dtype, backend)


def launches(phase: str, chain: str, n: int, dtype: torch.dtype, config: Config) -> list[tuple]:
    """Products that a phase launches, for compiling ahead of time, as in `cayley.launches`."""
    kind = chain.removesuffix("_exp")
    forms = {
        "fwd": [("full", "tnn"), (kind, "tnt")],
        "bwd": [("sum", "tnt"), ("difference", "tnt")],
    }
    sign = -1 if kind == "skew" else 1
    steps = (SQUARE[sign],) if phase == "fwd" else BACK[sign]
    compute, of_rounds = compute_dtype(dtype), _rounds_config(config, sign, n)
    rows = product_launches(config, compute, forms[phase])
    if of_rounds != config:
        rows += product_launches(of_rounds, compute, _EXACT_FORMS[phase])
    rows += round_launches(f"{chain}_{phase}", steps, ROUNDS, of_rounds, compute)
    return rows + (square_launches(config, dtype, kind) if phase == "fwd" else [])


_EXACT_FORMS = {"fwd": [("symmetric", "nnn")], "bwd": [("sum", "nnn"), ("symmetric", "nnn")]}


def shipped(backend: str) -> list[tuple]:
    """What is launched beside products, for compiling ahead of time, as `cayley.shipped`."""
    rows: list[tuple] = []
    for (sign, dtype), _ in EVEN_ODD.items():
        acc, label = f"*{NAME[dtype]}", f"{'skew' if sign == -1 else 'symmetric'}_{NAME[dtype]}"
        types = dict.fromkeys(("sums_ptr", "mu_ptr", "schedule_ptr"), acc) | {"first_ptr": "*i32"}
        options = _schedule_options(sign, dtype)
        rows.append((f"expm_schedule_{label}", _schedule_kernel, types, options))
        types = dict.fromkeys(("a_ptr", "b_ptr", "k_ptr", "schedule_ptr", "out_ptr"), acc)
        types |= {"arrived_ptr": "*i32"}
        options = _blocks_options(sign, dtype, True)
        rows.append((f"expm_blocks_{label}", _blocks_kernel, types, options))
    exact = _rounds_config(config(EXACT_MAX_N, torch.float32, backend), 1, EXACT_MAX_N)
    rows += product_launches(exact, torch.float32, _EXACT_FORMS["bwd"])
    for numbers in round_candidates(EXACT_MAX_N, torch.float32, backend)[:1]:
        for sign, kind in ((-1, "skew"), (1, "symmetric")):
            of_rounds = _rounds_config(numbers, sign, EXACT_MAX_N)
            rows += round_launches(f"{kind}_exp_bwd", BACK[sign], ROUNDS, of_rounds, torch.float32)
    return rows
