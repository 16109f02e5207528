"""Compiles what the benchmarks of a GPU run: ``python -m benchmarks.warm SECONDS``.

Triton and Inductor take a second or more for a kernel, on one core, and keep it in a folder. Here
every row of ``cases.CUDA`` runs once, untimed, many rows at once in processes of their own, so that
the process that times them finds what it needs. What is not done after SECONDS is stopped.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import product

import torch

from benchmarks.cases import CUDA, Timed, torchs_bytes
from benchmarks.clock import Clock
from benchmarks.weights import Weights
from tests.processes import Processes

PARTS = min(os.cpu_count() or 1, 16)
LARGE = 8 << 30  # bytes


def main(arguments: list[str]) -> int:
    """Start the parts and wait for them; with a second argument, run that part."""
    seconds, *part = arguments
    if part:
        torch.set_num_threads(1)
        for step, timed in product((run, run_one_launch), CUDA[int(part[0]) :: PARTS]):
            try:
                step(timed, Clock("cuda"))
            except Exception as error:  # the benchmark has it too, and says so
                print(f"benchmarks.warm: {timed.name} {timed.shapes[0]}: {error}", flush=True)
        return 0
    # Each part compiles by itself: Inductor would start a process per core for each.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with Processes() as running:
        for i in range(PARTS):
            command = [sys.executable, "-m", "benchmarks.warm", seconds, str(i)]
            running.start(command, env=environment)
        statuses = list(running.wait(time.monotonic() + float(seconds)))
    ended = f"{statuses.count(0)} of {PARTS} parts have compiled all they run"
    late = statuses.count(None)
    print(f"benchmarks.warm: {ended}" + (f", {late} were stopped at {seconds} s" if late else ""))
    return 0


def run(timed: Timed, clock: Clock) -> None:
    """All contenders of a row, as they are compared and timed; without a baseline that is large."""
    weights = Weights(timed, clock)
    weights.gate()
    if sum(torchs_bytes(timed.name, shape) for shape in timed.shapes) < LARGE:
        weights.train()
        weights.passes()


def run_one_launch(timed: Timed, clock: Clock) -> None:
    """What `measure.one_launch` times, once: last here too, as it may wait without an end."""
    if timed.graph:
        weights = Weights(timed, clock)
        if one := weights.one_launch():
            weights.gate_of_one_launch(one)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
