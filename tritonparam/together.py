"""Many arguments of one fused map evaluated in few launches, each value with a graph of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from tritonparam import paths
from tritonparam.autograd import EagerMap, Gradients, Saved, laid_out
from tritonparam.numerics import dense, no_autocast

Call = tuple[Any, ...]


class GroupedMap:
    """The values of one fused map at many arguments, as if it were called once for each.

    The gradients of a backward pass are computed together, for those values that it reaches. A
    value that a pass has reached cannot be reached again, as anywhere in torch; the others can.

    Arguments:
        one: the map of one.
        forward: called as ``forward(calls)``; returns for each what ``one.forward`` returns.
        backward: called as ``backward(gs, saved, dtype, numbers)`` with a list of what
            ``one.backward`` takes; returns the gradients of each.
        max_numel: of the first arguments that are taken at once; None for no limit.
    """

    def __init__(
        self,
        one: EagerMap,
        forward: Callable[[Sequence[Call]], Sequence[tuple[Tensor, Saved]]],
        backward: Callable[..., Sequence[Gradients]],
        max_numel: int | None = None,
    ) -> None:
        self.one, self.forward, self.backward = one, forward, backward
        self.max_numel = max_numel

    def __call__(self, calls: Sequence[Call]) -> list[Tensor]:
        """The values for all arguments, each differentiable in its leading ones."""
        n = len(calls)
        if self.max_numel is not None:
            n = max(self.max_numel // max(calls[0][0].numel(), 1), 1)
        parts = [self._at_once(calls[i : i + n]) for i in range(0, len(calls), n)]
        return [value for part in parts for value in part]

    def _at_once(self, calls: Sequence[Call]) -> list[Tensor]:
        leading = [x for call in calls for x in call[: self.one.n_gradients]]
        if torch.is_grad_enabled() and any(x.requires_grad for x in leading):
            calls = [self.one.own(call) for call in calls]
            leading = [x for call in calls for x in call[: self.one.n_gradients]]
            graph = _Graph(self, calls)
            values = _Together.apply(graph, *leading)
            values = [_Apart.apply(graph, i, value) for i, value in enumerate(values)]
        else:
            with no_autocast(leading[0]):
                values = [value for value, _ in self.forward(calls)]
        dtypes = [call[self.one.like].dtype for call in calls]
        return [value.to(dtype) for value, dtype in zip(values, dtypes, strict=True)]


class _Graph:
    """What the nodes of one evaluation hand to each other, by the number of the value."""

    def __init__(self, grouped: GroupedMap, calls: Sequence[Call]) -> None:
        self.grouped, self.calls = grouped, calls
        self.numbers = [call[grouped.one.n_tensors :] for call in calls]
        self.dtypes = [x.dtype for x in calls[0][: grouped.one.n_gradients]]
        self.saved: dict[int, Saved] = {}


class _Together(torch.autograd.Function):
    """The leading arguments of all -> all values; the gradients of those that a pass reaches."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *leading: Tensor) -> tuple[Tensor, ...]:
        with no_autocast(leading[0]):
            results = graph.grouped.forward(graph.calls)
        del graph.calls
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        graph.saved = {i: saved for i, (_, saved) in enumerate(results)}
        return tuple(value for value, _ in results)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        one = graph.grouped.one
        some = [g for g in gs if g is not None]
        reached = [i for i, g in enumerate(gs) if g is not None]
        saved = [laid_out(graph.saved.pop(i)) for i in reached]
        numbers = [graph.numbers[i] for i in reached]
        with no_autocast(some[0]):
            # create_graph=True, and what is batched: as one by one
            if torch.is_grad_enabled() or any(map(is_legacy_batchedtensor, some)):
                gradients = one.graph if torch.is_grad_enabled() else one.backward
                calls = zip(some, saved, numbers, strict=True)
                grads = [gradients(g, kept, graph.dtypes[0], *rest) for g, kept, rest in calls]
            else:
                grads = graph.grouped.backward(some, saved, graph.dtypes[0], numbers)
        by_value: list[Any] = [[None] * one.n_gradients] * len(gs)
        for i, dxs in zip(reached, grads, strict=True):
            by_value[i] = [dx.to(dtype) for dx, dtype in zip(dxs, graph.dtypes, strict=True)]
        return (None, *[dx for dxs in by_value for dx in dxs])


class _Apart(torch.autograd.Function):
    """One value, and what is saved for its gradient, which a pass hands on with the gradient."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, i: int, value: Tensor) -> Tensor:
        own = value.detach()
        ctx.save_for_backward(*[own if x is value else x for x in graph.saved.pop(i)])
        ctx.graph, ctx.i = graph, i
        return own

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor]:
        ctx.graph.saved[ctx.i] = ctx.saved_tensors
        return None, None, dense(g)


_MAX_NUMEL = 2**24  # of a stack: 64 MiB in fp32, and of intermediates some ten times that


def stacked(one: EagerMap, n_like_the_value: int) -> GroupedMap:
    """The map of one, on a stack of arguments of one shape.

    Of what it saves, the first `n_like_the_value` tensors are arguments or the value; the others
    have as their first dimension that of the batch of matrices.
    """

    def forward(calls: Sequence[Call]) -> list[tuple[Tensor, Saved]]:
        stacks = [torch.stack(xs) for xs in zip(*[c[: one.n_tensors] for c in calls], strict=True)]
        y, saved = one.forward(*stacks, *calls[0][one.n_tensors :])
        for _ in calls[1:]:
            paths.count("kernel")
        values = [x.data for x in y]  # each with a version of its own
        columns: list[Sequence[Tensor]] = []
        for x in saved:
            column = next((i for i, stack in enumerate(stacks) if x is stack), None)
            if x is y:
                columns.append(values)
            else:
                parts = x.chunk(len(calls)) if column is None else [c[column] for c in calls]
                columns.append(parts)
        return list(zip(values, zip(*columns, strict=True), strict=True))

    def backward(
        gs: Sequence[Tensor], saved: Sequence[Saved], dtype: torch.dtype, numbers: Sequence[Call]
    ) -> list[Gradients]:
        columns = enumerate(zip(*saved, strict=True))
        joined = [(torch.stack if i < n_like_the_value else torch.cat)(xs) for i, xs in columns]
        grads = one.backward(torch.stack(list(gs)), tuple(joined), dtype, *numbers[0])
        return list(zip(*grads, strict=True))

    return GroupedMap(one, forward, backward, _MAX_NUMEL)
