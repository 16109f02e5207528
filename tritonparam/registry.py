"""Which path a chain takes, and why: rules, the guard, the path override, aliases, statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from tritonparam import configs, failures
from tritonparam.tables import PATHS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (nn.Parameter, Tensor)

NO_RULE = "no rule for this chain"
_ON_CPU = "the original is on the cpu"  # the device's own string takes longer than the rest

_HAS_TRITON = find_spec("triton") is not None
# Found once: they are asked at every read.
transforms_active = torch._C._are_functorch_transforms_active
_mode = torch._C._get_dispatch_mode
_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
_tracing = torch._C._get_tracing_state
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
    if _override == "composed":
        return None, len(links), "the path is set to composed"
    kinds: tuple[type, ...] = tuple(map(type, links))
    if _aliases:
        kinds = tuple(map(meaning, kinds))
    reason = ""
    for rule in rules:
        n = len(rule.chain)
        if rule.chain[0] is kinds[0] and rule.chain == kinds[:n]:
            taken = links[:n]
            declined = links_decline(taken) or _tensors_decline(xs) or rule.declines(taken, *xs)
            if not declined:
                if _asks() and configs.fastest(*rule.question(taken, *xs)) == "composed":
                    why = "torch's own chain was measured faster at this size on this device"
                    return None, n, why
                return rule, n, ""
            reason = reason or declined
    return None, 1, reason or NO_RULE


def evaluate(rules: Sequence[Rule], links: Sequence[nn.Module], *xs: Tensor) -> Tensor:
    """The value of a chain: what rules take, fused; the links between, one after another."""
    fused, i = False, 0
    while i < len(links):
        rule, n, _ = lookup(rules, links[i:], xs)
        if rule is not None:
            xs, fused = (rule.op(links[i : i + n], *xs),), True
        else:
            for link in links[i : i + n]:
                xs = (link(*xs),)
        i += n
    if not fused and not torch.compiler.is_compiling():
        count("composed")
    return xs[0]


def kind(rules: Sequence[Rule], links: Sequence[nn.Module], xs: Sequence[Tensor]) -> Kind | None:
    """The kind of a chain of which kernels evaluate several at once, or None."""
    rule, n, _ = lookup(rules, links, xs)
    if rule is None or n < len(links) or _override == "closed":
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


def _tensors_decline(xs: Sequence[Tensor]) -> str:
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
    if not torch.compiler.is_compiling() and (_mode(_FAKE) or _mode(_PROXY)) is not None:
        return "fake tensors, or make_fx, have no values to look at"
    return ""


def measured(chain: str, x: Tensor, n: int) -> str:
    """The path that ``tuned_configs.json`` says is fastest, or the empty string.

    It is empty as well where ``use_path`` asks for a path, and in a graph that is being compiled,
    since the table is measured in eager mode.
    """
    return configs.fastest(chain, x, n) if _asks() else ""


def _asks() -> bool:
    """Whether the table of measured paths is asked, and has rows at all."""
    return _override is None and not torch.compiler.is_compiling() and bool(configs.table())


def kernel_declines(chain: str, x: Tensor, n: int) -> str:
    """Why no Triton kernel of a chain runs on x, whatever its shape, or the empty string."""
    if declined := device_declines(x):
        return declined
    if measured(chain, x, n) == "closed":
        return f"the closed form was measured faster at n = {n} on this device"
    if cause := failures.cause(chain, x, n):
        return f"Triton cannot compile its kernel here ({cause})"
    return ""


def fall_back(error: Exception, chain: str, x: Tensor, n: int) -> None:
    """Go on with the closed form after an error of a kernel, with a warning once for the chain.

    Only where Triton's compiler is what failed, and not under ``use_path("kernel")``: else the
    error is raised again. From then on ``kernel_declines`` answers for the same arguments.
    """
    if _override == "kernel" or not kernels().cannot_compile(error):
        raise error
    failures.remember(chain, x, n, error)


def device_declines(x: Tensor) -> str:
    """Why no Triton kernel can run on x's device, or the empty string."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if not x.is_cuda and not (_override == "kernel" and _interpreted()):
        return _ON_CPU if x.is_cpu else f"the original is on the {x.device.type}"
    return ""


def no_kernel(x: Tensor, *more: Tensor) -> str:
    """Why no Triton kernel takes a chain that has none, wherever its tensors are."""
    return device_declines(x) or "this chain has no kernel yet"


@lru_cache
def kernels(name: str = "") -> Any:
    """A file of ``tritonparam.kernels``, or the package, imported when it is first needed."""
    return import_module(f"tritonparam.kernels.{name}".rstrip("."))


def _interpreted() -> bool:
    return kernels().INTERPRETED


@lru_cache
def backend() -> str:
    """What configurations are for: "cuda", "hip", or "interpreter"."""
    return "interpreter" if _interpreted() else "hip" if torch.version.hip else "cuda"


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
