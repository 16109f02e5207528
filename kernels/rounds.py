"""Rounds of products, of which each matrix skips the first: in a launch each, or all in one.

A launch costs the host several microseconds, and a node of a captured graph one or two, even where
every program returns at once. All rounds in one launch cost that once, and rounds that nobody needs
nothing; but between two products its programs wait for each other, which takes an atomic operation
and two or three reads of L2 one after another, as long as a node or less. And all of them must run
at once, with the registers of the largest product and few tiles in flight. So one launch may win
for a few matrices up to n = 512, and the sequence where there is more work: a tuner is to say.
"""

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tritonparam.kernels.gemm import Config, launch_options, n_tiles, product, product_config
from tritonparam.kernels.launch import NAME, TRITON_DTYPE, launch
from tritonparam.kernels.tile_grid import product_tile, tiles_of

_FORMS = ("full", "symmetric", "sum")


class Step(NamedTuple):
    """A product of every round, as `gemm.product` takes it.

    a, b, out, c: the numbers of its buffers in even and in odd turns; c is not read without beta.
    trans_a, trans_b: whether the transpose of a buffer is the factor.
    column: of the table of scales, that of turn 0, beside it that of turn 1; below 0 there is none.
    rough: the turn from which on matrices are not rough.
    turns: the turn from which on there is no such product.
    waits: whether the steps since the last that waited write what this reads, or the other way.
    """

    a: tuple[int, int]
    b: tuple[int, int]
    out: tuple[int, int]
    c: tuple[int, int] = (0, 0)
    trans_a: bool = False
    trans_b: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    form: str = "full"
    column: int = -1
    rough: int = 0
    turns: int = 1 << 20
    waits: bool = True


@triton.jit
def _wait(arrived_ptr, expected):
    """Go on when so many programs have arrived, with all that they had written in sight.

    A program's threads write, then meet, then one of them releases; one acquires, then the threads
    of its program meet, then they read. That is ordered (PTX ISA, causality order), as the acquire
    drops what L1 holds.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < expected:
        pass
    tl.debug_barrier()


@triton.jit
def _smallest(ptr, n, MOST: tl.constexpr):
    """The smallest of n numbers up to MOST."""
    found = tl.full([128], MOST, tl.int32)
    for start in range(0, n, 128):
        at = start + tl.arange(0, 128)
        found = tl.minimum(found, tl.load(ptr + at, mask=at < n, other=MOST))
    return tl.min(found, axis=0)


@triton.jit(do_not_specialize=["n_matrices"])
def _rounds_kernel(
    buffers,
    scale_ptr,
    first_ptr,
    rough_ptr,
    arrived_ptr,
    n_matrices,
    n,
    scale_stride,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The rounds from the first that a matrix needs, by programs that all run at once.

    Each takes every so manyth tile of a product, or of several that do not wait for each other.
    STEPS has the numbers of `_numbers`, in a row: Triton 3.6 knows no tuples in tuples.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    size = tl.cast(n, tl.int64) * n
    start = _smallest(first_ptr, n_matrices, ROUNDS)
    expected = 0
    for turn in range(start, ROUNDS):
        even = turn % 2 == 0
        taken = 0
        for step in tl.static_range(0, len(STEPS), WIDTH):
            if STEPS[step + 17]:
                taken = 0
                if step > 0 or turn > start:
                    expected += programs
                    _wait(arrived_ptr, expected)
            a = (tl.where(even, buffers[STEPS[step]], buffers[STEPS[step + 1]]), size, n)
            b = (tl.where(even, buffers[STEPS[step + 2]], buffers[STEPS[step + 3]]), size, n)
            out_ptr = tl.where(even, buffers[STEPS[step + 4]], buffers[STEPS[step + 5]])
            c = None
            if STEPS[step + 11] != 0:
                c = (tl.where(even, buffers[STEPS[step + 6]], buffers[STEPS[step + 7]]), size, n)
            tiles = tiles_of(n, n, "symmetric" if STEPS[step + 13] else "full", BLOCK)
            total = tl.where(turn < STEPS[step + 16], n_matrices * tiles, 0)
            own = (program + programs - taken % programs) % programs
            taken += total
            for unit in range(own, total, programs):
                matrix = (unit // tiles).to(tl.int64)
                if turn >= tl.load(first_ptr + matrix):
                    rough = None
                    if STEPS[step + 15] > 0 and rough_ptr is not None:
                        rough = tl.where(turn < STEPS[step + 15], tl.load(rough_ptr + matrix), 0)
                    scale = None
                    if STEPS[step + 14] >= 0:
                        scale = (scale_ptr + (STEPS[step + 14] + turn), scale_stride)
                    product_tile(
                        matrix,
                        unit % tiles,
                        a,
                        b,
                        c,
                        out_ptr,
                        None,
                        None,
                        scale,
                        rough,
                        None,
                        (n, n, n),
                        *(STEPS[step + 10], STEPS[step + 11], STEPS[step + 12]),
                        *(STEPS[step + 8], STEPS[step + 9], False),
                        # A name of its own would be no constant.
                        ("full" if STEPS[step + 13] == 0 else "symmetric")
                        if STEPS[step + 13] < 2
                        else "sum",
                        *(BLOCK, BLOCK_K, GROUP, PRECISION, ACC),
                    )


def rounds(
    steps: tuple[Step, ...],
    n_rounds: int,
    buffers: tuple[torch.Tensor, ...],
    config: Config,
    *,
    first: torch.Tensor,
    arrived: torch.Tensor,
    scales: torch.Tensor,
    rough: torch.Tensor | None = None,
) -> None:
    """Carry out the steps of rounds 0 to n_rounds - 1, of each matrix from round `first` on.

    Arguments:
        buffers: contiguous [matrices, n, n], of one dtype, fp32 or fp64.
        config: with `programs`, at most so many in one launch; without, a launch for each product.
        first: int32 [matrices].
        arrived: int32 [1] or more, the first of which is 0 and is not kept.
        scales: [matrices, columns], of which rows are contiguous.
        rough: as for `gemm.product`.
    """
    if config.programs:
        n_matrices, n, _ = buffers[0].shape
        dtype = buffers[0].dtype
        counts = (first, rough if dtype == torch.float32 else None, arrived)
        grid = (min(config.programs, n_matrices * _most_tiles(steps, n, config)),)
        options = _options(steps, n_rounds, config, dtype)
        sizes = (n_matrices, n, scales.stride(0))
        launch(_rounds_kernel, grid, buffers, scales, *counts, *sizes, **options)
        return
    for turn in range(n_rounds):
        for step in steps:
            if turn < step.turns:
                a, b, out, c = (buffers[x[turn % 2]] for x in step[:4])
                product(
                    a.mT if step.trans_a else a,
                    b.mT if step.trans_b else b,
                    config,
                    out=out,
                    alpha=step.alpha,
                    c=c if step.beta else None,
                    beta=step.beta or 1.0,
                    gamma=step.gamma,
                    scale=None if step.column < 0 else scales[:, step.column + turn],
                    form=step.form,
                    first=first,
                    turn=turn,
                    rough=rough if turn < step.rough else None,
                )


def _most_tiles(steps: tuple[Step, ...], n: int, config: Config) -> int:
    """Of a matrix, between two waits."""
    most = tiles = 0
    for step in steps:
        tiles = n_tiles(n, config, step.form) + (0 if step.waits else tiles)
        most = max(most, tiles)
    return most


def n_launches(steps: tuple[Step, ...], n_rounds: int, config: Config) -> int:
    """Of `rounds`."""
    return 1 if config.programs else sum(min(n_rounds, step.turns) for step in steps)


def candidates(n: int, dtype: torch.dtype, backend: str = "cuda") -> list[Config]:
    """Configurations with one launch to measure for a map of n x n matrices.

    With 8 warps a processor runs one program, of which an A100 has 108 and an H100 at most 132: 128
    may not fit, and are then discarded. None for larger matrices, whose products outlast a launch,
    nor for hip, for which nobody has looked at what the barrier compiles to.
    """
    if backend != "cuda" or n > 512:
        return []
    precision = product_config(n, dtype, backend).precision
    return [
        Config(block, block_k, precision, num_warps=8, programs=programs)
        for programs in (64, 128)
        for block, block_k in ((32, 32), (64, 16))
    ]


def _numbers(step: Step) -> tuple:
    return *itertools.chain(*step[:4]), *step[4:9], _FORMS.index(step.form), *step[10:]


@lru_cache(64)
def _options(steps: tuple[Step, ...], n_rounds: int, config: Config, dtype: torch.dtype) -> dict:
    numbers = tuple(itertools.chain(*map(_numbers, steps)))
    options: dict = {"STEPS": numbers, "WIDTH": len(numbers) // len(steps), "ROUNDS": n_rounds}
    options |= {"BLOCK": config.block, "BLOCK_K": config.block_k, "GROUP": config.group}
    options |= {"PRECISION": config.precision, "ACC": TRITON_DTYPE[dtype]}
    return options | launch_options(config) | {"maxnreg": 255, "launch_cooperative_grid": True}


def launches(
    name: str, steps: tuple[Step, ...], n_rounds: int, config: Config, dtype: torch.dtype
) -> list[tuple]:
    """The launch if it is one, for compiling ahead of time, as in `cayley.launches`."""
    if not config.programs:
        return []
    pointer = f"*{NAME[dtype]}"
    types: dict = {"buffers": (pointer,) * (1 + max(max(x) for step in steps for x in step[:4]))}
    types |= {"scale_ptr": pointer} | dict.fromkeys(("first_ptr", "arrived_ptr"), "*i32")
    options = _options(steps, n_rounds, config, dtype)
    if any(step.rough for step in steps) and dtype == torch.float32:
        types["rough_ptr"] = "*i32"
    else:
        options["rough_ptr"] = None
    return [(f"{name}_rounds_{config.block}_{NAME[dtype]}", _rounds_kernel, types, options)]
