"""A constrained embedding of 30000×50, from registration to gradient, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median
from typing import NamedTuple

from benchmarks.rows import Row

CODE = """
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


class Run(NamedTuple):
    """Seconds, bytes beyond those before, and max|QᵀQ - I|."""

    seconds: float
    memory: float
    defect: float


def run(orthogonal_map: str) -> Run:
    """One process that registers, reads and differentiates the weight."""
    code = [sys.executable, "-c", CODE.replace("MAP", repr(orthogonal_map))]
    return Run(*json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout))


def row(orthogonal_map: str, runs: list[Run]) -> Row:
    """The medians."""
    found = Run(*(median(column) for column in zip(*runs, strict=True)))
    assert found.defect <= 1e-5
    return {
        "chain": f"orthogonal({orthogonal_map})",
        "shape": [30000, 50],
        "dtype": "float32",
        "phase": "register+forward+backward",
        "contender": "closed",
        "median_us": round(found.seconds * 1e6, 1),
        "peak_megabytes": round(found.memory / 1e6, 1),
        "orthogonality": float(f"{found.defect:.1e}"),
    }
