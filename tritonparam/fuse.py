"""The fused list behind a parametrized tensor, and the calls that fuse a model and undo it.

torch keeps the links of one tensor in a ``ParametrizationList`` and evaluates them when the tensor
is read. A fused list is the same object with another class: keys, links, originals and repr stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from tritonparam import cache, registry
from tritonparam.rules import RULES
from tritonparam.transaction import restored_on_error, stand_in, write


class FusedParametrizationList(ParametrizationList):
    """A ``ParametrizationList`` that evaluates its chain fused where a rule takes it."""

    # The names that stood before this tensor's in the module when it was registered.
    names_before: tuple[str, ...] | None = None

    def forward(self) -> Tensor:
        """Evaluate the chain: the weight."""
        return cache.read(self, self._evaluate)

    def _evaluate(self) -> Tensor:
        return registry.evaluate(RULES, tuple(self._modules.values()), *originals(self))

    def plan(self) -> list[registry.Step]:
        """How the chain is evaluated as it is now: its steps, each a rule, its links, a reason."""
        return registry.plan(RULES, tuple(self._modules.values()), originals(self))

    def right_inverse(self, value: Tensor) -> None:
        """Assign: torch's own method, all or nothing, with the originals written in place.

        torch replaces the storage of the originals, which drops their gradient accumulators, so
        that DDP stops averaging them without a word; and it leaves links half changed on errors.
        """
        with restored_on_error(links=[self]), torch.no_grad():
            real = swap_originals(self, [stand_in(x) for x in originals(self)])
            try:
                super().right_inverse(value)
                written = originals(self)
            finally:
                swap_originals(self, real)
            for x, new in zip(originals(self), written, strict=True):
                write(x, new)

    def _get_name(self) -> str:
        return "ParametrizationList"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A link's state may be newer than the checkpoint: a bare Cayley map has no signature. Only
        # a checkpoint that has the original speaks about this weight at all.
        if any(key.startswith(prefix + "original") for key in state_dict):
            for name, link in self._modules.items():
                for key, value in getattr(link, "default_state", dict)().items():
                    state_dict.setdefault(f"{prefix}{name}.{key}", value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def originals(plist: ParametrizationList) -> tuple[Tensor, ...]:
    """The originals of a list, in the order in which its first link takes them."""
    if plist.is_tensor:
        original = plist._parameters.get("original")  # the module's own lookup is slower
        return (plist.original if original is None else original,)
    return tuple(getattr(plist, f"original{i}") for i in range(plist.ntensors))


def _original_names(plist: ParametrizationList) -> list[str]:
    return ["original"] if plist.is_tensor else [f"original{i}" for i in range(plist.ntensors)]


def swap_originals(plist: ParametrizationList, new: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Put tensors in the place of the originals, whatever torch thinks of it; return the old."""
    old = originals(plist)
    for name, tensor in zip(_original_names(plist), new, strict=True):
        home: dict[str, Any] = plist._parameters if name in plist._parameters else plist._buffers
        home[name] = tensor
    return old


def fuse(model: nn.Module, *, strict: bool = False) -> nn.Module:
    """Evaluate every parametrized tensor of a model fused where a rule takes its chain.

    Nothing else about the model changes: parameters, state_dict keys, assignment, removal, repr.
    Chains that no rule takes stay composed; ``explain(model)`` says which and why.

    Arguments:
        model: any module; it is changed in place.
        strict: raise instead if a chain stays composed.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not an ``nn.Module``.
        ValueError: `strict`, and a chain stays composed; or a chain with an alias does not compute
            what the alias declares. The model is then as it was.

    >>> import torch.nn.utils.parametrize as parametrize, tritonparam as tp
    >>> layer = nn.Linear(3, 3)
    >>> for link in (tp.Skew(), tp.CayleyMap()):
    ...     _ = parametrize.register_parametrization(layer, "weight", link)
    >>> tp.explain(tp.fuse(layer, strict=True))[0].path
    'closed'
    """
    require_module("fuse", model)
    changed: list[ParametrizationList] = []
    modules: dict[nn.Module, None] = {}
    try:
        for module, name, plist in parametrized_tensors(model):
            if type(plist) is ParametrizationList:
                changed.append(plist)
                modules[module] = None
                fuse_list(plist)
            reason = decline_reason(plist)
            if strict and reason:
                raise ValueError(
                    f"fuse: strict=True, but {name} stays composed: {reason}; "
                    "explain(model) shows every weight."
                )
    except BaseException:
        for plist in changed:
            plist.__class__ = ParametrizationList
        raise
    for module in modules:
        own_class(module)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused tensor of a model back to torch's own evaluation, and return the model."""
    require_module("unfuse", model)
    for _, _, plist in parametrized_tensors(model):
        if type(plist) is FusedParametrizationList:
            plist.__class__ = ParametrizationList  # type: ignore[assignment]
    return model


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no other module shares, nor any copy made of it.

    torch makes one class per module and injects the properties there, but deepcopy shares it, so
    that registering or removing on one copy breaks the other.
    """
    cls: Any = type(module)
    theirs = getattr(cls.__deepcopy__, "_theirs", cls.__deepcopy__)

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        replica = theirs(self, memo)
        if is_parametrized(replica):
            own_class(replica)
        return replica

    deepcopy._theirs = theirs  # type: ignore[attr-defined]
    content = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, {**content, "__deepcopy__": deepcopy})


def parametrized_tensors(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, str, ParametrizationList]]:
    """Every parametrized tensor of a model: its module, its full name and its list."""
    for prefix, module in model.named_modules():
        for name, plist in lists(module).items():
            yield module, f"{prefix}.{name}" if prefix else name, plist


def lists(module: nn.Module) -> dict[str, ParametrizationList]:
    """The parametrization lists of a module's own tensors, by the tensor's name."""
    if not is_parametrized(module):
        return {}
    return dict(cast(nn.ModuleDict, module.parametrizations).items())  # type: ignore[arg-type]


def decline_reason(plist: ParametrizationList) -> str:
    """Why a list is evaluated composed, or the empty string."""
    if type(plist) is FusedParametrizationList:
        steps = cast(FusedParametrizationList, plist).plan()
        reasons = [reason for rule, _, reason in steps]
        if any(rule is not None for rule, _, _ in steps):
            return ""
        return next((r for r in reasons if r != registry.NO_RULE), registry.NO_RULE)
    if type(plist) is ParametrizationList:
        return "not fused yet; call tritonparam.fuse(model)"
    return f"it is kept in a {type(plist).__name__}, not in torch's ParametrizationList"


def require_module(who: str, model: Any) -> None:
    """Raise TypeError if `model` is not an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{who}: the model must be an nn.Module, got {type(model).__name__}; "
            "pass the module that holds the weights."
        )


def fuse_list(plist: ParametrizationList) -> FusedParametrizationList:
    """Make a list a fused one; raise ValueError if its chain is not what an alias declares."""
    plist.__class__ = FusedParametrizationList
    links, tensors = tuple(plist._modules.values()), originals(plist)
    if registry.has_alias(links):
        with registry.use_path("closed"):
            if any(rule for rule, _, _ in registry.plan(RULES, links, tensors)):
                _verify_alias(links, tensors)
    return cast(FusedParametrizationList, plist)


def _verify_alias(links: Sequence[nn.Module], tensors: Sequence[Tensor]) -> None:
    """Compare fused with composed, on fp64 values of norm about one and on the originals.

    Near zero all maps agree, hence the former; what users run is the latter. It works on copies of
    the links and puts the random state back.
    """
    names = "→".join(type(link).__name__ for link in links)
    meaning = "→".join(registry.meaning(link).__name__ for link in links)
    generator = torch.Generator().manual_seed(0)
    scale = max(tensors[0].size(-1), 1) ** -0.5
    random = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in tensors]
    inputs = [[r.to(x.device) * scale for r, x in zip(random, tensors, strict=True)]]
    inputs.append([x.detach() for x in tensors])
    devices = sorted({x.device.index or 0 for x in tensors if x.is_cuda})
    for xs in inputs:
        copies = [copy.deepcopy(link).to(xs[0].dtype) for link in links]
        results = []
        with torch.random.fork_rng(devices), torch.enable_grad():
            for evaluate in (partial(registry.evaluate, RULES), _composed):
                generator.manual_seed(1)
                leaves = [x.clone().requires_grad_() for x in xs]
                y = evaluate(copies, *leaves)
                g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
                results.append([y.detach(), *torch.autograd.grad(y, leaves, g)])
        for what, fused, composed in zip(("value", *["gradient"] * len(xs)), *results, strict=True):
            if not _close(fused, composed):
                raise ValueError(
                    f"alias: {names} was declared to mean {meaning}, but its {what} differs: "
                    f"fused {_brief(fused)}, composed {_brief(composed)}; "
                    "correct the class or do not alias it."
                )


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    # Two algorithms for one map differ by rounding times the condition of the map.
    tolerance = 1e3 * torch.finfo(y.dtype).eps
    size = float(y.abs().max()) if y.numel() else 0.0
    return torch.allclose(x, y, rtol=0, atol=tolerance * max(size, 1.0), equal_nan=True)


def _brief(x: Tensor) -> str:
    entries = ", ".join(f"{float(v):.4g}" for v in x.flatten()[:4])
    return f"{list(x.shape)} {entries}, …"


def _composed(links: Sequence[nn.Module], *tensors: Tensor) -> Tensor:
    y = links[0](*tensors)
    for link in links[1:]:
        y = link(y)
    return y
