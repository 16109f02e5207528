"""Times every chain: correctness against fp64 first, then all contenders interleaved.

Each round times composed eager, composed under torch.compile, the closed form and the kernel once,
in one process; what is compared is the median of the per-round ratios. Where torch's
``orthogonal`` does the same job, it stands for composed. Chains are in training mode. Peers that
are installed come after, interleaved with ours, each with its distance from the constraint. Every
contender has the memory that a step holds, and on a GPU the times of the host and of the device
alone. Rows go to ``benchmarks/results/<device>/<chain>.json``, losses like wins. On a GPU every row
has its floor, ``floor_us``: the bytes at the rate of a copy or the products at the rate of a
product, whichever takes longer, both measured in the same run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks import machine, measure
from benchmarks.cases import SMALL_READS, Timed, rows
from benchmarks.clock import Clock
from benchmarks.rows import OURS
from tests.cases import CASES

KIND = os.environ.get("TRITONPARAM_BENCH_DEVICE") or "cpu"
BUDGET = float(os.environ.get("TRITONPARAM_BENCH_BUDGET") or "inf")
OUT = os.environ.get("TRITONPARAM_BENCH_OUT") or None
CLOCK = Clock(KIND)
READ_SIZE = {"cpu": 8, "cuda": 64}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Rows by chain; written after every case, so that a run that is cut off keeps them."""
    return {"started": time.monotonic()}


def _write(name: str, results: list[dict[str, Any]]) -> None:
    here = Path(__file__).parent / "results" / machine.folder(KIND)
    folder = Path(OUT) if OUT else here
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": machine.describe(KIND)}
    if KIND == "cuda":
        content["rates"] = CLOCK.rates()
    content["rows"] = results
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _skip_beyond_budget(results: dict[str, Any]) -> None:
    if time.monotonic() - results["started"] > BUDGET:
        pytest.skip("the time budget is spent")


def _clocked(benchmark: Any) -> measure.Repeat:
    """Repeat under pytest-benchmark's clock, which shows the last contender once."""

    def repeat(step: Any, before: Any, rounds: int) -> None:
        benchmark.pedantic(step, setup=before, rounds=rounds)

    return repeat


def _name(timed: Timed) -> str:
    shape = timed.shapes[0] if len(timed.shapes) == 1 else f"{len(timed.shapes)} layers"
    return f"{timed.name}-{shape}"


def test_read_without_gradient(benchmark: Any, results: Any) -> None:
    """What a read costs the host: on the CPU where the matrix costs nothing."""
    _skip_beyond_budget(results)

    table = results.setdefault("read", [])
    table += measure.read(CASES[0], READ_SIZE[KIND], CLOCK, _clocked(benchmark))
    _write("read", table)


@pytest.mark.parametrize(("name", "n", "backward"), SMALL_READS[KIND])
def test_read(name: str, n: int, backward: bool, benchmark: Any, results: Any) -> None:
    _skip_beyond_budget(results)

    table = results.setdefault("read", [])
    case = Timed(name, ((n, n),)).case
    table += measure.read(case, n, CLOCK, _clocked(benchmark), backward=backward)
    _write("read", table)


@pytest.mark.parametrize("timed", rows(KIND), ids=_name)
def test_forward_backward(timed: Timed, benchmark: Any, results: Any) -> None:
    _skip_beyond_budget(results)

    table = results.setdefault(timed.name, [])
    for found in measure.forward_backward(timed, CLOCK, _clocked(benchmark)):
        table += found
        last = found[-1]
        if last["contender"] in OURS:
            benchmark.extra_info[f"{last['phase']}: speedup"] = last["speedup_over_composed"]
        _write(timed.name, table)


EMBEDDING = """
import json, re, time
import torch, tritonparam as tp

def resident(which):  # bytes: VmRSS is now, VmHWM the peak since it was last reset
    return int(re.search(which + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.manual_seed(0)
layer = torch.nn.Embedding(30000, 50)
warm = tp.orthogonal(torch.nn.Linear(4, 8), "weight", MAP)  # loads the libraries
warm.weight.sum().backward()
open("/proc/self/clear_refs", "w").write("5")
before, start = resident("VmRSS"), time.perf_counter()
tp.orthogonal(layer, "weight", MAP)
weight = layer.weight
weight.backward(torch.randn(30000, 50))
seconds = time.perf_counter() - start
w = weight.detach().double()
defect = (w.T @ w - torch.eye(50)).abs().max()
print(json.dumps([seconds, resident("VmHWM") - before, float(defect)]))
"""


@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp", "householder"])
def test_embedding(orthogonal_map: str, benchmark: Any, results: Any) -> None:
    """Registering, reading and differentiating a 30000×50 weight, and the memory that takes.

    torch's own would need a base of 30000 × 30000; there is nothing to compare with.
    """
    if KIND != "cpu":
        pytest.skip("on the CPU; a GPU times 30000×50 with the other tall weights")
    code = EMBEDDING.replace("MAP", repr(orthogonal_map))
    found: list[list[float]] = []

    def run() -> None:
        output = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        found.append(json.loads(output))

    benchmark.pedantic(run, rounds=3)
    seconds, memory, defect = (median(column) for column in zip(*found, strict=True))
    assert defect <= 1e-5
    table = results.setdefault("embedding", [])
    row = {
        "chain": f"orthogonal({orthogonal_map})",
        "shape": [30000, 50],
        "dtype": "float32",
        "phase": "register+forward+backward",
        "contender": "closed",
        "median_us": round(seconds * 1e6, 1),
        "peak_megabytes": round(memory / 1e6, 1),
        "orthogonality": float(f"{defect:.1e}"),
    }
    table.append(row)
    _write("embedding", table)
