"""The class of a parametrized module, shared by all modules of its kind.

torch makes a class for every module it parametrizes and injects its properties there. So equal
blocks are of different types, which a compiler compiles one by one; copies are of one, which
breaks when one of them is parametrized anew; and none can be pickled, as no import finds it. Here
a class is made of what was the module's class and of the names of the parametrized tensors.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

_shared: WeakValueDictionary[tuple[type, tuple[str, ...]], type] = WeakValueDictionary()
_BASE = "_class_before_parametrizations"  # in a class made here, and not in what is made of it
_OF_ABC = ("_abc_impl", "__abstractmethods__")


def share_class(module: nn.Module, *more: str) -> None:
    """Give a parametrized module the class that all of its kind share, for `more` tensors as well.

    A class that is not torch's alone stays: FSDP's, or one to which somebody has added methods.
    """
    cls = type(module)
    if _BASE in vars(cls) or _is_torchs(cls):
        parametrized: Any = module.parametrizations
        module.__class__ = shared_class(cls.__bases__[0], *sorted({*parametrized, *more}))


def shared_class(base: type, *names: str) -> type:
    """The class of modules of class `base` with these tensors parametrized, in sorted order."""
    cls = _shared.get((base, names))
    if cls is None:
        content: dict[str, Any] = {name: parametrized_tensor(name) for name in names}
        content |= {"__module__": torch_parametrize.__name__, _BASE: base}
        if not hasattr(base, "__deepcopy__"):
            content["__deepcopy__"] = _deepcopy
        cls = _metaclass(type(base))(f"Parametrized{base.__name__}", (base,), content)
        _shared[base, names] = cls
    return cls


@lru_cache
def parametrized_tensor(name: str) -> property:
    """torch's property, of a module that has the tensor parametrized; else its plain attribute."""

    def read(self: nn.Module) -> Any:
        lists: Any = self._modules.get("parametrizations")
        if lists is None or name not in lists._modules:
            return self.__dict__[name] if name in self.__dict__ else self.__getattr__(name)
        plist = lists._modules[name]
        return _read_cached(self, name, plist) if torch_parametrize._cache_enabled else plist()

    def assign(self: nn.Module, value: Tensor) -> None:
        lists: Any = self._modules.get("parametrizations")
        if lists is None or name not in lists._modules:
            self.__dict__[name] = value
        else:
            lists._modules[name].right_inverse(value)

    return property(read, assign)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As torch's class does it, past ``__getstate__``, for which an RNN evaluates its weights."""
    memo[id(self)] = replica = self.__new__(type(self))
    replica.__dict__ = copy.deepcopy(self.__dict__, memo)
    for slot in copyreg._slotnames(type(self)):  # type: ignore[attr-defined]
        if hasattr(self, slot):
            setattr(replica, slot, copy.deepcopy(getattr(self, slot), memo))
    return replica


def _read_cached(module: nn.Module, name: str, evaluate: Callable[[], Tensor]) -> Tensor:
    """Inside of torch's ``cached()``: its table, and its keys."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    cache: dict[Any, Any] = torch_parametrize._cache
    key = (id(module), name)
    if cache.get(key) is None:
        cache[key] = evaluate()
    return cache[key]


class _Shared(type):
    """The class of shared classes, which torch's registration and removal leave as they are."""

    def __setattr__(cls, name: str, value: Any) -> None:
        super().__setattr__(name, parametrized_tensor(name) if _is_injected(value) else value)

    def __delattr__(cls, name: str) -> None:
        if not _is_injected(vars(cls).get(name)):
            super().__delattr__(name)


def _is_injected(attribute: Any) -> bool:
    """Whether it is a property made here, or torch's."""
    homes = (__name__, torch_parametrize.__name__)
    return isinstance(attribute, property) and getattr(attribute.fget, "__module__", None) in homes


def _is_torchs(cls: type) -> bool:
    """Whether torch made the class, and nobody has added to it."""
    refusal = vars(cls).get("__getstate__")  # to be pickled
    if getattr(refusal, "__module__", None) != torch_parametrize.__name__:
        return False
    added = {name for name, value in vars(cls).items() if not _is_injected(value)}
    return added <= {"__getstate__", "__deepcopy__", "__module__", "__doc__", *_OF_ABC}


@lru_cache
def _metaclass(of: type) -> type:
    """The class of classes that share and are of class `of` too; they are pickled by recipe."""
    metaclass = _Shared if of is type else type("_Shared", (_Shared, of), {})
    copyreg.pickle(metaclass, _recipe)
    return metaclass


def _recipe(cls: type) -> str | tuple[Any, ...]:
    if _BASE not in vars(cls):  # a class made of a shared one: by its name, as any
        return cls.__qualname__
    names = sorted(name for name, value in vars(cls).items() if _is_injected(value))
    return shared_class, (cls.__bases__[0], *names)
