"""A forward and a backward pass over weights that are read together: each, both, in graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tritonparam as tp
from benchmarks.cases import BACKWARD, BOTH, FORWARD
from benchmarks.clock import Clock, Sample
from benchmarks.rows import first_line

Samples = dict[str, Sample]  # of one turn, by phase
Timer = Callable[[], Samples]

# Seconds: what takes longer is not compiled, and not timed again for what the host does beside the
# device, which is a small part of it.
SLOW = 0.3


class Reader(NamedTuple):
    """What reads the weights of modules: on which path, and the call."""

    path: str
    read: Callable[[], list[Tensor]]
    parameters: list[nn.Parameter]

    @classmethod
    def of(cls, path: str, modules: list[nn.Module]) -> Reader:
        """Reads ``weight`` of each module, by kernels those of several together."""
        model = nn.ModuleList(modules)

        def one_by_one() -> list[Tensor]:
            return [module.weight for module in modules]

        def together() -> list[Tensor]:
            with tp.cached(model):
                return one_by_one()

        read = together if path == "kernel" and len(modules) > 1 else one_by_one
        return cls(path, read, list(model.parameters()))


class Pass:
    """Forward and backward over the weights of a reader.

    The forward pass is what training pays: gradients are enabled, so the graph is built and what
    the backward pass needs is saved. The backward pass takes what the last forward pass left, and
    leaves gradients in ``.grad``, which was None.

    Arguments:
        reader: what reads the weights.
        gs: the gradients that come in.
        returned: gradients are returned instead, as a graph needs it, whatever stream the
            parameters came from.
    """

    def __init__(self, reader: Reader, gs: list[Tensor], *, returned: bool = False) -> None:
        self.reader, self._gs, self._returned = reader, gs, returned
        self._weights: list[Tensor] = []

    def forward(self) -> None:
        """Read the weights."""
        self._weights = self.reader.read()

    def backward(self) -> object:
        """Their gradients, once."""
        weights, self._weights = self._weights, []
        if self._returned:
            return torch.autograd.grad(weights, self.reader.parameters, self._gs)
        return torch.autograd.backward(weights, self._gs)

    def both(self) -> object:
        """One after the other, without a pause."""
        self.forward()
        return self.backward()

    def run(self) -> None:
        """Both, untimed: what is compiled or loaded on first use is afterwards."""
        with tp.use_path(self.reader.path):
            self._prepare(BOTH)
            self.both()

    def samples(self, clock: Clock) -> Samples:
        """One turn: forward, backward on what it left, and both.

        Where the device runs beside the host, both are timed again as a user waits for them:
        the host goes on to the backward pass while the device is still at the forward pass.
        """
        with tp.use_path(self.reader.path):
            self._prepare(FORWARD)
            forward, backward = clock.sample(self.forward), clock.sample(self.backward)
            both = Sample(*(a + b for a, b in zip(forward, backward, strict=True)))
            if clock.kind == "cuda" and both.seconds < SLOW:
                self._prepare(BOTH)
                both = clock.sample(self.both)
        return {BOTH: both, FORWARD: forward, BACKWARD: backward}

    def device_seconds(self, clock: Clock, phase: str, host: float) -> float | None:
        """One phase on the device alone, of which the host takes so long; None if it waits."""
        step = {BOTH: self.both, FORWARD: self.forward, BACKWARD: self.backward}[phase]
        with tp.use_path(self.reader.path):
            return clock.queued_seconds(step, host, partial(self._prepare, phase))

    def peak_bytes(self, clock: Clock) -> int:
        """The most that both hold at a time."""
        with tp.use_path(self.reader.path):
            self._prepare(BOTH)
            return clock.peak_bytes(self.both)

    def replays(self, clock: Clock) -> tuple[Timer, str]:
        """What times graphs of this pass, or the pass itself if no graph holds it; and which."""
        with tp.use_path(self.reader.path):
            self.both()
            if clock.synchronizes(self.both):
                return partial(self.samples, clock), "eager: it synchronizes"
            graphs, how = {}, "graph replay"
            try:
                (graphs[BOTH],) = clock.capture(self.both)
                graphs[FORWARD], graphs[BACKWARD] = clock.capture(self.forward, self.backward)
            except RuntimeError as error:
                clock.synchronize()
                reason = f"it cannot be captured: {first_line(error)}"
                if not graphs:
                    return partial(self.samples, clock), f"eager: {reason}"
                how += f"; in parts {reason}"
        # In this order: a replay of the backward pass takes what that of the forward pass left.
        return lambda: {phase: clock.device_sample(graphs[phase]) for phase in graphs}, how

    def _prepare(self, phase: str) -> None:
        self._weights = []
        for x in self.reader.parameters:
            x.grad = None
        if phase == BACKWARD:
            self.forward()
