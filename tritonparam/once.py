"""torch's modules that read a weight several times in one forward, made to evaluate it once.

``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` keep a list of their weights, read a weight four times to see
whether the list is old, and keep its graph alive between forwards, which deepcopy refuses. Here
the list is made of one read of each weight during a forward, and is gone after it.
``nn.MultiheadAttention`` reads its weights to choose a fast path: its forward is cached.
"""

from __future__ import annotations

import functools
import pkgutil
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tritonparam.cache import cached, steady


class _Forward(threading.local):
    """The RNN whose forward runs in this thread, and its weights once they are read."""

    def __init__(self) -> None:
        self.rnn: nn.Module | None = None
        self.weights: list[Tensor | None] | None = None


_forward = _Forward()
_GONE = weakref.ref(set())  # type: ignore[var-annotated]


def methods(base: type) -> dict[str, Any]:
    """What the class of a parametrized module needs that is made of `base`; empty for most."""
    if not issubclass(base, nn.RNNBase | nn.MultiheadAttention):
        return {}
    forward = next(vars(c)["forward"] for c in base.__mro__ if "forward" in vars(c))
    if issubclass(base, nn.RNNBase):
        return {"forward": _alone(forward), **_RNN}
    return {"forward": _cached(forward)}


def _alone(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An RNN's forward that leaves no weights behind."""

    @functools.wraps(forward)
    def alone(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        before = _forward.rnn, _forward.weights
        _forward.rnn, _forward.weights = self, None
        try:
            return forward(self, *args, **kwargs)
        finally:
            _forward.rnn, _forward.weights = before

    return alone


def _weights(rnn: nn.RNNBase) -> list[Tensor | None]:
    """The weights as the forward wants them; outside of it none, so that nothing can be stale."""
    names = rnn._flat_weights_names
    if _forward.rnn is not rnn:
        return [None] * len(names)
    if _forward.weights is None:
        _forward.weights = [getattr(rnn, name) for name in names]
    return _forward.weights


def _read_again(rnn: nn.RNNBase) -> None:
    _forward.rnn, _forward.weights = rnn, None


def forget(module: nn.Module) -> None:
    """Leave only plain parameters in an RNN's own list, and have torch look at it once more."""
    if isinstance(module, nn.RNNBase):
        plain = [module._parameters.get(name) for name in module._flat_weights_names]
        vars(module).update(_flat_weights=plain, _flat_weight_refs=[_GONE] * len(plain))


_RNN = {
    "_flat_weights": property(_weights, lambda rnn, weights: None),
    "_update_flat_weights": _read_again,
    "_init_flat_weights": forget,
    # cuDNN's own list of weights is made by moving their storage, which a weight that autograd
    # has saved does not bear.
    "flatten_parameters": lambda rnn: None,
}


def _cached(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward in which every weight is evaluated once."""

    changes_nothing = forward is nn.MultiheadAttention.forward

    @functools.wraps(forward)
    def once(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with steady() if changes_nothing or torch.compiler.is_compiling() else cached():
            return forward(self, *args, **kwargs)

    return once


def _cached_in_eval(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward in which every weight is evaluated once in eval mode, where none iterates.

    In train mode layers that share a module are read one after another, as without it.
    """

    @functools.wraps(forward)
    def once(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.training or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with cached():
            return forward(self, *args, **kwargs)

    return once


_Class = TypeVar("_Class", bound=type)


def leaf(cls: _Class) -> _Class:
    """Make a class of modules one of torch's to ``torch.fx``, by its ``__module__``.

    A traced graph calls such modules. Into others it looks, and keeps the weight as a constant.
    To ``inspect``, too, the class is in torch's file, and doctest passes over its examples.
    """
    this: Any = cls
    path = f"{this.__module__}:{this.__name__}"

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made = super(this, self).__reduce_ex__(protocol)
        return (_blank, (path,), *made[2:]) if type(self) is this else made

    this.__reduce_ex__ = reduce  # pickle, too, goes by __module__
    this.__module__ = this.__bases__[0].__module__
    return cls


def _blank(path: str) -> nn.Module:
    cls = pkgutil.resolve_name(path)
    return cls.__new__(cls)


@leaf
class MultiheadAttention(nn.MultiheadAttention):
    """torch's class, which also reads the weight of the projection that it holds."""

    forward = _cached(nn.MultiheadAttention.forward)


@leaf
class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch's class, which also reads the weights of the modules that it holds."""

    forward = _cached(nn.TransformerEncoderLayer.forward)


@leaf
class TransformerEncoder(nn.TransformerEncoder):
    """torch's class, which also reads the weights of its first layer, given a padding mask."""

    forward = _cached_in_eval(nn.TransformerEncoder.forward)


READERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
}
