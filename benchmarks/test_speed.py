"""Times every chain: correctness against fp64 first, then all contenders interleaved.

Each round times composed eager, composed under torch.compile, the closed form and the kernel once,
in one process; what is compared is the median of the per-round ratios. Where torch's
``orthogonal`` does the same job, it stands for composed. Chains are in training mode. Rows go to
``benchmarks/results/<device>/<chain>.json``, losses like wins.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonparam as tp
from benchmarks import machine
from benchmarks.cases import NORMS, rows, torchs_own
from tests.cases import CASES, Case, composed, error, fused

KIND = os.environ.get("TRITONPARAM_BENCH_DEVICE") or "cpu"
BUDGET = float(os.environ.get("TRITONPARAM_BENCH_BUDGET") or "inf")
OUT = os.environ.get("TRITONPARAM_BENCH_OUT") or None
ROUNDS = 30
WARM_UP = 5
# Seconds: above the first nothing is compiled, beyond the second a contender gets fewer rounds.
SLOW, LONGEST = 0.3, 20.0

Contender = Callable[[], None]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Rows by chain; written after every case, so that a run that is cut off keeps them."""
    return {"started": time.monotonic()}


def _write(name: str, results: list[dict[str, Any]]) -> None:
    here = Path(__file__).parent / "results" / machine.folder(KIND)
    folder = Path(OUT) if OUT else here
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine.describe(KIND), "rows": results}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _fused_paths(case: Case, shape: tuple[int, ...]) -> list[str]:
    kernel = KIND == "cuda" and shape[-1] <= case.max_kernel_n
    return ["closed", "kernel"] if kernel else ["closed"]


def _gate(case: Case, module: nn.Module, g: Tensor) -> dict[str, tuple[float, float]]:
    """Errors of value and gradient by contender; fails where a fused one is not as good as torch.

    Matrix by matrix in fp64: batched LU on the CPU cannot be trusted there (pytorch #142815).
    """
    module = deepcopy(module).eval()
    y64, dw64 = composed(module, g)
    y32, dw32 = composed(module, g, torch.float32)
    found = {"composed": (error(y32, y64), error(dw32, dw64))}
    for path in _fused_paths(case, g.shape):
        y, dw = fused(module, g, path)
        found[path] = (error(y, y64), error(dw, dw64))
        for mine, theirs in zip(found[path], found["composed"], strict=True):
            assert mine <= 3 * theirs + 5e-7, f"{path} is off by {mine:.1e}, torch by {theirs:.1e}"
    return found


def _contenders(
    case: Case, module: nn.Module, theirs: nn.Module, g: Tensor
) -> dict[str, Contender]:
    """Forward and backward through the property, by contender."""

    def through(path: str, module: nn.Module, read: Callable[[], Tensor]) -> Contender:
        parameters = list(module.parameters())

        def step() -> None:
            with tp.use_path(path):
                for x in parameters:
                    x.grad = None
                read().backward(g)

        return step

    def read_ours() -> Tensor:
        return module.weight

    def read_theirs() -> Tensor:
        return theirs.weight

    found = {"composed": through("composed", theirs, read_theirs)}
    found["composed"]()
    if _seconds(found["composed"]) < SLOW:
        compiled = torch.compile(read_theirs, dynamic=False)
        found["compiled"] = through("composed", theirs, compiled)
    for path in _fused_paths(case, g.shape):
        found[path] = through(path, module, read_ours)
    return found


def _seconds(step: Contender) -> float:
    if KIND == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if KIND == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@pytest.mark.parametrize(
    ("case", "shape"), [pytest.param(*row, id=f"{row[0].name}-{row[1]}") for row in rows(KIND)]
)
def test_forward_backward(case: Case, shape: tuple[int, ...], benchmark: Any, results: Any) -> None:
    if time.monotonic() - results["started"] > BUDGET:
        pytest.skip("the time budget is spent")
    torch.manual_seed(0)
    torch.compiler.reset()
    original = case.original(shape, NORMS.get(case.name, 1.0), torch.float32).to(KIND)
    g = torch.randn(shape, device=KIND)
    make = torchs_own(case)
    theirs = make(original) if make else case.module(original)
    module = case.module(original)
    errors = _gate(case, module, g)
    contenders = _contenders(case, module.train(), theirs.train(), g)
    slowest = _seconds(contenders["composed"])
    rounds = max(3, min(ROUNDS, int(LONGEST / slowest)))
    for step in contenders.values():
        for _ in range(min(WARM_UP, rounds)):
            step()
    times = _interleaved(contenders, benchmark, rounds)
    table = results.setdefault(case.name, [])
    for name in contenders:
        row = _row(case.name, shape, "forward+backward", name, times)
        if name in errors:
            row["value_error"], row["gradient_error"] = (float(f"{e:.1e}") for e in errors[name])
        table.append(row)
    benchmark.extra_info["speedup_over_composed"] = table[-1]["speedup_over_composed"]
    _write(case.name, table)


def _interleaved(
    contenders: dict[str, Contender], benchmark: Any, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, the last one under pytest-benchmark's clock."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    *others, last = contenders

    def time_the_others() -> None:
        for name in others:
            times[name].append(_seconds(contenders[name]))

    def time_the_last() -> None:
        times[last].append(_seconds(contenders[last]))

    benchmark.pedantic(time_the_last, setup=time_the_others, rounds=rounds)
    return times


def _row(
    chain: str, shape: tuple[int, ...], phase: str, name: str, times: dict[str, list[float]]
) -> dict[str, Any]:
    p20, *_, p80 = quantiles(times[name], n=5)
    ratios = [a / b for a, b in zip(times["composed"], times[name], strict=True)]
    return {
        "chain": chain,
        "shape": list(shape),
        "dtype": "float32",
        "phase": phase,
        "contender": name,
        "median_us": round(median(times[name]) * 1e6, 1),
        "p20_us": round(p20 * 1e6, 1),
        "p80_us": round(p80 * 1e6, 1),
        "speedup_over_composed": round(median(ratios), 2),
    }


def test_read_without_gradient(benchmark: Any) -> None:
    """What the property, the guard and the op cost where the matrix costs nothing."""
    torch.manual_seed(0)
    case = CASES[0]
    module = case.module(case.original((8, 8), 1.0, torch.float32).to(KIND))

    def reading(path: str) -> Contender:
        @torch.no_grad()
        def step() -> None:
            with tp.use_path(path):
                for _ in range(20):
                    module.weight  # noqa: B018

        return step

    contenders = {name: reading(name) for name in ("composed", case.paths[KIND == "cuda"])}
    for step in contenders.values():
        step()
    times = _interleaved(contenders, benchmark, 100)
    times = {name: [seconds / 20 for seconds in column] for name, column in times.items()}
    table = [_row(case.name, (8, 8), "read", name, times) for name in contenders]
    _write("read", table)


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
