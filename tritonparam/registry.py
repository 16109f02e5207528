"""Which path a chain takes, and why: rules, the guard, the path override, aliases, statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PATHS = ("kernel", "closed", "composed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_HAS_TRITON = find_spec("triton") is not None
_aliases: dict[type[nn.Module], type[nn.Module]] = {}
_counts = dict.fromkeys(PATHS, 0)


def _check_path(who: str, path: str | None) -> str | None:
    if path is not None and path not in PATHS:
        raise ValueError(f"{who}: the path must be one of {', '.join(PATHS)}, got {path!r}.")
    return path


# A plain global: a ContextVar does not trace under torch.compile(fullgraph=True).
_override = _check_path("TRITONPARAM_PATH", os.environ.get("TRITONPARAM_PATH") or None)


@dataclass(frozen=True)
class Rule:
    """One line of the table in ``rules.py``: a chain, and what computes it fused.

    Attributes:
        name: the chain's name, the same in ``kernels/``, ``ops/``, the tests and the benchmarks.
        chain: the exact types of the links, in order.
        op: called as ``op(links, *originals)``; returns the weight, in fresh storage.
        declines: called as ``declines(links, *originals)``; returns the sentence why this chain
            is left composed, or the empty string.
        kernel_declines: called as ``kernel_declines(*originals)``; returns the sentence why the
            op takes its closed form, or the empty string where its Triton kernel runs.
    """

    name: str
    chain: tuple[type[nn.Module], ...]
    op: Callable[..., Tensor]
    declines: Callable[..., str]
    kernel_declines: Callable[..., str]


def lookup(
    rules: Sequence[Rule], links: Sequence[nn.Module], originals: Sequence[Tensor]
) -> tuple[Rule | None, str]:
    """The first rule that takes this chain of links on these originals, or None and the reason.

    It looks at the tensors and links in hand and remembers nothing, so that a model may be moved,
    hooked or extended after it was fused.
    """
    if _override == "composed":
        return None, "the path is set to composed"
    kinds = tuple([_aliases.get(type(link), type(link)) for link in links])
    for rule in rules:
        if rule.chain == kinds:
            reason = _links_decline(links) or _originals_decline(originals)
            reason = reason or rule.declines(links, *originals)
            return (None, reason) if reason else (rule, "")
    return None, "no rule for this chain"


def _links_decline(links: Sequence[nn.Module]) -> str:
    for link in links:
        if (
            link._forward_hooks
            or link._forward_pre_hooks
            or link._backward_hooks
            or link._backward_pre_hooks
        ):
            return "a link has hooks, which a fused chain would skip"
        if "forward" in link.__dict__:
            return "a link's forward is patched on the instance"
    return ""


def _originals_decline(originals: Sequence[Tensor]) -> str:
    for x in originals:
        if type(x) is not nn.Parameter and type(x) is not Tensor:
            return f"the original is a {type(x).__name__}, a tensor subclass"
        if x.dtype not in DTYPES:
            return f"{str(x.dtype).removeprefix('torch.')} is not a dtype that is fused"
        if x.layout != torch.strided or x.is_meta:
            return "the original has no strided storage"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return ""


def device_declines(x: Tensor) -> str:
    """Why no Triton kernel can run on x's device, or the empty string."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if not x.is_cuda and not (_override == "kernel" and _interpreted()):
        return f"the original is on the {x.device.type}"
    return ""


def _interpreted() -> bool:
    from tritonparam import kernels

    return kernels.INTERPRETED


def path(declined: str) -> str:
    """``"kernel"`` or ``"closed"``, given why the kernel declines; the override has the last word.

    Raises RuntimeError under ``use_path("kernel")`` where the kernel cannot run.
    """
    if _override == "kernel" and declined:
        raise RuntimeError(
            f'use_path("kernel"): the kernel cannot run because {declined}; '
            'use_path("closed") is the fused path there.'
        )
    return "closed" if declined or _override == "closed" else "kernel"


def alias(link: type[nn.Module], meaning: type[nn.Module]) -> None:
    """Declare that a link class of yours computes the same as one of ours.

    Chains of it are fused like chains of ours. When such a chain is fused, the fused and the
    composed value and vector-Jacobian product are compared, and a difference is an error.

    Arguments:
        link: your ``nn.Module`` subclass.
        meaning: the class it equals, for example ``tritonparam.Skew``.

    Raises:
        TypeError: one of them is not a subclass of ``nn.Module``.

    >>> class MySkew(nn.Module):
    ...     def forward(self, x):
    ...         return x.triu(1) - x.triu(1).mT
    >>> from tritonparam import Skew
    >>> alias(MySkew, Skew)
    """
    for name, cls in (("link", link), ("meaning", meaning)):
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(
                f"alias: {name} must be a subclass of nn.Module, got {cls!r}; "
                "pass the class, not an instance of it."
            )
    _aliases[link] = meaning


def has_alias(links: Sequence[nn.Module]) -> bool:
    """Whether a link of the chain is fused by somebody's declaration only."""
    return any(type(link) in _aliases for link in links)


@contextmanager
def use_path(path: str) -> Iterator[None]:
    """Evaluate every fused weight that is read inside the block on one path.

    For debugging and benchmarks; the override is global to the process.

    Arguments:
        path: ``"kernel"`` (an error where the kernel cannot run), ``"closed"`` or ``"composed"``.

    Raises:
        ValueError: there is no such path.

    >>> from tritonparam import Skew
    >>> with use_path("composed"):
    ...     pass
    """
    global _override
    before, _override = _override, _check_path("use_path", path)
    try:
        yield
    finally:
        _override = before


def override() -> str | None:
    """The path that every fused chain is set to, or None."""
    return _override


def count(path: str) -> None:
    """Count one evaluation on a path."""
    _counts[path] += 1


def stats(*, reset: bool = False) -> dict[str, int]:
    """How often a fused parametrization list was evaluated on each path, so far in this process.

    Arguments:
        reset: set the counts to zero after reading them.

    Returns:
        ``{"kernel": int, "closed": int, "composed": int}``. Composed evaluations inside a
        compiled graph, and replays of a CUDA graph, are not seen.

    >>> sorted(stats())
    ['closed', 'composed', 'kernel']
    """
    counts = dict(_counts)
    if reset:
        _counts.update(dict.fromkeys(PATHS, 0))
    return counts
