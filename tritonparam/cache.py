"""``cached()``: every fused weight once inside a block, and never a stale one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tritonparam import registry


class _Reads(threading.local):
    """The weights read in this thread inside ``cached()`` and ``steady()``; None outside."""

    def __init__(self) -> None:  # not in the class, where a compiler's guards do not see it
        self.weights: WeakKeyDictionary[nn.Module, tuple[Hashable, Tensor]] | None = None
        self.steady: dict[Hashable, Tensor] | None = None


_reads = _Reads()


@contextmanager
def cached() -> Iterator[None]:
    """Evaluate every fused weight that is read in this block, and this thread, only once.

    A weight is evaluated again where its value could have changed: an optimizer step, an
    assignment, a load, a change of training, gradient or autocast mode. Writes through ``.data``
    cannot be seen. The values are dropped at the end of the outermost block.

    >>> import tritonparam as tp
    >>> layer = tp.register_parametrization(nn.Linear(3, 3), "weight", tp.Skew(), tp.CayleyMap())
    >>> with cached():
    ...     layer.weight is layer.weight
    True
    """
    if _reads.weights is not None:
        yield
        return
    weights: WeakKeyDictionary[nn.Module, tuple[Hashable, Tensor]] = WeakKeyDictionary()
    _reads.weights = weights
    # Fused optimizers do not raise the version of what they update.
    handle = register_optimizer_step_post_hook(lambda *_: weights.clear())
    try:
        yield
    finally:
        _reads.weights = None
        handle.remove()


@contextmanager
def steady() -> Iterator[None]:
    """Evaluate every weight once in a block that changes none: nothing is looked at again.

    Such are the forwards of torch's own modules, and what a compiler traces sees no versions.
    """
    before = _reads.steady
    _reads.steady = {} if before is None else before
    try:
        yield
    finally:
        _reads.steady = before


def read(plist: nn.Module, evaluate: Callable[[], Tensor]) -> Tensor:
    """The weight of a list: ``evaluate()``, or what it gave last in the block around."""
    weights, steady = _reads.weights, _reads.steady
    if weights is None and steady is None:
        return evaluate()
    if steady is None:
        return _read_checked(plist, evaluate)
    key = plist, torch.is_grad_enabled()
    if key not in steady:
        steady[key] = _read_checked(plist, evaluate)
    return steady[key]


def _read_checked(plist: nn.Module, evaluate: Callable[[], Tensor]) -> Tensor:
    weights = _reads.weights
    if weights is None or torch.compiler.is_compiling():
        return evaluate()
    if torch._C._are_functorch_transforms_active():
        return evaluate()
    key, weight = weights.get(plist, (None, None))
    if weight is None or key != _key(plist):
        weight = evaluate()
        weights[plist] = (_key(plist), weight)  # links may have written to their buffers
    return weight


def _key(plist: nn.Module) -> Hashable:
    """All that can change the value of a list, or what autograd makes of it."""
    modes = (
        registry.override(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
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
