"""Stand-ins for torch.cuda, with which the benchmarks of a GPU run on the CPU."""

from __future__ import annotations

import contextlib
import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.clock import Clock

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

    def pool(self):
        return self


class Stream:
    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A "cuda" clock for tensors on the CPU, and what tests change or look at.

    `synchronizes` says whether `run` does, `captured` how many captures do not fail, `pools` which
    pools graphs asked for.
    """
    state = SimpleNamespace(synchronizes=False, captured=1 << 10, mode="default", free=1 << 40)
    state.held, state.pools = itertools.count(100, 50), []

    def set_mode(mode):
        state.mode = mode

    @contextlib.contextmanager
    def graph(_, pool=None):
        state.pools.append(pool)
        if len(state.pools) > state.captured:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA error")
        yield

    def run(step):
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
        "get_device_name": lambda *_: "Stand-in 1",
    }
    for name, replacement in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    state.clock, state.run = Clock("cuda", device="cpu", largest=SMALL), run
    return state
