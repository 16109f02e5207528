"""The norms of ``torch.nn.utils`` that live in a forward hook, turned into parametrizations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

Hook = SpectralNorm | WeightNorm

# What the hooks add to a weight's name in the state_dict, and what its list calls that.
WEIGHT_NORM_KEYS = {"_g": "original0", "_v": "original1"}
SPECTRAL_NORM_KEYS = {"_orig": "original", "_u": "0._u", "_v": "0._v"}


def hooks(model: nn.Module) -> Iterator[tuple[nn.Module, str, Hook]]:
    """Every weight of a model that such a hook computes: its module, its full name, the hook."""
    for prefix, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (SpectralNorm, WeightNorm)):
                yield module, f"{prefix}.{hook.name}" if prefix else hook.name, hook


def original(module: nn.Module, hook: Hook) -> Tensor | None:
    """The tensor that has the weight's shape and dtype, or None where the module lost it."""
    suffix = "_orig" if isinstance(hook, SpectralNorm) else "_v"
    return getattr(module, hook.name + suffix, None)


def parametrize(module: nn.Module, name: str, hook: Hook) -> None:
    """Register the hook's norm as torch's parametrization, with the same parameters and vectors.

    The parameter objects, their storage and the random state stay; checkpoints of the hook load.
    On an error the module may be half changed: the caller restores it.
    """
    if isinstance(hook, SpectralNorm):
        w = _take(module._parameters, name, hook.name + "_orig")
        u, v = (_take(module._buffers, name, hook.name + suffix) for suffix in ("_u", "_v"))
        with torch.device("meta"):  # neither iterations nor random numbers
            stand_in = nn.Parameter(torch.empty(w.shape, dtype=w.dtype))
            link: nn.Module = _SpectralNorm(stand_in, hook.n_power_iterations, hook.dim, hook.eps)
        if w.dim() > 1:
            link._buffers.update(_u=u, _v=v)
        keys, originals = SPECTRAL_NORM_KEYS, {"original": w}
    else:
        keys = WEIGHT_NORM_KEYS
        originals = {key: _take(module._parameters, name, hook.name + s) for s, key in keys.items()}
        stand_in = nn.Parameter(torch.empty_like(originals["original1"], device="meta"))
        link = _WeightNorm(hook.dim)
    _detach(module, hook)
    vars(module).pop(hook.name, None)
    module._parameters[hook.name] = stand_in
    torch_parametrize.register_parametrization(module, hook.name, link, unsafe=True)
    plist: Any = module.get_submodule(f"parametrizations.{hook.name}")
    plist._parameters.update(originals)
    load_legacy(module, hook.name, keys)


def _take(table: dict[str, Any], name: str, key: str) -> Any:
    if table.get(key) is None:
        raise ValueError(
            f"fuse: legacy=True, but {name} cannot be converted: its module has lost {key}, from "
            "which torch's hook computes it; pass a model that can be called, or remove the hook."
        )
    return table.pop(key)


def _detach(module: nn.Module, hook: Hook) -> None:
    """Remove the hook, with those that it has on the state_dict."""
    for table in (
        module._forward_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
    ):
        for key, other in list(table.items()):
            other = getattr(other, "hook", other)  # what torch wraps for loading
            companions = (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)
            if other is hook or (isinstance(other, companions) and other.fn is hook):
                del table[key]


def load_legacy(module: nn.Module, name: str, keys: Mapping[str, str]) -> None:
    """Let checkpoints of the legacy hook load into the parametrized module."""

    def rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for suffix, key in keys.items():
            if f"{prefix}{name}{suffix}" in state_dict:
                new = f"{prefix}parametrizations.{name}.{key}"
                state_dict[new] = state_dict.pop(f"{prefix}{name}{suffix}")

    module.register_load_state_dict_pre_hook(rename)
