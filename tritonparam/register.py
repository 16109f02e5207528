"""Registering links on a tensor and removing them: torch's functions, made all or nothing.

torch's own replace the tensor's storage, which drops its gradient accumulator, so that DDP stops
averaging the gradient without a word, and leave the weight overwritten where a check fails.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize
from torch.nn.utils.parametrize import is_parametrized

from tritonparam import once
from tritonparam.fuse import (
    FusedParametrizationList,
    fuse_list,
    inject,
    links_of,
    lists,
    originals,
    require_module,
    require_whole,
    swap_originals,
)
from tritonparam.transaction import fits, restored_on_error, stand_in, write


def register_parametrization(
    module: nn.Module,
    tensor_name: str,
    parametrization: nn.Module,
    *more: nn.Module,
    unsafe: bool = False,
) -> nn.Module:
    """Register one or several links on a tensor of a module, and fuse the chain.

    ``register_parametrization(m, "weight", A, B)`` means the same as registering A, then B: the
    weight becomes B(A(weight)). It is torch's function of the same name, except that it is all or
    nothing and keeps the parameter's storage and gradient accumulator.

    Arguments:
        module: the module that has the tensor.
        tensor_name: the name of a parameter, a buffer or an already parametrized tensor.
        parametrization, *more: the links, applied in this order.
        unsafe: allow links that change shape or dtype, as in torch; nothing is checked then.

    Returns:
        The module.

    Raises:
        ValueError: the module has no such tensor, or a link changes its shape or dtype.
        TypeError: a link is not an ``nn.Module``.

    >>> import tritonparam as tp
    >>> layer = tp.register_parametrization(nn.Linear(3, 3), "weight", tp.Skew(), tp.CayleyMap())
    >>> torch.allclose(layer.weight.T @ layer.weight, torch.eye(3), atol=1e-5)
    True
    """
    who, links = "register_parametrization", (parametrization, *more)
    require_module(who, module)
    for link in links:
        if not isinstance(link, nn.Module):
            raise TypeError(
                f"{who}: a parametrization must be an nn.Module, got {link!r}; "
                "pass an instance, for example Skew()."
            )
    home: dict[str, Any] = _home(module, tensor_name)
    real = home.get(tensor_name)
    if real is None and not is_parametrized(module, tensor_name):
        raise ValueError(
            f"{who}: tensor_name must name a parameter, a buffer or a parametrized tensor of "
            f"{type(module).__name__}, got {tensor_name!r}, which is "
            f"{'None' if hasattr(module, tensor_name) else 'not there'}; "
            f"it has {', '.join(_tensor_names(module)) or 'none'}."
        )
    if real is not None:
        require_whole(who, [real])
    names = list(home)
    with restored_on_error(*_holders(module), links=links):
        if is_parametrized(module):
            inject(module, tensor_name)
        if real is not None:
            home[tensor_name] = stand_in(real)
        for link in links:
            _register_one(module, tensor_name, link, unsafe)
        plist = fuse_list(lists(module)[tensor_name])
        inject(module)
    if real is not None:
        plist.names_before = tuple(names[: names.index(tensor_name)])
        if plist.is_tensor:
            (written,) = swap_originals(plist, (real,))
            write(real, written)
    return module


def _holders(module: nn.Module) -> list[nn.Module]:
    """What a registration on a tensor of the module changes, beside the links."""
    tables = [cast(nn.ModuleDict, module.parametrizations)] if is_parametrized(module) else []
    return [module, *lists(module).values(), *tables]


def _home(module: nn.Module, tensor_name: str) -> dict[str, Any]:
    """The table of the module in which a tensor is, or would be."""
    return module._parameters if tensor_name in module._parameters else module._buffers


def _tensor_names(module: nn.Module) -> list[str]:
    named = [k for k, v in (module._parameters | module._buffers).items() if v is not None]
    return named + list(lists(module))


def _register_one(module: nn.Module, tensor_name: str, link: nn.Module, unsafe: bool) -> None:
    """torch's registration; where it calls right_inverse as a check only, that leaves no trace."""
    keeps_state = is_parametrized(module, tensor_name) and hasattr(link, "default_state")
    before = {k: v.clone() for k, v in link._buffers.items() if v is not None}
    torch_parametrize.register_parametrization(module, tensor_name, link, unsafe=unsafe)
    if keeps_state:
        for key, default in cast(Any, link).default_state().items():
            getattr(link, key).copy_(before.get(key, default))


def remove_parametrizations(
    module: nn.Module, tensor_name: str, leave_parametrized: bool = True
) -> nn.Module:
    """Remove all links of a tensor: torch's function, all or nothing and keeping the parameter.

    Arguments:
        module: the module that has the tensor.
        tensor_name: the name of the parametrized tensor.
        leave_parametrized: keep the parametrized value; otherwise the original's.

    Returns:
        The module. The parameter object, its gradient accumulator and its place among the
        module's parameters are what they were before the registration.

    Raises:
        ValueError: the tensor is not parametrized, or has several originals and
            `leave_parametrized` is False.

    >>> import tritonparam as tp
    >>> layer = tp.register_parametrization(nn.Linear(3, 3), "weight", tp.Skew(), tp.CayleyMap())
    >>> sorted(tp.remove_parametrizations(layer, "weight").state_dict())
    ['bias', 'weight']
    """
    require_module("remove_parametrizations", module)
    if not is_parametrized(module, tensor_name):
        raise ValueError(
            f"remove_parametrizations: tensor_name must name a parametrized tensor of "
            f"{type(module).__name__}, got {tensor_name!r}; it has "
            f"{', '.join(lists(module)) or 'none'}."
        )
    plist = lists(module)[tensor_name]
    require_whole("remove_parametrizations", originals(plist))
    names_before = getattr(plist, "names_before", None)
    value = None
    if plist.is_tensor and leave_parametrized:
        with torch.no_grad():
            value = getattr(module, tensor_name)
        if fits(plist.original, value):
            leave_parametrized = False
        else:
            value = None  # torch knows what can be done about it
    inject(module)
    torch_parametrize.remove_parametrizations(module, tensor_name, leave_parametrized)
    if is_parametrized(module):
        inject(module)
    if value is not None:
        write(getattr(module, tensor_name), value)
    home = _home(module, tensor_name)
    if names_before is not None:
        for name in [n for n in home if n != tensor_name and n not in names_before]:
            home[name] = home.pop(name)
    once.forget(module)
    return module


def transfer_parametrizations_and_params(
    from_module: nn.Module, to_module: nn.Module, tensor_name: str | None = None
) -> nn.Module:
    """Parametrize a module as another is, with its values: torch's function.

    What is fused there is fused here, and it is all or nothing.

    Arguments:
        from_module: the module to take links and originals from; nothing happens if it has none.
        to_module: the module that shares them afterwards.
        tensor_name: the name of one parametrized tensor; None is all.

    Returns:
        `to_module`.

    >>> import tritonparam as tp
    >>> layer = transfer_parametrizations_and_params(tp.skew(nn.Linear(3, 3)), nn.Linear(3, 3))
    >>> torch.equal(layer.weight, -layer.weight.T)
    True
    """
    theirs, ours = lists(from_module), lists(to_module)
    if not theirs:
        return to_module
    names = list(theirs) if tensor_name is None else [tensor_name]
    links = [link for plist in (*theirs.values(), *ours.values()) for link in links_of(plist)]
    states = [b for link in links for b in link.buffers()]
    with restored_on_error(*_holders(to_module), links=links):
        if ours:
            inject(to_module, *names)
        for name in names:
            home = _home(to_module, name)
            if home.get(name) is not None:
                home[name] = stand_in(home[name])
        before = [b.clone() for b in states]
        torch_parametrize.transfer_parametrizations_and_params(from_module, to_module, tensor_name)
        for state, value in zip(states, before, strict=True):
            write(state, value)  # torch tries right inverses, and the links are from_module's too
        for name in names:
            if type(theirs[name]) is FusedParametrizationList:
                fuse_list(lists(to_module)[name])
                inject(to_module)
    return to_module
