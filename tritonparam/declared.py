"""What users declare about chains: rules of their own, and the check of these and of aliases."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tritonparam import interop, paths, registry
from tritonparam.registry import Rule
from tritonparam.rules import RULES

_added: tuple[Rule, ...] = ()


def table() -> tuple[Rule, ...]:
    """The rules that chains are looked up in: those that were added, ours, other libraries'."""
    return _added + RULES + interop.found


def add_rule(
    chain: Sequence[type[nn.Module]],
    op: Callable[..., Tensor],
    *,
    declines: Callable[..., str] | None = None,
) -> None:
    """Compute a chain of links, yours or anybody's, by a function of your own where it is fused.

    The rule becomes a line of the table of rules, which is read from top to bottom at every read of
    a weight: rules that were added, in that order, then ours. The first whose classes are exactly
    those of the next links is taken, unless it declines; so add (A, B) before (A,). A chain that
    was added already gets the new rule in the place of the old.

    When a chain is fused in which the rule is taken, the fused and the composed value,
    vector-Jacobian product and buffers are compared, on random fp64 values and on the originals,
    and a difference is an error. Evaluations count as "closed"; ``use_path("kernel")`` is refused.

    Arguments:
        chain: the classes of one or several links, in order; subclasses of them do not match.
        op: called as ``op(links, *originals)``; returns the value, differentiable and in fresh
            storage, and changes buffers of the links as their own forward does. It may be an
            autograd function. For a chain within a longer one, what the links before make stands
            for the originals.
        declines: called like `op` before it; returns the sentence why these links and tensors are
            left composed, which ``explain`` shows, or the empty string. It computes nothing.

    Raises:
        TypeError: the chain is not made of subclasses of ``nn.Module``, or `op` or `declines` is
            not callable.
        ValueError: the chain is empty, or a class in it is an alias.

    >>> import tritonparam as tp
    >>> class Unit(nn.Module):
    ...     def forward(self, x):
    ...         return x / x.square().sum(-1, keepdim=True).sqrt()
    >>> add_rule((Unit,), lambda links, x: nn.functional.normalize(x, dim=-1))
    >>> layer = tp.register_parametrization(nn.Linear(3, 3), "weight", Unit())
    >>> tp.explain(layer)[0].reason
    'an added rule computes it'
    """
    global _added
    rule = Rule(
        name="→".join(f"{c.__module__}.{c.__qualname__}" for c in _require_chain(chain)),
        chain=tuple(chain),
        op=partial(_counted, _require_callable("op", op)),
        declines=_never if declines is None else _require_callable("declines", declines),
        kernel_declines=_no_kernel,
    )
    chains = [other.chain for other in _added]
    if rule.chain in chains:
        i = chains.index(rule.chain)
        _added = (*_added[:i], rule, *_added[i + 1 :])
    else:
        _added = (*_added, rule)


def _require_chain(chain: Sequence[type[nn.Module]]) -> Sequence[type[nn.Module]]:
    if not isinstance(chain, (tuple, list)):
        raise TypeError(
            f"add_rule: chain must be a tuple of classes, got {chain!r}; "
            "write (Link,) for a chain of one link."
        )
    for cls in chain:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(
                f"add_rule: chain must consist of subclasses of nn.Module, got {cls!r}; "
                "pass the class, not an instance of it."
            )
        if registry.meaning(cls) is not cls:
            means = registry.meaning(cls).__name__
            raise ValueError(
                f"add_rule: {cls.__name__} is an alias of {means}, as which it is looked up; "
                f"name {means} in the chain."
            )
    if not chain:
        raise ValueError("add_rule: chain must have at least one class, got none.")
    return chain


def _require_callable(name: str, function: Callable) -> Callable:
    if not callable(function):
        raise TypeError(
            f"add_rule: {name} must be a function of (links, *originals), got {function!r}."
        )
    return function


def _counted(op: Callable[..., Tensor], links: Sequence[nn.Module], *xs: Tensor) -> Tensor:
    path = paths.path(_no_kernel(links, *xs))
    if not torch.compiler.is_compiling():
        paths.count(path)
    return op(links, *xs)


def _never(links: Sequence[nn.Module], *xs: Tensor) -> str:
    return ""


def _no_kernel(links: Sequence[nn.Module], *xs: Tensor) -> str:
    return "an added rule computes it"


def check(links: Sequence[nn.Module], originals: Sequence[Tensor]) -> None:
    """Compare fused with composed, if a chain is fused on somebody's word; nothing is changed.

    Near zero all maps agree, hence random fp64 values of norm about one; what users run are the
    originals, which say nothing where they are not finite. Both evaluations get copies of the links
    and the same random numbers.

    Raises ValueError where they differ.
    """
    with paths.use_path("closed"):
        claims = [
            _claim(rule, taken)
            for rule, taken, _ in registry.plan(table(), links, originals)
            if rule is not None and (rule in _added or registry.has_alias(taken))
        ]
        if not claims:
            return
        own = [x.detach() for x in originals]
        finite = all(bool(x.isfinite().all()) for x in own)
        for xs in (_random(originals), own) if finite else (_random(originals),):
            fused = _results(partial(registry.evaluate, table()), links, xs)
            composed = _results(_composed, links, xs)
            for what, x in fused.items():
                if not _close(x, composed[what]):
                    claim, way_out = claims[0]
                    raise ValueError(
                        f"{claim}, but its {what} differs: {_difference(x, composed[what])}; "
                        f"{way_out}."
                    )


def _claim(rule: Rule, links: Sequence[nn.Module]) -> tuple[str, str]:
    """What somebody said of these links, and what to do where it is not so."""
    names = "→".join(type(link).__name__ for link in links)
    if rule in _added:
        way_out = "correct op, or let declines say where it does not hold"
        return f"add_rule: {names} has a rule of yours", way_out
    meaning = "→".join(registry.meaning(type(link)).__name__ for link in links)
    way_out = "correct the class or do not alias it"
    return f"alias: {names} was declared to mean {meaning}", way_out


def _random(tensors: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    scale = max(tensors[0].size(-1), 1) ** -0.5 if tensors[0].dim() else 1.0
    return [_drawn(generator, x).to(x.device) * scale for x in tensors]


def _drawn(generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")


def _results(
    evaluate: Callable[..., Tensor], links: Sequence[nn.Module], xs: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The value, the gradient in every original, and what becomes of the buffers, by name."""
    copies = nn.ModuleList(copy.deepcopy(link) for link in links).to(xs[0].dtype)
    names = [name for name, _ in copies.named_buffers()]
    devices = sorted({x.device.index or 0 for x in xs if x.is_cuda})
    leaves = [x.clone().requires_grad_() for x in xs]
    # What the block draws is put back, so that the next evaluation draws the same.
    with torch.random.fork_rng(devices), torch.enable_grad():
        y = evaluate(tuple(copies), *leaves)
        g = _drawn(torch.Generator("cpu").manual_seed(1), y)
        grads: Sequence[Tensor | None] = [None] * len(xs)
        if y.requires_grad:
            grads = torch.autograd.grad(y, leaves, g.to(y), allow_unused=True)
    results = {"value": y.detach()}
    for i, (x, dx) in enumerate(zip(xs, grads, strict=True)):
        name = "gradient" if len(xs) == 1 else f"gradient in original{i}"
        results[name] = torch.zeros_like(x) if dx is None else dx
    return results | {f"buffer {name}": copies.get_buffer(name) for name in names}


def _composed(links: Sequence[nn.Module], *tensors: Tensor) -> Tensor:
    y = links[0](*tensors)
    for link in links[1:]:
        y = link(y)
    return y


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    # Two algorithms for one map differ by rounding times the condition of the map.
    tolerance = 1e3 * torch.finfo(y.dtype).eps
    size = float(y.nan_to_num(0.0, 0.0, 0.0).abs().max()) if y.numel() else 0.0
    return torch.allclose(x, y, rtol=0, atol=tolerance * max(size, 1.0), equal_nan=True)


def _difference(x: Tensor, y: Tensor) -> str:
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"fused {list(x.shape)} {x.dtype}, composed {list(y.shape)} {y.dtype}"
    gap = (x.to(torch.cdouble) - y.to(torch.cdouble)).abs().nan_to_num(torch.inf)
    index = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
    a, b = (t[tuple(index)].item() for t in (x, y))
    return f"fused {a:.4g}, composed {b:.4g} at {index}"
