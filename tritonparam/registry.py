"""Which rule takes a chain, and why none does: the guard, and links declared to equal ours."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import checkpoint

from tritonparam import configs, paths

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (nn.Parameter, Tensor)

NO_RULE = "no rule for this chain"

# Found once: they are asked at every read.
transforms_active = torch._C._are_functorch_transforms_active
_mode = torch._C._get_dispatch_mode
_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
_n_modes, _mode_at = torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_stack_at
# Of selective activation checkpoints, as torch names them now; () where it no longer does.
_SELECTIVE = (
    getattr(checkpoint, "_CachingTorchDispatchMode", ()),
    getattr(checkpoint, "_CachedTorchDispatchMode", ()),
)
_tracing = torch._C._get_tracing_state
_aliases: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass(frozen=True)
class Rule:
    """One line of the table in ``rules.py``: a chain, and what computes it fused.

    Attributes:
        name: the chain's name, the same in ``kernels/``, ``ops/``, the tests and the benchmarks.
        chain: the exact types of the links, in order; a part of a longer chain is taken too.
        op: called as ``op(links, *tensors)``; returns the value, in fresh storage.
        declines: called as ``declines(links, *tensors)``; returns the sentence why these links
            are left composed, or the empty string.
        kernel_declines: called as ``kernel_declines(links, *tensors)``; returns the sentence why
            the op takes its closed form, or the empty string where its Triton kernel runs.
        size: called as ``size(*tensors)``; returns what the chain's cost grows with, by which the
            table of measured paths is asked.
        measured_as: called as ``measured_as(links, *tensors)``; returns the name by which it is
            asked, where that is not the rule's.
        kernels: called as ``kernels(n, dtype)``; returns the name of the file of kernels whose
            launch configurations can be tuned, or the empty string.
        differs: called as ``differs(links, *tensors)``; returns the sentence how the value differs
            from the composed one on purpose, or the empty string.
        launches: called as ``launches(links, *tensors)``; returns how many Triton kernels the
            forward and the backward pass launch where `kernel_declines` is empty.
        alike: called as ``alike(links, *tensors)``; returns what chains must have in common, beside
            device and dtype, for ``together`` to take them. None evaluates the chain by itself.
        together: called as ``together(chains)`` with ``(links, tensors)`` of each, for which the
            kernel runs; returns their values, in fresh storage, each with a graph of its own.
    """

    name: str
    chain: tuple[type[nn.Module], ...]
    op: Callable[..., Tensor]
    declines: Callable[..., str]
    kernel_declines: Callable[..., str]
    size: Callable[..., int] = lambda *xs: xs[0].size(-1)
    measured_as: Callable[..., str] | None = None
    kernels: Callable[[int, torch.dtype], str] = lambda n, dtype: ""
    differs: Callable[..., str] = lambda links, *xs: ""
    launches: Callable[..., tuple[int, int] | None] | None = None
    alike: Callable[..., Hashable] = lambda *chain: None
    together: Callable[..., list[Tensor]] = lambda chains: []

    def question(self, links: Sequence[nn.Module], *xs: Tensor) -> tuple[str, Tensor, int]:
        """What the table of measured paths is asked: the chain's name in it, a tensor, the size."""
        name = self.measured_as(links, *xs) if self.measured_as else self.name
        return name, xs[-1], self.size(*xs)


class Kind(NamedTuple):
    """What chains that are evaluated together have in common: the rule, and all it depends on."""

    rule: Rule
    common: Hashable


Step = tuple[Rule | None, tuple[nn.Module, ...], str]


def lookup(
    rules: Sequence[Rule], links: Sequence[nn.Module], xs: Sequence[Tensor]
) -> tuple[Rule | None, int, str]:
    """How many next links of a chain the first rule takes, or composed evaluation and the reason.

    It looks at the tensors and links in hand and remembers nothing, so that a model may be moved,
    hooked or extended after it was fused.
    """
    if paths.override() == "composed":
        return None, len(links), "the path is set to composed"
    kinds: tuple[type, ...] = tuple(map(type, links))
    if _aliases:
        kinds = tuple(map(meaning, kinds))
    first, reason, compiling = kinds[0], "", torch.compiler.is_compiling()
    for rule in rules:
        chain = rule.chain
        if chain[0] is not first or chain != kinds[: len(chain)]:
            continue
        n = len(chain)
        taken = links[:n]
        declined = (
            links_decline(taken) or _tensors_decline(xs, compiling) or rule.declines(taken, *xs)
        )
        if declined:
            reason = reason or declined
        elif paths.asks(compiling) and configs.fastest(*rule.question(taken, *xs)) == "composed":
            return None, n, "torch's own chain was measured faster at this size on this device"
        else:
            return rule, n, ""
    return None, 1, reason or NO_RULE


def evaluate(rules: Sequence[Rule], links: Sequence[nn.Module], *xs: Tensor) -> Tensor:
    """The value of a chain: what rules take, fused; the links between, one after another."""
    fused = False
    while links:
        rule, n, _ = lookup(rules, links, xs)
        if rule is not None:
            xs, fused = (rule.op(links[:n], *xs),), True
        else:
            for link in links[:n]:
                xs = (link(*xs),)
        links = links[n:]
    if not fused and not torch.compiler.is_compiling():
        paths.count("composed")
    return xs[0]


def kind(rules: Sequence[Rule], links: Sequence[nn.Module], xs: Sequence[Tensor]) -> Kind | None:
    """The kind of a chain of which kernels evaluate several at once, or None."""
    rule, n, _ = lookup(rules, links, xs) if links else (None, 0, "")
    if rule is None or n < len(links) or paths.override() == "closed":
        return None
    alike = rule.alike(links, *xs)
    if alike is None or rule.kernel_declines(links, *xs):
        return None
    return Kind(rule, (alike, *[(x.device, x.dtype, x.requires_grad) for x in xs]))


def plan(
    rules: Sequence[Rule], links: Sequence[nn.Module], originals: Sequence[Tensor]
) -> list[Step]:
    """The steps that ``evaluate`` would take, computing nothing: rule or None, links, reason.

    What a link makes is taken to be like the largest original.
    """
    steps: list[Step] = []
    xs, i = tuple(originals), 0
    while i < len(links):
        rule, n, reason = lookup(rules, links[i:], xs)
        steps.append((rule, tuple(links[i : i + n]), reason))
        xs, i = (max(originals, key=Tensor.numel),), i + n
    return steps


def links_decline(links: Sequence[nn.Module]) -> str:
    """Why a fused chain may not stand for these links, or the empty string."""
    if _has_any_global_hook():
        return "hooks on all modules are registered, which a fused chain would skip"
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


def _tensors_decline(xs: Sequence[Tensor], compiling: bool) -> str:
    for x in xs:
        if type(x) not in _PLAIN:
            return f"the original is a {type(x).__name__}, a tensor subclass"
        if x.dtype not in DTYPES:
            return f"{str(x.dtype).removeprefix('torch.')} is not a dtype that is fused"
        if x.layout != torch.strided or x.is_meta:
            return "the original has no strided storage"
    if transforms_active():
        return "a torch.func transform is active"
    if _tracing() is not None:
        return "torch.jit.trace records the links"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return "" if compiling or not _n_modes() else _modes_decline()


def _modes_decline() -> str:
    if (_mode(_FAKE) or _mode(_PROXY)) is not None:
        return "fake tensors, or make_fx, have no values to look at"
    if any(isinstance(_mode_at(i), _SELECTIVE) for i in range(_n_modes())):
        return "a selective activation checkpoint keeps tensors that a fused chain writes to"
    return ""


def alias(link: type[nn.Module], meaning: type[nn.Module]) -> None:
    """Declare that a link class of yours computes the same as one of ours.

    Chains of it are fused like chains of ours. When such a chain is fused, the fused and the
    composed value, vector-Jacobian product and buffers are compared; a difference is an error.

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


def meaning(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that links of a class count as: itself, or the one it was declared to equal."""
    return _aliases.get(cls, cls)
