"""The clock of the benchmarks: order, queues, graphs, memory, rates."""

from __future__ import annotations

import pytest
import torch

from benchmarks import clock as clocks
from benchmarks.clock import Clock
from tests.stand_in_gpu import Event, stand_in


@pytest.fixture
def cuda(monkeypatch):
    return stand_in(monkeypatch)


def test_caches_are_cold_and_the_device_idle_before_a_step_begins(cuda, monkeypatch):
    log = []
    cache = cuda.clock._more_than_the_cache
    assert cache.numel() * cache.element_size() == 2 * (1 << 10)
    before = cache._version
    evict = cuda.clock.evict
    monkeypatch.setattr(cuda.clock, "evict", lambda: evict() or log.append("evict"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(Event, "record", lambda self: setattr(self, "at", log.append("event") or 1))

    def step():
        log.append("step")

    cuda.clock.sample(step)
    assert log == ["evict", "wait", "event", "step", "event"]
    log.clear()
    cuda.clock.device_sample(step)
    assert log == ["evict", "event", "step", "event"]
    log.clear()
    cuda.clock.__dict__["_sleep_rate"] = 1e6
    cuda.clock.queued_seconds(step, 0.01, lambda: log.append("before"))
    assert log[-6:] == ["before", "wait", "evict", "event", "step", "event"]
    assert cache._version == before  # read, not written


def test_another_error_is_not_a_synchronization(cuda):
    def broken():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        cuda.clock.synchronizes(broken)
    assert cuda.mode == "default"


def test_steps_that_follow_each_other_are_captured_in_one_pool(cuda):
    ran = []
    first, second = cuda.clock.capture(lambda: ran.append("a"), lambda: ran.append("b"))
    assert ran == ["a", "b"] * 4  # three times to warm up
    assert first.__self__ is not second.__self__
    assert cuda.pools == [None, first.__self__]


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
