"""The benchmarks of a GPU, run on the CPU with small weights and stand-ins for torch.cuda."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import clock as clocks
from benchmarks import machine, measure, reads, report, rounds, test_speed, warm, weights
from benchmarks.cases import (
    BACKWARD,
    BOTH,
    CUDA,
    FORWARD,
    LAYERS,
    PHASES,
    SMALL_READS,
    Timed,
    least,
    rows,
)
from benchmarks.clock import Clock
from benchmarks.passes import Pass
from benchmarks.rows import ONE_LAUNCH
from tests.cases import CASES
from tests.resumed import BEGAN
from tests.stand_in_gpu import SMALL, stand_in


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins for a GPU; nothing is compiled, and rounds are few."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    for name, value in (("LEAST", 1), ("ROUNDS", 1), ("WARM_UP", 0)):
        monkeypatch.setattr(rounds, name, value)
    monkeypatch.setattr(measure, "DEVICE_ROUNDS", 1)
    monkeypatch.setattr(weights, "peers", lambda chain, shape: [])
    return stand_in(monkeypatch)


def small(timed: Timed) -> Timed:
    """The same row with few and small weights."""
    if len(timed.shapes) > 1:
        return replace(timed, shapes=((4, 6), (3, 5), (4, 6)))
    *batch, n, k = timed.shapes[0]
    return replace(timed, shapes=((*[2] * len(batch), 4 if n == k else 9, 4),))


@pytest.fixture
def benchmark_stand_in():
    def pedantic(step, setup, rounds):
        for _ in range(rounds):
            setup()
            step()

    return SimpleNamespace(pedantic=pedantic, extra_info={})


@pytest.fixture
def folder(cuda, tmp_path, monkeypatch):
    """Where test_speed, made to believe in a GPU, writes."""
    folder = tmp_path / "benchmarks" / "results" / machine.folder("cuda")
    for name, value in (("KIND", "cuda"), ("CLOCK", cuda.clock), ("OUT", str(folder))):
        monkeypatch.setattr(test_speed, name, value)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return folder


# What a graph is replayed of is timed in eager mode too.
DISTINCT = list(
    {(t.name, t.shapes): t for t in map(small, sorted(CUDA, key=lambda t: t.graph))}.values()
)


@pytest.mark.parametrize("timed", DISTINCT, ids=test_speed._name)
def test_every_row_of_a_gpu(timed, cuda, folder, benchmark_stand_in, monkeypatch):
    monkeypatch.setattr(clocks, "PRODUCTS_FROM", 4)
    monkeypatch.setattr(measure, "PRODUCTS_FROM", 4)
    for module in (weights, measure):
        monkeypatch.setattr(module, "SLOW", float("inf"))  # however busy the machine is
    test_speed.test_forward_backward(timed, benchmark_stand_in, test_speed.Results())
    content = json.loads((folder / f"{timed.name}.json").read_text())
    assert set(content["rates"]) == {"copy_gb_per_s", "float32_tflops", "3xtf32_tflops"}
    assert all(rate > 0 for rate in content["rates"].values())
    wholes = [BOTH, *[f"{BOTH}, graph"] * timed.graph]
    phases = [phase + graph for graph in ("", ", graph")[: len(wholes)] for phase in PHASES]
    assert list(dict.fromkeys(row["phase"] for row in content["rows"])) == phases
    contenders = ["composed", "compiled", "closed"]
    if timed.case.max_kernel_n:
        contenders.append("kernel")
    for phase in phases:
        found = [row for row in content["rows"] if row["phase"] == phase]
        assert [row["contender"] for row in found][:3] == contenders[:3]
        assert {row["contender"] for row in found} >= set(contenders)
        for row in found:
            assert row["floor_us"] > 0
            assert row["median_us"] >= 0
            assert row["host_p20_us"] <= row["host_median_us"] <= row["host_p80_us"]
            whole = phase in wholes
            assert ("value_error" in row) == (whole and row["contender"] != "compiled")
            assert ("timed" in row) == ("graph" in phase)
            if "graph" in phase:
                assert row["timed"] == "graph replay"
            else:
                assert row["device_median_us"] >= 0
            assert row["speedup_over_composed"] > 0
            assert ("product_us" in row) == (timed.shapes[0][-1] >= 4)
    gains, table, *folded = report.tables().split("<details>")
    assert gains.count(f"| {timed.name}") == len(wholes)
    assert "| floor |" in table
    assert table.count(f"| {timed.name} ") == len(wholes)
    assert table.count(", graph |") == len(wholes) - 1
    aims, parts, memory, apart = folded
    assert "<summary>Aims: 0 of " in aims
    assert parts.count(f"| {timed.name} ") == len(wholes)
    assert parts.count(", graph |") == len(wholes) - 1
    assert memory.count(f"| {timed.name} ") == 1
    assert apart.count(f"| {timed.name} ") == len(wholes)
    assert f"{wholes[-1]}: speedup" in benchmark_stand_in.extra_info


def test_the_read(folder, cuda, benchmark_stand_in, monkeypatch):
    monkeypatch.setattr(reads, "READS", 1)
    monkeypatch.setattr(reads, "ROUNDS", 2)
    monkeypatch.setattr(test_speed, "READ_SIZE", {"cuda": 5})
    test_speed.test_read_without_gradient(benchmark_stand_in, test_speed.Results())
    content = json.loads((folder / "read.json").read_text())
    assert [row["contender"] for row in content["rows"]] == ["composed", "kernel"]
    assert all(row["shape"] == [5, 5] for row in content["rows"])
    assert "| cayley 5×5, read |" in report.tables()


@pytest.mark.parametrize("name", ["cayley", "weight_norm"])
def test_a_small_read_and_its_backward_pass(name, cuda, tmp_path, benchmark_stand_in, monkeypatch):
    for module, attribute, value in (
        (reads, "READS", 1),
        (reads, "ROUNDS", 2),
        (report, "ROOT", tmp_path),
        (test_speed, "OUT", str(tmp_path / "benchmarks" / "results" / "one")),
        (test_speed, "CLOCK", Clock("cpu", largest=SMALL)),
    ):
        monkeypatch.setattr(module, attribute, value)
    results = test_speed.Results()
    for backward in (False, True):
        test_speed.test_read(name, 5, backward, benchmark_stand_in, results)
    content = json.loads((tmp_path / "benchmarks/results/one/read.json").read_text())
    found = [(row["phase"], row["contender"]) for row in content["rows"]]
    phases, contenders = ("read", "read and backward"), ("composed", "closed")
    assert found == [(phase, contender) for phase in phases for contender in contenders]
    assert all(0 <= row["gradient_error"] < 1e-5 for row in content["rows"])
    for phase in phases:
        assert f"| {name} 5×5, {phase} |" in report.tables()
    fused = weights.fused
    monkeypatch.setattr(weights, "fused", lambda *a: tuple(x + 1e-3 for x in fused(*a)))
    with pytest.raises(AssertionError, match="is off by"):
        test_speed.test_read(name, 5, True, benchmark_stand_in, results)


def test_small_reads_are_chains_of_the_table():
    assert {name for reads in SMALL_READS.values() for name, _, _ in reads} <= {
        case.name for case in CASES
    }


def test_a_spent_budget_skips(folder, benchmark_stand_in, monkeypatch):
    monkeypatch.setattr(test_speed, "BUDGET", -1.0)
    results = test_speed.Results()
    with pytest.raises(pytest.skip.Exception, match="budget is spent"):
        test_speed.test_forward_backward(DISTINCT[0], benchmark_stand_in, results)
    assert not folder.exists()


def test_a_case_is_cut_off_after_the_rows_that_it_has(folder, benchmark_stand_in, monkeypatch):
    def tables(timed, clock, repeat):
        yield [{"contender": "composed", "phase": BOTH}]
        monkeypatch.setattr(test_speed, "BUDGET", -1.0)
        yield [{"contender": "closed", "phase": BOTH, "speedup_over_composed": 2.0}]
        raise AssertionError("the time is spent")

    monkeypatch.setattr(measure, "forward_backward", tables)
    results = test_speed.Results()
    for name in ("cayley", "skew_exp"):
        with pytest.raises(pytest.skip.Exception, match="budget is spent"):
            test_speed.test_forward_backward(Timed(name, ()), benchmark_stand_in, results)
    (path,) = folder.iterdir()
    content = json.loads(path.read_text())
    assert [row["contender"] for row in content["rows"]] == ["composed", "closed"]
    assert content["machine"]["device"] == "Stand-in 1"


def test_rows_of_an_earlier_process_of_the_run_are_kept(folder, monkeypatch):
    def written(row):
        test_speed.Results().add("cayley", [row])
        return json.loads((folder / "cayley.json").read_text())["rows"]

    first, second = {"contender": "composed"}, {"contender": "kernel"}
    assert written(first) == [first]
    assert written(second) == [second]
    monkeypatch.setenv(BEGAN, "1")
    assert written(first) == [second, first]
    monkeypatch.setenv(BEGAN, str(time.time() + 100))
    assert written(first) == [first]


def test_a_row_that_takes_too_long_is_cut_off():
    before = signal.getsignal(signal.SIGALRM)
    with (
        pytest.raises(pytest.skip.Exception, match="budget is spent"),
        test_speed.cut_off(-1.0),
        suppress(Exception),  # as a compiler does
    ):
        time.sleep(100)
    with test_speed.cut_off(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) is before


TALL = small(next(timed for timed in CUDA if timed.name == "tall_cayley"))
SQUARE = Timed("skew_exp", ((4, 4),), graph=True)
# Stands for what rounds in one launch are timed with.
ONE = {"device": "cpu", "dtype": "float32", "chain": "skew_exp", "n": 4, "batch": 1}
ONE |= {"path": "kernel", "config": {"fwd": {"num_warps": 2}}}


def both(timed, clock):
    return [row for table in measure.forward_backward(timed, clock) for row in table]


def graphs(table, phase=BOTH):
    return [row for row in table if row["phase"] == f"{phase}, graph"]


def test_one_launch_has_the_tiles_of_the_default():
    pytest.importorskip("triton")

    def found(name, *shape):
        ways = {"timed": Timed(name, (shape,)), "paths": lambda: ["closed", "kernel"]}
        originals = [torch.empty(shape)]
        return weights.Weights.one_launch(SimpleNamespace(originals=originals, **ways))

    for name in ("cayley", "skew_exp", "symmetric_exp"):
        row = found(name, 128, 128)
        assert (row["chain"], row["n"], row["batch"], row["path"]) == (name, 128, 1, "kernel")
        phases = ["fwd"] if name == "cayley" else ["fwd", "bwd"]
        assert row["config"] == {x: {"num_warps": 8, "programs": 64} for x in phases}
        assert found(name, 512, 512)["config"] == {x: {"programs": 64} for x in phases}
        assert found(name, 64, 64) is found(name, 1024, 1024) is None
    assert found("tall_cayley", 128, 64) is None


def test_one_launch_is_timed_beside_the_kernel(cuda, folder, monkeypatch):
    monkeypatch.setattr(weights.Weights, "one_launch", lambda self: ONE)
    test_speed.test_one_launch(SQUARE, test_speed.Results())
    table = json.loads((folder / "skew_exp.json").read_text())["rows"]
    assert {row["contender"] for row in table} == {ONE_LAUNCH}
    assert [row["phase"] for row in table] == [f"{phase}, graph" for phase in PHASES]
    for row in table:
        assert row["timed"] == "graph replay"
        assert row["median_us"] >= 0
        assert row["speedup_over_kernel"] > 0
    assert table[0]["value_error"] < 1e-5
    tables = report.tables()  # whatever has become of the other contenders
    assert f"| chain, shape | {ONE_LAUNCH} |" in tables
    of_both = report._more([*table, table[0] | {"contender": "kernel"}])
    assert f"| chain, shape | kernel | {ONE_LAUNCH} |" in of_both
    cuda.captured = 0
    with pytest.raises(pytest.skip.Exception, match="no graph holds them"):
        test_speed.test_one_launch(SQUARE, test_speed.Results())


def test_what_synchronizes_is_timed_eagerly(cuda, monkeypatch):
    cuda.synchronizes = True
    run = Pass.both

    def checked(self):
        return cuda.run(lambda: run(self)) if self.reader.path == "composed" else run(self)

    monkeypatch.setattr(Pass, "both", checked)
    table = both(SQUARE, cuda.clock)
    for phase in PHASES:
        found = {row["contender"]: row["timed"] for row in graphs(table, phase)}
        assert found["composed"] == found["compiled"] == "eager: it synchronizes"
        assert found["closed"] == "graph replay"
    assert cuda.mode == "default"
    assert graphs(table)[-1]["value_error"] < 1e-5


def test_what_cannot_be_captured_says_so(cuda, monkeypatch):
    cuda.captured = 0
    found = graphs(both(SQUARE, cuda.clock))
    reason = "it cannot be captured: operation not permitted when stream is capturing"
    assert {row["timed"] for row in found} == {f"eager: {reason}"}


def test_what_can_be_captured_only_as_a_whole_says_so(cuda):
    cuda.captured = 1  # the baseline's whole; not its parts
    table = both(SQUARE, cuda.clock)
    first, *others = graphs(table)
    reason = "it cannot be captured: operation not permitted when stream is capturing"
    assert first["timed"] == f"graph replay; in parts {reason}"
    assert first["median_us"] >= 0
    for phase in (FORWARD, BACKWARD):
        first, *others = graphs(table, phase)
        assert first["median_us"] is None
        assert all(row["median_us"] >= 0 for row in others)
        assert {row["timed"] for row in others} == {f"eager: {reason}"}
    host_and_device = [line for line in report._more(table) if ", graph" in line][-1]
    assert "–" not in host_and_device.split("|")[2]  # a replay is timed on the device


def test_a_baseline_beyond_the_memory_is_a_row_of_none(cuda):
    cuda.free = 100
    none, *ours = both(TALL, cuda.clock)
    assert none["contender"] == "composed"
    assert none["median_us"] is None
    assert "none: torch's n × n matrices" in none["timed"]
    assert ours[0]["contender"] == "closed"
    assert all(row["speedup_over_composed"] is None for row in ours)
    assert report._times([none, *ours], floors=True)[0].startswith("| tall_cayley 9×4 | – | – | ")


def test_a_baseline_that_runs_out_of_memory_is_a_row_of_none(cuda, monkeypatch):
    run = Pass.run

    def out_of_memory(self):
        if self.reader.path == "composed":
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self)

    monkeypatch.setattr(Pass, "run", out_of_memory)
    none, *_ = both(TALL, cuda.clock)
    assert none["timed"] == "none: it runs out of memory"


@pytest.mark.parametrize("message", ["no valid lowering\nof it", ""])
def test_a_baseline_that_does_not_compile_is_a_row_of_none(cuda, monkeypatch, message):
    def compiled():
        raise NotImplementedError(message)

    monkeypatch.setattr(torch, "compile", lambda read, dynamic: compiled)
    none, *others = both(SQUARE, cuda.clock)
    assert none["contender"] == "compiled"
    assert none["timed"] == f"none: it fails: {message.split(chr(10))[0] or 'NotImplementedError'}"
    assert {row["contender"] for row in others if row["median_us"] is not None} == {
        *("composed", "closed", "kernel"),
    }
    assert [row["phase"] for row in others if row["contender"] == "compiled"] == [f"{BOTH}, graph"]
    assert report._times([none, *others], floors=True)
    assert report._more([none, *others])


def test_a_slow_baseline_is_timed_once(cuda, monkeypatch):
    monkeypatch.setitem(weights.ONCE, "cuda", 0.0)
    table = both(replace(TALL, graph=True), cuda.clock)
    for row in table:
        if row["contender"] == "composed":
            assert row["p20_us"] == row["p80_us"] == row["median_us"] > 0
            assert row["speedup_over_composed"] == 1.0
        else:
            assert row["speedup_over_composed"] > 0
    assert "eager: once" in {row.get("timed") for row in table}


def test_a_slow_baseline_is_compiled_and_timed_once_where_there_is_room(cuda, monkeypatch):
    monkeypatch.setitem(weights.ONCE, "cuda", 0.0)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda read, dynamic: compiled.append(read) or read)
    table = both(TALL, cuda.clock)
    assert "compiled" in {row["contender"] for row in table}
    monkeypatch.setattr(weights, "COMPILED_ON_GPU", 0.0)
    assert "compiled" not in {row["contender"] for row in both(TALL, cuda.clock)}
    assert len(compiled) == 1


def test_warming_compiles_every_row_and_goes_on_after_an_error(cuda, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda read, dynamic: compiled.append(read) or read)
    monkeypatch.setattr(warm, "PARTS", 2)
    monkeypatch.setattr(warm, "Clock", lambda kind: cuda.clock)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(warm, "CUDA", (SQUARE, TALL, replace(SQUARE, name="nothing"), SQUARE, TALL))
    monkeypatch.setattr(weights.Weights, "one_launch", lambda self: ONE)
    gated = []
    monkeypatch.setattr(
        weights.Weights, "gate_of_one_launch", lambda self, row: gated.append(len(compiled))
    )
    assert warm.main(["100", "0"]) == 0
    assert len(compiled) == 2
    assert gated == [2]  # after all that is compiled for the others
    monkeypatch.setattr(warm, "LARGE", 1)
    warm.run(TALL, cuda.clock)
    assert len(compiled) == 2
    assert capsys.readouterr().out.startswith("benchmarks.warm: nothing (4, 4): ")


@pytest.mark.parametrize(
    ("inside", "said"),
    [("exit 0", "2 of 2 parts"), ("exec sleep 100", "0 of 2 parts have compiled all they run, 2")],
)
def test_warming_says_how_far_it_came(inside, said, tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{inside}\n")
    python.chmod(0o755)
    monkeypatch.setattr(warm.sys, "executable", str(python))
    monkeypatch.setattr(warm, "PARTS", 2)
    assert warm.main(["0.2" if "sleep" in inside else "100"]) == 0
    assert capsys.readouterr().out.startswith(f"benchmarks.warm: {said}")


def test_a_wrong_result_is_not_timed(cuda, monkeypatch):
    fused = weights.fused
    monkeypatch.setattr(weights, "fused", lambda *a: tuple(x + 1e-3 for x in fused(*a)))
    with pytest.raises(AssertionError, match="is off by"):
        both(SQUARE, cuda.clock)


def test_what_no_algorithm_can_do_without():
    assert least("cayley", (4096, 16, 16)) == (20 * 4096 * 256, 6 * 4096 * 16**3)
    assert least("spectral_norm", (512, 4608)) == (20 * 512 * 4608, 0)
    assert least("householder", (4096, 64))[1] == 9 * 4096 * 64**2 + 2 * 64**3
    assert least("cayley", (16, 16), FORWARD) == (8 * 256, 2 * 16**3)
    for name in {case.name for case in CASES}:
        parts = [least(name, (128, 64), phase) for phase in (FORWARD, BACKWARD)]
        assert tuple(map(sum, zip(*parts, strict=True))) == least(name, (128, 64))


def test_the_tables():
    assert len(LAYERS) == 20
    names = {case.name for case in CASES}
    for kind in ("cpu", "cuda"):
        assert {timed.name for timed in rows(kind)} <= names
        assert len(set(rows(kind))) == len(rows(kind))
    square = [timed for timed in CUDA if timed.shapes[0][-1] == timed.shapes[0][-2]]
    assert {timed.shapes[0][-1] for timed in square} == {16, 32, 64, 128, 256, 512, 1024, 2048}


def test_the_cpu_has_no_floors_and_no_graphs(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    for module, name, value in ((rounds, "ROUNDS", 3), (reads, "READS", 1), (reads, "ROUNDS", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(weights, "peers", lambda chain, shape: [])
    clock = Clock("cpu", largest=SMALL)
    table = both(Timed("cayley", ((2, 4, 4),)), clock)
    found = [(row["phase"], row["contender"]) for row in table]
    contenders = ("composed", "compiled", "closed")
    assert found == [(phase, contender) for phase in PHASES for contender in contenders]
    for whole, forward, backward in zip(table[:3], table[3:6], table[6:], strict=True):
        assert whole["median_us"] > max(forward["median_us"], backward["median_us"])
    keys = {"chain", "shape", "dtype", "phase", "contender", "median_us", "p20_us", "p80_us"}
    keys |= {"speedup_over_composed", "value_error", "gradient_error"}
    keys |= {"constraint_error", "peak_bytes"}
    assert set(table[0]) == set(table[2]) == keys
    assert not clock.synchronizes(lambda: None)
    assert clock.capture(both) == [both]
    assert clock.free_bytes() > 0
    assert [row["contender"] for row in reads.read(CASES[0], 4, clock)] == [
        "composed",
        "closed",
    ]
