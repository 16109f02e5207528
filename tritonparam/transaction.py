"""All or nothing: undo what a failed call did to modules, and write tensors in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@contextmanager
def restored_on_error(*modules: nn.Module, links: Sequence[nn.Module] = ()) -> Iterator[None]:
    """If the block raises, give `modules` and `links` back their class, attributes and tables,
    which are those of tensors, of submodules and of hooks.

    The buffers of links, which a right inverse may write to, get their values back as well; other
    tensors are not looked at, so that a block writes to them only when it can no longer fail.
    """
    inner = [m for link in links for m in link.modules()]
    values = [(b, b.clone()) for m in inner for b in m._buffers.values() if b is not None]
    before = []
    for m in (*modules, *inner):
        tables: list[Any] = [t for t in vars(m).values() if type(t) in (dict, OrderedDict, set)]
        before.append((m, m.__class__, dict(vars(m)), [(t, t.copy()) for t in tables]))
    try:
        yield
    except BaseException:
        for m, cls, attributes, contents in before:
            m.__class__ = cls
            vars(m).clear()
            vars(m).update(attributes)
            for table, content in contents:
                table.clear()
                table.update(content)
        for buffer, value in values:
            write(buffer, value)
        raise


def stand_in(x: Tensor) -> Tensor:
    """A tensor that torch may overwrite in x's place: a copy of it, a Parameter if x is one."""
    copy = x.detach().clone()
    return nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy


def fits(x: Tensor, new: Tensor) -> bool:
    """Whether new's values can be written into x."""
    return x.shape == new.shape and x.dtype == new.dtype and _wrapper(x) is _wrapper(new)


def _wrapper(x: Tensor) -> type | None:
    """The class of a tensor that holds others, into which no plain one can be copied."""
    return type(x) if is_traceable_wrapper_subclass(x) else None


@torch.no_grad()
def write(x: Tensor, new: Tensor) -> None:
    """x := new, keeping storage, identity and gradient accumulator where they can be kept."""
    if fits(x, new):
        x.copy_(new)
    else:
        torch_parametrize._maybe_set(x, new)
