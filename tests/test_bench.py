"""`python -m tritonparam bench`, with a made-up clock: what takes turns, what is timed, refused."""

from __future__ import annotations

import json
import re

import pytest
import torch

import tritonparam as tp
from tritonparam import bench, paths, samples, trials

SECONDS = {"composed": 4e-3, "closed": 1e-3, "kernel": 5e-4}
PATHS = ["composed", "closed", "kernel"][: 3 if torch.cuda.is_available() else 2]


class Clock:
    """Says what a path takes; `turns` are the paths in the order in which they were timed."""

    def __init__(self):
        self.turns = []

    def __call__(self, step):
        step()
        self.turns.append(paths.override())
        return SECONDS[self.turns[-1]]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(trials, "clock_of", lambda device: clock)
    return clock


@pytest.fixture
def invoke(clock):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from tritonparam import cli

    return lambda *arguments: CliRunner().invoke(
        cli.application(), ["bench", "--seconds", "0", *arguments]
    )


def model():
    return torch.nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 4)),
        tp.weight_norm(torch.nn.Linear(3, 4)),
        tp.weight_norm(torch.nn.Linear(3, 4)),
        torch.nn.Linear(3, 4),
    )


def composed_model():
    return tp.register_parametrization(torch.nn.Linear(3, 3), "weight", tp.Skew())


@pytest.mark.parametrize("chain", samples.NAMES)
def test_every_chain_is_compared_and_timed(chain, clock):
    (found,) = bench.run(None, chains=[chain], sizes=[3], seconds=0)
    rows = 3 if chain in samples.SQUARE else 24
    assert (found.chain, found.shape, found.dtype) == (chain, (rows, 3), "float32")
    assert all(way.reason == "" for way in found.ways), found
    assert all(0 < way.error < 1e-5 for way in found.ways), found
    assert all({*way.times} == {"forward", "backward", "both"} for way in found.ways)


def test_ways_take_turns_and_are_compared_round_by_round(clock):
    (found,) = bench.run(None, chains=["cayley"], sizes=[4], batch=3, seconds=0)
    assert found.shape == (3, 4, 4)
    assert found.rounds == bench.LEAST_ROUNDS
    assert [way.name for way in found.ways] == PATHS
    timed = clock.turns[len(PATHS) * bench.WARM_UP * 3 :: 3]
    assert timed == PATHS + PATHS[::-1] + PATHS
    composed, closed, *_ = found.ways
    assert composed.times["forward"] == bench.Times(*[pytest.approx(4.0)] * 3)
    assert closed.times["both"] == bench.Times(*[pytest.approx(1.0)] * 3)
    assert (composed.gain, closed.gain) == (None, pytest.approx(4.0))


def test_percentiles(monkeypatch):
    seconds = iter(range(10_000))
    monkeypatch.setattr(
        trials, "clock_of", lambda device: lambda step: step() is None or next(seconds) / 1e3
    )
    (found,) = bench.run(None, chains=["weight_norm"], sizes=[2], seconds=0)
    times = found.ways[0].times["both"]
    assert times.p20 < times.median < times.p80


def test_what_is_wrong_is_not_timed(clock, monkeypatch):
    closed = tp.ops.cayley._closed_bwd_of_few

    def wrong(*args):
        return (closed(*args)[0] + 0.01,)

    monkeypatch.setattr(tp.ops.cayley, "_closed_bwd_of_few", wrong)
    (found,) = bench.run(None, chains=["cayley"], sizes=[4], seconds=0)
    way = next(way for way in found.ways if way.name == "closed")
    assert re.fullmatch(r"its gradient is off by \de-0[123]", way.reason)
    assert (way.times, way.gain, way.error) == ({}, None, None)
    assert "closed" not in clock.turns
    assert way.reason in str(found)


def test_compiled(clock, monkeypatch):
    compiled = []

    def compile(function, dynamic):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    (found,) = bench.run(None, chains=["cayley"], sizes=[4], compiled=True, seconds=0)
    assert [way.name for way in found.ways][:3] == ["composed", "compiled", "closed"]
    assert len(compiled) == 1
    assert found.ways[1].gain == 1

    def fails(*_, **__):
        raise RuntimeError("no C++ compiler\n at all")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    (found,) = bench.run(None, chains=["cayley"], sizes=[4], compiled=True, seconds=0)
    assert found.ways[1].reason == "RuntimeError: no C++ compiler"
    assert found.ways[2].gain == 4


def test_a_large_weight_is_not_waited_for(clock):
    (found,) = bench.run(None, chains=["tall_cayley"], sizes=[2], rows=2049, seconds=0)
    assert "not waited for beyond 2048 rows" in found.ways[0].reason
    assert found.ways[1].times
    assert found.ways[1].gain is None
    (found,) = bench.run(None, chains=["weight_norm"], sizes=[2], rows=2049, seconds=0)
    assert found.ways[0].times


def test_command(invoke):
    result = invoke("--chain", "skew_exp", "--chain", "weight_norm", "--n", "4", "--device", "cpu")
    assert result.exit_code == 0, result.output
    first, second = result.output.split("\n\n")
    assert first.startswith("skew_exp, 4×4, float32, cpu, 3 rounds\n")
    assert second.startswith("weight_norm, 32×4, float32, cpu, 3 rounds\n")
    assert re.search(
        r"^closed +1\.00 1\.0–1\.0 +1\.00 1\.0–1\.0 +1\.00 1\.0–1\.0 +4\.00× +\de-0[78]$",
        first,
        re.M,
    )
    assert max(map(len, result.output.splitlines())) <= 80


def test_command_with_a_model(invoke):
    result = invoke(f"{__name__}:model", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["machine"]["torch"] == torch.__version__
    weights = found["weights"]
    assert [(w["name"], w["chain"]) for w in weights] == [
        ("0.weight", "spectral_norm"),
        ("1.weight", "weight_norm"),
    ]
    assert [way["name"] for way in weights[0]["ways"]] == ["composed", "closed"]
    assert weights[0]["ways"][1]["times"]["forward"]["median"] == pytest.approx(1.0)


def test_the_model_is_not_changed(clock, monkeypatch):
    made = model()
    monkeypatch.setattr(bench, "build", lambda target: made)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    assert len(list(bench.run("made", seconds=0))) == 2
    assert all(torch.equal(value.cpu(), before[key]) for key, value in made.state_dict().items())
    assert all(p.grad is None for p in made.parameters())
    assert paths.override() is None


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "takes either a model"),
        (("m:f", "--chain", "cayley"), "takes either a model"),
        (("m:f", "--rows", "3"), "--n, --rows, --batch and --dtype go with --chain"),
        (("--chain", "cayley"), "--chain needs --n"),
        (("--chain", "cayley", "--n", "0"), "must be at least 1"),
        (("--chain", "weight_norm", "--n", "3", "--rows", "0"), "must be at least 1"),
        (("--chain", "qr", "--n", "3"), "the chain must be one of cayley"),
        (("--chain", "weight_norm", "--n", "3", "--batch", "2"), "leave --batch at 1"),
        (("--chain", "cayley", "--n", "3", "--dtype", "int8"), "--dtype must be float32"),
        (("--chain", "cayley", "--n", "3", "--seconds", "nan"), "--seconds must be positive"),
        (("--chain", "cayley", "--n", "3", "--device", "abacus"), "it does not see 'abacus'"),
        (("--chain", "cayley", "--n", "3", "--device", "meta"), "--device must be cpu, or a GPU"),
        (("no_such_module:f",), "there is no module 'no_such_module'"),
        ((f"{__name__}:composed_model",), "no weight whose whole chain a rule takes"),
    ],
)
def test_command_refuses(invoke, arguments, why):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert why in " ".join(result.output.replace("│", " ").split())
