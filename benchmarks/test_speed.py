"""Times every chain: correctness against fp64 first, then all contenders interleaved.

Each round times composed eager, composed under torch.compile, the closed form and the kernel once,
in one process; what is compared is the median of the per-round ratios. Rows go to
``benchmarks/results/<device>/<chain>.json``, losses like wins.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonparam as tp
from benchmarks import machine
from benchmarks.cases import rows
from tests.cases import Case, composed, error, fused

KIND = os.environ.get("TRITONPARAM_BENCH_DEVICE") or "cpu"
BUDGET = float(os.environ.get("TRITONPARAM_BENCH_BUDGET") or "inf")
OUT = os.environ.get("TRITONPARAM_BENCH_OUT") or None
ROUNDS = 30
WARM_UP = 5

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


def _gate(case: Case, original: Tensor, g: Tensor) -> dict[str, tuple[float, float]]:
    """Errors of value and gradient by contender; fails where a fused one is not as good as torch.

    Matrix by matrix in fp64: batched LU on the CPU cannot be trusted there (pytorch #142815).
    """
    y64, dw64 = composed(case, original.double(), g.double())
    y32, dw32 = composed(case, original, g)
    found = {"composed": (error(y32, y64), error(dw32, dw64))}
    for path in _fused_paths(case, original.shape):
        y, dw = fused(case.module(original), g, path)
        found[path] = (error(y, y64), error(dw, dw64))
        for mine, theirs in zip(found[path], found["composed"], strict=True):
            assert mine <= 3 * theirs + 5e-7, f"{path} is off by {mine:.1e}, torch by {theirs:.1e}"
    return found


def _contenders(case: Case, module: nn.Module, g: Tensor) -> dict[str, Contender]:
    """Forward and backward through the property, by contender."""
    original = module.parametrizations.weight.original

    def through(path: str, read: Callable[[], Tensor]) -> Contender:
        def step() -> None:
            with tp.use_path(path):
                original.grad = None
                read().backward(g)

        return step

    def read() -> Tensor:
        return module.weight

    found = {"composed": through("composed", read)}
    found["compiled"] = through("composed", torch.compile(read, dynamic=False))
    for path in _fused_paths(case, original.shape):
        found[path] = through(path, read)
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
    original = case.original(shape, 1.0, torch.float32).to(KIND)
    g = torch.randn(shape, device=KIND)
    errors = _gate(case, original, g)
    contenders = _contenders(case, case.module(original), g)
    for step in contenders.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    *others, last = contenders

    def time_the_others() -> None:
        for name in others:
            times[name].append(_seconds(contenders[name]))

    def time_the_last() -> None:
        times[last].append(_seconds(contenders[last]))

    benchmark.pedantic(time_the_last, setup=time_the_others, rounds=ROUNDS)
    table = results.setdefault(case.name, [])
    for name in contenders:
        p20, *_, p80 = quantiles(times[name], n=5)
        ratios = [a / b for a, b in zip(times["composed"], times[name], strict=True)]
        row = {
            "chain": case.name,
            "shape": list(shape),
            "dtype": "float32",
            "phase": "forward+backward",
            "contender": name,
            "median_us": round(median(times[name]) * 1e6, 1),
            "p20_us": round(p20 * 1e6, 1),
            "p80_us": round(p80 * 1e6, 1),
            "speedup_over_composed": round(median(ratios), 2),
        }
        if name in errors:
            row["value_error"], row["gradient_error"] = (float(f"{e:.1e}") for e in errors[name])
        table.append(row)
    benchmark.extra_info["speedup_over_composed"] = table[-1]["speedup_over_composed"]
    _write(case.name, table)
