"""Times every chain: correctness against fp64 first, then all contenders interleaved.

Each round times composed eager, composed under torch.compile, the closed form and the kernel once,
in one process: the forward pass with its graph, the backward pass, and both. What is compared is
the median of the per-round ratios. Nothing is compiled where a turn takes longer than
``passes.SLOW``, on a GPU ``weights.COMPILED_ON_GPU``, or Inductor minutes. Where torch's
``orthogonal`` does the same job, it stands for composed. Chains are in training mode. Peers that
are installed come after, interleaved with ours, each with its distance from the constraint. Every
contender has the memory that a step holds, and on a GPU the times of the host and of the device
alone. Kernels read several weights together, as in ``tp.cached(model)``. Rows go to
``benchmarks/results/<device>/<chain>.json``, losses like wins. On a GPU every row has its floor,
``floor_us``: the bytes at the rate of a copy or the products at the rate of a product, whichever
takes longer, both measured in the same run.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import embedding, machine, measure, reads
from benchmarks.cases import SMALL_READS, Timed, rows
from benchmarks.clock import Clock
from benchmarks.rounds import Repeat
from benchmarks.rows import OURS, Row
from tests.cases import CASES
from tests.on_gpu import NO_GPU
from tests.resumed import BEGAN, UNTIL

KIND = os.environ.get("TRITONPARAM_BENCH_DEVICE") or "cpu"
if KIND == "cuda" and not torch.cuda.is_available():
    raise pytest.UsageError(f"TRITONPARAM_BENCH_DEVICE=cuda: {NO_GPU}")
BUDGET = float(os.environ.get(UNTIL) or "inf") - time.time()
OVERRUN = 30.0  # seconds beyond it, after which the row at work is cut off: compiling can take long
OUT = os.environ.get("TRITONPARAM_BENCH_OUT") or None
CLOCK = Clock(KIND)
READ_SIZE = {"cpu": 8, "cuda": 64}


class Results:
    """The rows of this run by chain, written as they come, so that one that is cut off keeps them.

    A chain's file is written anew by its first rows, after those of processes before this one in
    the same run; those of other chains stay as they are.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._rows: dict[str, list[Row]] = {}
        self._head: dict[str, Any] = {}

    def skip_if_spent(self) -> None:
        """Skip the test, or what is left of it, when the time is spent."""
        if time.monotonic() - self._started > BUDGET:
            pytest.skip("the time budget is spent")

    def add(self, name: str, found: list[Row]) -> None:
        """Rows of a chain."""
        if not self._head:
            self._head = {"machine": machine.describe(KIND)}
            if KIND == "cuda":
                self._head["rates"] = CLOCK.rates()
        here = Path(__file__).parent / "results" / machine.folder(KIND)
        folder = Path(OUT) if OUT else here
        folder.mkdir(parents=True, exist_ok=True)
        if name not in self._rows:
            self._rows[name] = _of_this_run(folder / f"{name}.json")
        table = self._rows[name]
        table += found
        content = json.dumps({**self._head, "rows": table}, indent=1)
        written = folder / f"{name}.json.part"  # the file is whole, or what was there before
        written.write_text(content + "\n")
        written.replace(folder / f"{name}.json")


def _of_this_run(path: Path) -> list[Row]:
    """The rows that an earlier process of this run has written there."""
    began = float(os.environ.get(BEGAN) or "inf")
    if not path.exists() or path.stat().st_mtime < began:
        return []
    return json.loads(path.read_text())["rows"]


@contextmanager
def cut_off(seconds: float) -> Iterator[None]:
    """Skip what runs in this block when so many seconds are over; never if they are infinite."""
    if seconds == float("inf"):
        yield
        return
    # Of a class that no compiler takes for an error of its own.
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.skip("the time budget is spent"))
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """Of all tests of this run."""
    with cut_off(BUDGET + OVERRUN):
        yield Results()


def _clocked(benchmark: Any) -> Repeat:
    """Repeat under pytest-benchmark's clock, which shows the last contender once."""

    def repeat(step: Any, before: Any, rounds: int) -> None:
        benchmark.pedantic(step, setup=before, rounds=rounds)

    return repeat


def _name(timed: Timed) -> str:
    shape = timed.shapes[0] if len(timed.shapes) == 1 else f"{len(timed.shapes)} layers"
    return f"{timed.name}-{shape}"


def test_read_without_gradient(benchmark: Any, results: Results) -> None:
    """What a read costs the host: on the CPU where the matrix costs nothing."""
    results.skip_if_spent()
    results.add("read", reads.read(CASES[0], READ_SIZE[KIND], CLOCK, _clocked(benchmark)))


@pytest.mark.parametrize(("name", "n", "backward"), SMALL_READS[KIND])
def test_read(name: str, n: int, backward: bool, benchmark: Any, results: Results) -> None:
    results.skip_if_spent()
    case = Timed(name, ((n, n),)).case
    results.add("read", reads.read(case, n, CLOCK, _clocked(benchmark), backward=backward))


@pytest.mark.parametrize("timed", rows(KIND), ids=_name)
def test_forward_backward(timed: Timed, benchmark: Any, results: Results) -> None:
    results.skip_if_spent()
    for found in measure.forward_backward(timed, CLOCK, _clocked(benchmark)):
        results.add(timed.name, found)
        for row in found:
            if row["contender"] in OURS:
                benchmark.extra_info[f"{row['phase']}: speedup"] = row["speedup_over_composed"]
        results.skip_if_spent()


@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp", "householder"])
def test_embedding(orthogonal_map: str, benchmark: Any, results: Results) -> None:
    """Registering, reading and differentiating a 30000×50 weight, and the memory that takes.

    torch's own would need a base of 30000 × 30000; there is nothing to compare with.
    """
    if KIND != "cpu":
        pytest.skip("on the CPU; a GPU times 30000×50 with the other tall weights")
    results.skip_if_spent()
    found: list[embedding.Run] = []
    benchmark.pedantic(lambda: found.append(embedding.run(orthogonal_map)), rounds=3)
    results.add("embedding", [embedding.row(orthogonal_map, found)])


@pytest.mark.parametrize("timed", [timed for timed in rows(KIND) if timed.graph], ids=_name)
def test_one_launch(timed: Timed, results: Results) -> None:
    """After all others: programs that wait for each other may wait without an end."""
    results.skip_if_spent()
    found = measure.one_launch(timed, CLOCK)
    if not found:
        pytest.skip("it has no rounds to carry out in one launch, or no graph holds them")
    results.add(timed.name, found)
