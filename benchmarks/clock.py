"""What depends on the device: clock, caches, memory, graphs, rates of copies and of products."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from statistics import median
from typing import NamedTuple

import torch
from torch.autograd import profiler

from tritonparam.doctor import waits

Step = Callable[[], object]
PRECISIONS = ("float32", "3xtf32")
PRODUCTS_FROM = 1024  # the size from which the products themselves are timed


class Sample(NamedTuple):
    """One run of a step: its seconds as a user waits, and those until the host was free again."""

    seconds: float
    host: float


class Clock:
    """Times steps on one kind of device.

    Arguments:
        kind: "cpu" or "cuda".
        device: of its tensors; tests let a "cuda" clock time tensors on the CPU.
        largest: the size of the copies, in bytes, and of the products that rates are taken from.
    """

    def __init__(
        self, kind: str, device: str | None = None, largest: tuple[int, int] = (1 << 28, 4096)
    ) -> None:
        self.kind, self.device, self.largest = kind, device or kind, largest
        self._products: dict[int, dict[str, float]] = {}

    def sample(self, step: Step) -> Sample:
        """One step as a user waits for it, started on an idle device with cold caches."""
        self.evict()
        self.synchronize()
        return self._timed(step)

    def host_seconds(self, step: Step) -> float:
        """What the host spends on a step, whether or not the device has done it then."""
        self.synchronize()
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    def device_sample(self, step: Step) -> Sample:
        """One step on the device alone: it is queued while the caches are being emptied.

        The host has to be done by then, as with a graph's replay or a single call.
        """
        self.evict()
        return self._timed(step)

    def queued_seconds(self, step: Step, host: float, before: Step = lambda: None) -> float | None:
        """One step on the device alone, of which the host has to queue many launches.

        The device is kept from starting it for twice the seconds that the host takes, or more
        where it starts before the host is done. None where it still does, since the step waits for
        it, and on the CPU. What the step needs each time is done before.
        """
        if self.kind != "cuda":
            return None
        for pause in (2 * host, 4 * host, 8 * host):
            before()
            self.synchronize()
            torch.cuda._sleep(int(pause * self._sleep_rate))
            self.evict()
            _, start, end = self._recorded(step)
            ahead = not start.query()
            end.synchronize()
            if ahead:
                return start.elapsed_time(end) / 1e3
        return None

    def _timed(self, step: Step) -> Sample:
        if self.kind != "cuda":
            seconds = self.host_seconds(step)
            return Sample(seconds, seconds)
        host, start, end = self._recorded(step)
        end.synchronize()
        return Sample(start.elapsed_time(end) / 1e3, host)

    def _recorded(self, step: Step) -> tuple[float, torch.cuda.Event, torch.cuda.Event]:
        """The host's seconds, and the events before and after."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        started = time.perf_counter()
        step()
        host = time.perf_counter() - started
        end.record()
        return host, start, end

    @cached_property
    def _sleep_rate(self) -> float:
        """Cycles per second of a device that sleeps."""
        cycles = 1 << 20
        return cycles / self._median(lambda: torch.cuda._sleep(cycles))

    def peak_bytes(self, step: Step) -> int:
        """The most that one step holds at a time of what is allocated for tensors after it starts.

        Outputs, gradients, saved tensors and what operators allocate for themselves inside; on
        CUDA as ``max_memory_allocated`` counts it, on the CPU by the allocations and releases that
        the profiler sees. Of neither what LAPACK, oneDNN or Triton take elsewhere, nor what lies in
        the pool of a graph. What was alive before is not counted, and released counts negative:
        gradients of an earlier step are dropped by the caller.
        """
        if self.kind != "cuda":
            with profiler.profile(profile_memory=True) as profile:
                step()
            return _highest(profile)
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def evict(self) -> None:
        """Read twice what the L2 cache holds, so that nothing of a step is left in it.

        Weights that rotate would leave warm what the allocator hands out again, outputs, saved
        tensors and work space, and the smallest would need thousands of copies, each compiled and
        captured apart. Reading costs the step nothing: it is over before the step begins, and it
        leaves nothing to be written back.
        """
        if self.kind == "cuda":
            self._more_than_the_cache.sum()

    @cached_property
    def _more_than_the_cache(self) -> torch.Tensor:
        size = torch.cuda.get_device_properties().L2_cache_size
        return torch.zeros(2 * size // 4, device=self.device)

    def free_bytes(self) -> int:
        """Memory that can still be allocated."""
        if self.kind != "cuda":
            return 8 << 30
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def synchronizes(self, step: Step) -> bool:
        """Whether a step waits for the device, so that no graph can hold it."""
        return self.kind == "cuda" and waits(step)

    def capture(self, *steps: Step) -> list[Step]:
        """A graph of each step, to be replayed in this order; the steps where there are no graphs.

        They share their memory, so that a step finds what the one before has left.
        """
        if self.kind != "cuda":
            return list(steps)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                for step in steps:
                    step()
        torch.cuda.current_stream().wait_stream(stream)
        graphs = [torch.cuda.CUDAGraph() for _ in steps]
        pool = None
        for graph, step in zip(graphs, steps, strict=True):
            with torch.cuda.graph(graph, pool=pool):
                step()
            pool = graph.pool()
        return [graph.replay for graph in graphs]

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a large copy."""
        source = torch.ones(self.largest[0] // 4, device=self.device)
        target = torch.empty_like(source)
        seconds = self._median(lambda: target.copy_(source))
        return 2 * source.numel() * 4 / seconds

    def product_seconds(self, n: int) -> dict[str, float]:
        """One n × n product in fp32 by ``torch.matmul``, and as three TF32 products (3xTF32).

        The second is the sum of hi hi, hi lo and lo hi with both factors split beforehand.
        """
        if n not in self._products:
            a, b, c = (torch.randn(n, n, device=self.device) for _ in range(3))
            (a_hi, a_lo), (b_hi, b_lo) = _split(a), _split(b)

            def three() -> None:
                torch.matmul(a_hi, b_hi, out=c)
                c.addmm_(a_hi, b_lo)
                c.addmm_(a_lo, b_hi)

            before = torch.backends.cuda.matmul.allow_tf32
            try:
                torch.backends.cuda.matmul.allow_tf32 = False
                plain = self._median(lambda: torch.matmul(a, b, out=c))
                torch.backends.cuda.matmul.allow_tf32 = True
                split = self._median(three)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before
            self._products[n] = dict(zip(PRECISIONS, (plain, split), strict=True))
        return self._products[n]

    @cached_property
    def product_rate(self) -> dict[str, float]:
        """Operations per second of large products, by precision."""
        n = self.largest[1]
        return {name: 2 * n**3 / seconds for name, seconds in self.product_seconds(n).items()}

    def rates(self) -> dict[str, float]:
        """What the floors are made of, for the head of a result file."""
        found = {"copy_gb_per_s": self.copy_rate / 1e9}
        found |= {f"{name}_tflops": rate / 1e12 for name, rate in self.product_rate.items()}
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    def floor(self, n_bytes: int, operations: int, n: int) -> float:
        """Seconds below which nothing that moves and computes this much can be.

        From n = PRODUCTS_FROM the rate of the products is that of products of the same size.
        """
        if not operations:
            return n_bytes / self.copy_rate
        rate = max(self.product_rate.values())
        if n >= PRODUCTS_FROM:
            rate = 2 * n**3 / min(self.product_seconds(n).values())
        return max(n_bytes / self.copy_rate, operations / rate)

    def _median(self, step: Step) -> float:
        for _ in range(3):
            step()
        return median(self.device_sample(step).seconds for _ in range(9))


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x = hi + lo, hi with the 10 bits of TF32's mantissa."""
    hi = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return hi, x - hi


def _highest(profile: profiler.profile) -> int:
    """The highest sum of the bytes allocated and released on the CPU, in the order of time."""
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest
