"""The benchmarks of a GPU, run on the CPU with small weights and stand-ins for torch.cuda."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import clock as clocks
from benchmarks import machine, measure, report, test_speed, weights
from benchmarks.cases import CUDA, LAYERS, SMALL_READS, Timed, least, rows
from benchmarks.clock import Clock
from tests.cases import CASES

SMALL = (1 << 12, 8)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at

    def query(self):
        return False

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Graph:
    """Replays the last step that ran under ``torch.cuda.graph``, which is taken to cost nothing."""

    def replay(self):
        pass


class Stream:
    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


@pytest.fixture
def cuda(monkeypatch):
    """A "cuda" clock for tensors on the CPU; `synchronizes` and `fails` say which steps do."""
    state = SimpleNamespace(synchronizes=False, fails=False, mode="default", free=1 << 40)
    state.held = itertools.count(100, 50)

    def set_mode(mode):
        state.mode = mode

    @contextlib.contextmanager
    def graph(_):
        if state.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA error")
        yield

    def step_in_debug_mode(step):
        if state.mode == "error" and state.synchronizes:
            raise RuntimeError("called a synchronizing CUDA operation")
        return step()

    properties = SimpleNamespace(L2_cache_size=1 << 10)
    stand_ins = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (state.free, 1 << 40),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: next(state.held),
        "_sleep": lambda cycles: None,
        "set_sync_debug_mode": set_mode,
        "get_device_properties": lambda: properties,
        "get_device_name": lambda: "Stand-in 1",
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(measure, "ROUNDS", 3)
    monkeypatch.setattr(measure, "WARM_UP", 0)
    monkeypatch.setattr(measure, "DEVICE_ROUNDS", 1)
    monkeypatch.setattr(weights, "peers", lambda chain, shape: [])
    state.clock = Clock("cuda", device="cpu", largest=SMALL)
    state.run = step_in_debug_mode
    return state


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


DISTINCT = list(dict.fromkeys(small(timed) for timed in CUDA))


@pytest.mark.parametrize("timed", DISTINCT, ids=test_speed._name)
def test_every_row_of_a_gpu(timed, cuda, folder, benchmark_stand_in, monkeypatch):
    monkeypatch.setattr(clocks, "PRODUCTS_FROM", 4)
    monkeypatch.setattr(measure, "PRODUCTS_FROM", 4)
    monkeypatch.setattr(weights, "SLOW", float("inf"))  # however busy the machine is
    results = {"started": time.monotonic()}
    test_speed.test_forward_backward(timed, benchmark_stand_in, results)
    content = json.loads((folder / f"{timed.name}.json").read_text())
    assert set(content["rates"]) == {"copy_gb_per_s", "float32_tflops", "3xtf32_tflops"}
    assert all(rate > 0 for rate in content["rates"].values())
    phases = ["forward+backward", *["forward+backward, graph"] * timed.graph]
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
            assert ("value_error" in row) == (row["contender"] != "compiled")
            assert ("timed" in row) == ("graph" in phase)
            if "graph" in phase:
                assert row["timed"] == "graph replay"
            assert ("product_us" in row) == (timed.shapes[0][-1] >= 4)
    table, *folded = report.tables().split("<details>")
    assert "| floor |" in table
    assert table.count(f"| {timed.name} ") == len(phases)
    assert table.count(", graph |") == len(phases) - 1
    memory, apart = folded
    assert memory.count(f"| {timed.name} ") == 1
    assert apart.count(f"| {timed.name} ") == len(phases)


def test_the_read(folder, cuda, benchmark_stand_in, monkeypatch):
    monkeypatch.setattr(measure, "READS", 1)
    monkeypatch.setattr(measure, "READ_ROUNDS", 2)
    monkeypatch.setattr(test_speed, "READ_SIZE", {"cuda": 5})
    test_speed.test_read_without_gradient(benchmark_stand_in, {"started": time.monotonic()})
    content = json.loads((folder / "read.json").read_text())
    assert [row["contender"] for row in content["rows"]] == ["composed", "kernel"]
    assert all(row["shape"] == [5, 5] for row in content["rows"])
    assert "| cayley 5×5, read |" in report.tables()


@pytest.mark.parametrize("name", ["cayley", "weight_norm"])
def test_a_small_read_and_its_backward_pass(name, cuda, tmp_path, benchmark_stand_in, monkeypatch):
    for module, attribute, value in (
        (measure, "READS", 1),
        (measure, "READ_ROUNDS", 2),
        (report, "ROOT", tmp_path),
        (test_speed, "OUT", str(tmp_path / "benchmarks" / "results" / "one")),
        (test_speed, "CLOCK", Clock("cpu", largest=SMALL)),
    ):
        monkeypatch.setattr(module, attribute, value)
    results = {"started": time.monotonic()}
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
    results = {"started": time.monotonic()}
    with pytest.raises(pytest.skip.Exception, match="budget is spent"):
        test_speed.test_forward_backward(DISTINCT[0], benchmark_stand_in, results)
    assert not folder.exists()


TALL = small(next(timed for timed in CUDA if timed.name == "tall_cayley"))
SQUARE = Timed("skew_exp", ((4, 4),), graph=True)


def both(timed, clock):
    return [row for table in measure.forward_backward(timed, clock) for row in table]


def test_what_synchronizes_is_timed_eagerly(cuda, monkeypatch):
    cuda.synchronizes = True
    returned = measure.returned

    def checked(weights, reader):
        step = returned(weights, reader)
        return (lambda: cuda.run(step)) if reader.path == "composed" else step

    monkeypatch.setattr(measure, "returned", checked)
    graphs = [row for row in both(SQUARE, cuda.clock) if "graph" in row["phase"]]
    found = {row["contender"]: row["timed"] for row in graphs}
    assert found["composed"] == found["compiled"] == "eager: it synchronizes"
    assert found["closed"] == "graph replay"
    assert cuda.mode == "default"


def test_another_error_is_not_a_synchronization(cuda):
    def broken():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        cuda.clock.synchronizes(broken)
    assert cuda.mode == "default"


def test_what_cannot_be_captured_says_so(cuda):
    cuda.fails = True
    graphs = [row for row in both(SQUARE, cuda.clock) if "graph" in row["phase"]]
    reason = "eager: it cannot be captured: operation not permitted when stream is capturing"
    assert {row["timed"] for row in graphs} == {reason}


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
    into_grad = weights.into_grad

    def out_of_memory(weights, reader):
        def step():
            raise torch.OutOfMemoryError("CUDA out of memory")

        return step if reader.path == "composed" else into_grad(weights, reader)

    monkeypatch.setattr(weights, "into_grad", out_of_memory)
    none, *_ = both(TALL, cuda.clock)
    assert none["timed"] == "none: torch's runs out of memory"


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


def test_a_wrong_result_is_not_timed(cuda, monkeypatch):
    fused = weights.fused
    monkeypatch.setattr(weights, "fused", lambda *a: tuple(x + 1e-3 for x in fused(*a)))
    with pytest.raises(AssertionError, match="is off by"):
        both(SQUARE, cuda.clock)


def test_the_product_in_three_parts_is_exact():
    x = torch.randn(64, 64)
    hi, lo = clocks._split(x)
    assert torch.equal(hi + lo, x)
    assert torch.equal(hi.view(torch.int32) & 0x1FFF, torch.zeros(64, 64, dtype=torch.int32))
    product = hi @ hi + hi @ lo + lo @ hi
    assert (product.double() - x.double() @ x.double()).norm() <= 1e-6 * product.norm()


def test_the_floor_is_the_larger_of_bytes_and_products(cuda):
    clock = cuda.clock
    clock.__dict__ |= {"copy_rate": 100.0, "product_rate": {"float32": 10.0, "3xtf32": 20.0}}
    assert clock.floor(1000, 0, 4) == 10.0
    assert clock.floor(1000, 100, 4) == 10.0
    assert clock.floor(1000, 400, 4) == 20.0
    clock._products[1024] = {"float32": 2.0 * 1024, "3xtf32": 4.0 * 1024}
    assert clock.floor(1, 1024**2, 1024) == 1.0


def test_what_no_algorithm_can_do_without():
    assert least("cayley", (4096, 16, 16)) == (20 * 4096 * 256, 6 * 4096 * 16**3)
    assert least("spectral_norm", (512, 4608)) == (20 * 512 * 4608, 0)
    assert least("householder", (4096, 64))[1] == 9 * 4096 * 64**2 + 2 * 64**3


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
    monkeypatch.setattr(measure, "ROUNDS", 3)
    monkeypatch.setattr(weights, "peers", lambda chain, shape: [])
    clock = Clock("cpu", largest=SMALL)
    table = both(Timed("cayley", ((2, 4, 4),)), clock)
    assert [row["contender"] for row in table] == ["composed", "compiled", "closed"]
    keys = {"chain", "shape", "dtype", "phase", "contender", "median_us", "p20_us", "p80_us"}
    keys |= {"speedup_over_composed", "value_error", "gradient_error"}
    keys |= {"constraint_error", "peak_bytes"}
    assert set(table[0]) == set(table[2]) == keys
    assert not clock.synchronizes(lambda: None)
    assert clock.capture(both) is both
    assert clock.free_bytes() > 0
    assert [row["contender"] for row in measure.read(CASES[0], 4, clock)] == [
        "composed",
        "closed",
    ]


def test_the_peak_of_what_a_step_allocates(cuda):
    def step():
        x = torch.empty(1000)
        y = x + 1
        del x
        z = y * 2
        del y, z
        torch.linalg.solve(torch.eye(100), torch.eye(100))

    at_once = Clock("cpu").peak_bytes(step)
    assert 3 * 40_000 <= at_once <= 6 * 40_000  # two arguments, and what LU takes inside
    assert Clock("cpu").peak_bytes(lambda: [torch.empty(1000) for _ in range(3)] and None) == 12_000
    assert cuda.clock.peak_bytes(step) == 0
    assert cuda.clock.peak_bytes(step) == 50


def test_the_device_alone_is_queued_while_it_sleeps(cuda, monkeypatch):
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    cuda.clock.__dict__["_sleep_rate"] = 1e6
    assert cuda.clock.queued_seconds(lambda: None, 0.01) >= 0
    assert slept == [20_000]
    monkeypatch.setattr(Event, "query", lambda self: True)  # it has come to the step already
    assert cuda.clock.queued_seconds(lambda: None, 0.01) is None
    assert slept == [20_000] * 2 + [40_000, 80_000]
    assert Clock("cpu").queued_seconds(lambda: None, 0.01) is None
