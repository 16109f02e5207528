"""What the benchmarks time of a step: forward, backward, both, in which rounds."""

from __future__ import annotations

import pytest
import torch

import tritonparam as tp
from benchmarks import rounds
from benchmarks.cases import BACKWARD, BOTH, FORWARD, Timed
from benchmarks.clock import Clock, Sample
from benchmarks.passes import SLOW, Pass, Reader
from benchmarks.weights import Weights


class Counting:
    """A clock on which each step takes one of these times, and what it finds and leaves."""

    def __init__(self, kind, parameter, seconds):
        self.kind, self.parameter, self.seconds = kind, parameter, iter(seconds)
        self.before, self.after = [], []

    def sample(self, step):
        self.before.append(self.parameter.grad is None)
        step()
        self.after.append(self.parameter.grad is None)
        seconds = next(self.seconds)
        return Sample(seconds, seconds / 2)


@pytest.mark.parametrize(
    ("kind", "seconds", "both"),
    [
        ("cpu", (0.01, 0.02), 0.03),
        ("cuda", (0.01, 0.02, 0.025), 0.025),  # the host runs ahead
        ("cuda", (SLOW, 1.0), SLOW + 1.0),  # not a third time
    ],
)
def test_a_turn_is_forward_then_backward_and_both(kind, seconds, both):
    w, g = torch.nn.Parameter(torch.randn(3, 3)), torch.randn(3, 3)
    read = []
    reader = Reader("composed", lambda: read.append(w.exp()) or read[-1:], [w])
    clock = Counting(kind, w, seconds)
    w.grad = torch.ones(3, 3)  # of an earlier step
    samples = Pass(reader, [g]).samples(clock)
    assert list(samples) == [BOTH, FORWARD, BACKWARD]
    assert samples[FORWARD] == Sample(seconds[0], seconds[0] / 2)
    assert samples[BACKWARD] == Sample(seconds[1], seconds[1] / 2)
    assert samples[BOTH] == pytest.approx(Sample(both, both / 2))
    assert clock.before == [True] * len(seconds)
    assert clock.after == [True, False, False][: len(seconds)]
    assert all(y.grad_fn is not None for y in read)  # the forward pass builds the graph
    assert torch.equal(w.grad, g * w.exp())


@pytest.mark.parametrize(("path", "launches"), [("kernel", 1), ("closed", 0)])
def test_kernels_read_several_weights_together(path, launches, device, monkeypatch):
    file, calls = tp.paths.kernels("weight_norm"), []
    forward = file.weight_norm_fwd
    monkeypatch.setattr(file, "weight_norm_fwd", lambda *args: calls.append(0) or forward(*args))
    modules = [tp.weight_norm(torch.nn.Linear(3, n)).to(device) for n in (2, 3, 4)]
    reader = Reader.of(path, modules)
    with tp.use_path(path):
        weights = reader.read()
    assert [w.size(0) for w in weights] == [2, 3, 4]
    assert len(calls) == launches


def test_rounds_are_as_many_as_the_longest_turn_leaves_time_for(monkeypatch):
    now = iter((0.0, 0.1, 5.0, 5.5))
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(now))
    timers = {"a": lambda: None, "b": lambda: None}
    assert rounds.how_many(timers, 4.0) == (8, 2)


def test_what_compiles_has_compiled_before_rounds_are_counted(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda read, dynamic: lambda: calls.append(0) or read())
    monkeypatch.setattr("benchmarks.weights.SLOW", float("inf"))
    weights = Weights(Timed("cayley", ((4, 4),)), Clock("cpu"))
    assert list(weights.passes()) == ["composed", "compiled", "closed"]
    assert len(calls) == 1
