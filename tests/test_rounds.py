"""Rounds of products in one launch are those of a launch for each product, to the last bit."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from tests.interpreter import at_once
from tests.test_gemm import CONFIG, DEVICE, randn
from tritonparam.kernels import expm_gemm, newton_schulz
from tritonparam.kernels.rounds import Step, candidates, rounds

pytestmark = pytest.mark.usefixtures("poisoned_memory")
N_ROUNDS = 3
X, X_NEXT, Y, Y_NEXT, A, A_NEXT = (0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)
# What a round reads and writes changes with it; two products do not wait for each other.
STEPS = (
    Step(X, A, X_NEXT, Y, alpha=0.5, beta=0.1, gamma=-1.0, column=1, rough=2),
    Step(Y, Y, Y_NEXT, form="symmetric", trans_b=True, turns=N_ROUNDS - 1, waits=False),
    Step(A, X_NEXT, A_NEXT, trans_a=True, form="sum", alpha=0.2),
)


def results(config, first, dtype, steps=STEPS):
    torch.manual_seed(0)
    n_matrices, n = len(first), 40
    buffers = tuple(randn(n_matrices, n, n, dtype=dtype) / 4 for _ in range(6))
    ints = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (first, [1, 0], [0])]
    scales = randn(n_matrices, N_ROUNDS + 1, dtype=dtype)
    counted = {"first": ints[0], "rough": ints[1], "arrived": ints[2], "scales": scales}
    rounds(steps, N_ROUNDS, buffers, config, **counted)
    return buffers


@pytest.mark.parametrize(
    ("first", "programs", "dtype"),
    [((1, 2), 5, torch.float32), ((3, 2), 64, torch.float64), ((3, 3), 2, torch.float32)],
)
def test_one_launch_is_the_sequence(first, programs, dtype, monkeypatch):
    config = CONFIG[dtype]
    expected = results(config, first, dtype)
    if DEVICE == "cpu":
        at_once(monkeypatch)
    found = results(replace(config, programs=programs), first, dtype)
    assert all(map(torch.equal, found, expected))


def cayley(w, config):
    d = torch.ones(w.shape[:-1], dtype=w.dtype, device=w.device)
    return [newton_schulz.cayley_fwd(w, d, config)]


def exponential(w, config, sign):
    y, saved = expm_gemm.expm_fwd(w, sign, config)
    return [y, expm_gemm.expm_bwd(w.mT, w, saved, sign, config)]


MAPS = {
    "cayley": cayley,
    "skew_exp": partial(exponential, sign=-1),
    "symmetric_exp": partial(exponential, sign=1),
}


def original(n, dtype):
    return 4 * randn(1, n, n, dtype=dtype) / n**0.5


# A GPU's kernels take long to compile: those of a test are of one dtype and one kind of tile.
TILES = {(config.block, config.block_k): None for config in candidates(512, torch.float32)}
CASES = list(product(CONFIG, TILES)) if DEVICE == "cuda" else [(torch.float32, (32, 32))]


@pytest.mark.parametrize(("dtype", "tile"), CASES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_maps_take_either(name, dtype, tile, monkeypatch):
    """Whatever their rounds are given, one launch makes of it what the sequence does."""
    cases = [(original(5, dtype), replace(CONFIG[dtype], programs=1))]
    if DEVICE == "cuda":
        cases = [
            (original(n, dtype), config)
            for n in (65, 100, 130, 256, 512)
            for config in candidates(n, dtype)
            if (config.block, config.block_k) == tile
        ]
    same = []

    def both(steps, n_rounds, buffers, config, *, arrived, **counted):
        assert arrived[0] == 0
        copies = tuple(x.clone() for x in buffers)
        rounds(steps, n_rounds, copies, config, arrived=arrived, **counted)
        rounds(steps, n_rounds, buffers, replace(config, programs=0), arrived=arrived, **counted)
        for x, y in zip(buffers, copies, strict=True):
            same.append(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)))
        assert counted["first"][0] < n_rounds - 1

    for file in (newton_schulz, expm_gemm):
        monkeypatch.setattr(file, "rounds", both)
    for w, config in cases:
        MAPS[name](w, config)
    assert same
    assert all(same)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", MAPS)
def test_one_launch_can_be_captured(name):
    config, w = candidates(256, torch.float32)[0], original(256, torch.float32)
    MAPS[name](w, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = MAPS[name](w, config)
    w.mul_(-0.5)
    for _ in range(2):  # the count of programs that have arrived begins anew
        graph.replay()
    for x, y in zip(found, MAPS[name](w, config), strict=True):
        assert torch.equal(x, y)
