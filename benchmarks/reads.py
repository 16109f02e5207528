"""What one read of a small weight costs the host."""

from __future__ import annotations

from functools import partial

import torch

import tritonparam as tp
from benchmarks import rows
from benchmarks.cases import Timed
from benchmarks.clock import Clock, Step
from benchmarks.rounds import Repeat, interleaved, plainly
from benchmarks.rows import Row
from benchmarks.weights import gate
from tests.cases import Case

READS, ROUNDS = 20, 100


def read(
    case: Case, n: int, clock: Clock, repeat: Repeat = plainly, *, backward: bool = False
) -> list[Row]:
    """What the property, the guard and the op cost the host, per read of an n × n weight.

    It is read without a gradient, or with one and its backward pass.
    """
    torch.manual_seed(0)
    timed = Timed(case.name, ((n, n),))
    module = case.module(case.original((n, n), 1.0, torch.float32).to(clock.device))
    parameters, g = list(module.parameters()), torch.randn(n, n, device=clock.device)
    paths = ("composed", "kernel" if clock.kind == "cuda" else "closed")
    errors = gate(module, g, list(paths[1:]))

    def reading(path: str) -> Step:
        def step() -> None:
            with tp.use_path(path), torch.set_grad_enabled(backward):
                for _ in range(READS):
                    weight = module.weight
                    if backward:
                        torch.autograd.grad(weight, parameters, g)

        return step

    timers = {path: partial(clock.host_seconds, reading(path)) for path in paths}
    times = interleaved(timers, repeat, ROUNDS, 1)
    times = {name: [seconds / READS for seconds in column] for name, column in times.items()}
    phase = "read and backward" if backward else "read"
    return [rows.row(timed, phase, name, times) | rows.errors(errors[name]) for name in times]
