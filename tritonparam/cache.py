"""``cached()``: every fused weight once inside a block, and never a stale one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.optimizer import register_optimizer_step_post_hook

from tritonparam import paths


class _Read(NamedTuple):
    """A weight, its version when it was new, and all that it depends on."""

    key: Hashable
    version: int | None
    weight: Tensor


class _Block:
    """What a ``cached()`` holds: the weights, and the lists it is meant for."""

    def __init__(self, model: nn.Module | None, outer: _Block | None) -> None:
        self.capturing = _capturing()
        self.reads: WeakKeyDictionary[nn.Module, _Read] = WeakKeyDictionary()
        if outer is not None and outer.capturing == self.capturing:
            self.reads = outer.reads
        self.everything: bool = model is None or (outer is not None and outer.everything)
        self.lists: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
        self.lists.update(outer.lists if outer is not None else {})
        for module in model.modules() if model is not None else ():
            if isinstance(module, ParametrizationList):
                self.lists[module] = None

    def keeps(self, plist: nn.Module) -> bool:
        """Whether a weight that is read now may be kept for later, or be one that was.

        What is read while tensors are saved for a checkpoint, or in a backward pass, which may be
        the recomputation of one, has the graph of that one region; and what a CUDA graph replays
        is computed inside of it.
        """
        return (
            (self.everything or plist in self.lists)
            and not torch._C._are_functorch_transforms_active()
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
            and torch._C._current_graph_task_id() == -1
            and _capturing() == self.capturing
        )

    def fresh(self, plist: nn.Module) -> Tensor | None:
        """The weight of a list if it was read before and would be the same now."""
        read = self.reads.get(plist)
        if read is None or read.key != _key(plist) or read.version != _version(read.weight):
            return None
        return read.weight

    def keep(self, plist: nn.Module, weight: Tensor) -> Tensor:
        """Keep a new weight; links may have written to their buffers while it was computed."""
        self.reads[plist] = _Read(_key(plist), _version(weight), weight)
        return weight

    def kin(self, plist: Any) -> list[Any]:
        """The lists to evaluate in one go with this one: its kind, those that are not fresh."""
        kind = plist.kind() if plist in self.lists else None
        if kind is None:
            return [plist]
        kin, links = [plist], set(plist._modules.values())
        others: list[Any] = list(self.lists)
        for other in others:
            if (
                type(other) is type(plist)
                and other.kind() == kind
                and self.fresh(other) is None
                and links.isdisjoint(other._modules.values())  # a link that changes, changes once
            ):
                kin.append(other)
                links.update(other._modules.values())
        return kin


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class _Thread(threading.local):
    """The innermost block of this thread, and the weights read in ``steady()``, or None."""

    def __init__(self) -> None:  # not in the class, where a compiler's guards do not see it
        self.block: _Block | None = None
        self.steady: dict[Hashable, Tensor] | None = None


_thread = _Thread()


@contextmanager
def cached(model: nn.Module | None = None) -> Iterator[None]:
    """Evaluate every fused weight that is read in this block, and this thread, only once.

    A weight is evaluated again where its value could have changed: an optimizer step, an
    assignment, a load, a change of training, gradient or autocast mode. Writes through ``.data``
    cannot be seen. The values are dropped at the end of the outermost block. Inside an activation
    checkpoint, a ``torch.func`` transform, a backward pass, or a CUDA graph that is captured in
    the block, every read is an evaluation.

    Arguments:
        model: cache its weights only. On a GPU, the first read of a weight that has a kernel for
            several evaluates with it all weights of its kind in the model, in few launches. So
            the mode of that read holds for all; and spectral norm iterates for all.

    Raises:
        TypeError: `model` is not an ``nn.Module``.

    >>> import tritonparam as tp
    >>> layer = tp.register_parametrization(nn.Linear(3, 3), "weight", tp.Skew(), tp.CayleyMap())
    >>> with cached(layer):
    ...     layer.weight is layer.weight
    True
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"cached: the model must be an nn.Module, got {type(model).__name__}; "
            "pass the module that holds the weights, or nothing for all weights."
        )
    outer = _thread.block
    block = _thread.block = _Block(model, outer)
    # Fused optimizers do not raise the version of what they update.
    handle = register_optimizer_step_post_hook(lambda *_: block.reads.clear())
    try:
        yield
    finally:
        _thread.block = outer
        handle.remove()
        if outer is not None and not outer.everything:
            for plist in set(block.lists) - set(outer.lists):
                block.reads.pop(plist, None)


@contextmanager
def steady() -> Iterator[None]:
    """Evaluate every weight once in a block that changes none: nothing is looked at again.

    Such are the forwards of torch's own modules, and what a compiler traces sees no versions.
    """
    before = _thread.steady
    _thread.steady = {} if before is None else before
    try:
        yield
    finally:
        _thread.steady = before


def read(plist: nn.Module, evaluate: Callable[[], Tensor]) -> Tensor:
    """The weight of a list: ``evaluate()``, or what it gave last in the block around."""
    steady = _thread.steady
    if steady is None:
        return _read_checked(plist, evaluate)
    key = plist, torch.is_grad_enabled()
    if key not in steady:
        steady[key] = _read_checked(plist, evaluate)
    return steady[key]


def _read_checked(plist: Any, evaluate: Callable[[], Tensor]) -> Tensor:
    if torch.compiler.is_compiling():  # first: a guard on the block would compile twice
        return evaluate()
    block = _thread.block
    if block is None or not block.keeps(plist):
        return evaluate()
    weight = block.fresh(plist)
    if weight is not None:
        return weight
    kin = block.kin(plist)
    if len(kin) == 1:
        return block.keep(plist, evaluate())
    for other, weight in zip(kin, type(plist).together(kin), strict=True):
        block.keep(other, weight)
    return block.reads[plist].weight


def _key(plist: nn.Module) -> Hashable:
    """All that can change the value of a list, or what autograd makes of it."""
    modes = (
        paths.override(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.cuda.is_initialized() and torch.cuda.current_stream().cuda_stream,
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
    )
    links = tuple((id(m), m.training) for m in plist.modules())
    tensors = (x for ts in (plist.parameters(), plist.buffers()) for x in ts)
    return modes, links, tuple(map(_tensor_key, tensors))


def _tensor_key(x: Tensor) -> Hashable:
    if x.is_inference():
        return object()  # it has no version: equal to nothing, so that nothing is reused
    where = None if x.is_meta else x.data_ptr()
    return id(x), where, x._version, x.dtype, x.shape, x.requires_grad


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
