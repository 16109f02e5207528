"""The fused list behind a parametrized tensor, and the calls that fuse a model and undo it.

torch keeps the links of one tensor in a ``ParametrizationList`` and evaluates them when the tensor
is read. A fused list is the same object with another class: keys, links, originals and repr stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from tritonparam import cache, declared, interop, once, paths, registry
from tritonparam.injected import share_class
from tritonparam.legacy import hooks as legacy_hooks
from tritonparam.legacy import parametrize as parametrize_legacy
from tritonparam.transaction import restored_on_error, stand_in, write


@once.leaf
class FusedParametrizationList(ParametrizationList):
    """A ``ParametrizationList`` that evaluates its chain fused where a rule takes it."""

    # The names that stood before this tensor's in the module when it was registered.
    names_before: tuple[str, ...] | None = None

    def forward(self) -> Tensor:
        """Evaluate the chain: the weight."""
        return cache.read(self, self._evaluate)

    def _evaluate(self) -> Tensor:
        tensors, links = originals(self), links_of(self)
        if not links:
            return cast(Tensor, super().forward())  # torch's error
        try:
            return registry.evaluate(declared.table(), links, *tensors)
        except RuntimeError as error:
            if not any(map(is_sharded, tensors)):
                raise
            raise RuntimeError(
                "a parametrized weight was read while its original is sharded (a DTensor), which "
                "its chain cannot be evaluated on; read it inside the forward pass of the FSDP "
                "module that holds it, or between the module's unshard() and reshard()."
            ) from error

    def kind(self) -> registry.Kind | None:
        """What this weight has in common with those it can be evaluated with; None: alone."""
        return registry.kind(declared.table(), links_of(self), originals(self))

    @staticmethod
    def together(lists: Sequence[FusedParametrizationList]) -> list[Tensor]:
        """The weights of several lists of one kind."""
        kind = lists[0].kind()
        assert kind is not None
        chains = [(links_of(x), originals(x)) for x in lists]
        try:
            return kind.rule.together(chains)
        except Exception as error:
            xs = chains[0][1]
            paths.fall_back(error, kind.rule.name, xs[-1], kind.rule.size(*xs))
            return [x._evaluate() for x in lists]

    def plan(self) -> list[registry.Step]:
        """How the chain is evaluated as it is now: its steps, each a rule, its links, a reason."""
        return registry.plan(declared.table(), links_of(self), originals(self))

    def right_inverse(self, value: Tensor) -> None:
        """Assign: torch's own method, all or nothing, with the originals written in place.

        torch replaces the storage of the originals, which drops their gradient accumulators, so
        that DDP stops averaging them without a word; and it leaves links half changed on errors.
        """
        require_whole("assignment", originals(self))
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


def links_of(plist: ParametrizationList) -> tuple[nn.Module, ...]:
    """The links that torch evaluates: those at "0", "1", ... up to the first that is missing.

    Modules with other names may stand among them, and libraries delete links by hand.
    """
    known: dict[str, Any] = plist._modules
    if list(known) == _INDICES.get(len(known)):
        return tuple(known.values())
    links: list[nn.Module] = []
    while str(len(links)) in known:
        links.append(known[str(len(links))])
    return tuple(links)


_INDICES = {n: [*map(str, range(n))] for n in range(8)}  # so that most reads look once


def originals(plist: ParametrizationList) -> tuple[Tensor, ...]:
    """The originals of a list, in the order in which its first link takes them."""
    known: dict[str, Any] = plist._parameters
    try:  # the module's own lookup is slower
        if plist.is_tensor:
            return (known["original"],)
        if plist.ntensors == 2:
            return known["original0"], known["original1"]
    except KeyError:
        pass
    return tuple([getattr(plist, name) for name in _original_names(plist)])


def _original_names(plist: ParametrizationList) -> Sequence[str]:
    return ("original",) if plist.is_tensor else [f"original{i}" for i in range(plist.ntensors)]


def swap_originals(plist: ParametrizationList, new: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Put tensors in the place of the originals, whatever torch thinks of it; return the old."""
    old = originals(plist)
    for name, tensor in zip(_original_names(plist), new, strict=True):
        home: dict[str, Any] = plist._parameters if name in plist._parameters else plist._buffers
        home[name] = tensor
    return old


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor, of which this process has a part only."""
    return hasattr(x, "full_tensor")


def require_whole(who: str, tensors: Iterable[Tensor]) -> None:
    """Raise ValueError if FSDP has sharded a tensor."""
    if any(map(is_sharded, tensors)):
        raise ValueError(
            f"{who}: the tensor must be whole, but it is sharded (a DTensor), and FSDP keeps "
            "account of its place; do this before fully_shard(), or load a state_dict."
        )


def fuse(model: nn.Module, *, strict: bool = False, legacy: bool = False) -> nn.Module:
    """Evaluate every parametrized tensor of a model fused where a rule takes its chain.

    Nothing else about the model changes: parameters, state_dict keys, assignment, removal, repr.
    Chains that no rule takes stay composed; ``explain(model)`` says which and why. They too are
    evaluated once per forward where torch reads a weight several times: RNNs and attention.

    Arguments:
        model: any module; it is changed in place.
        strict: raise instead if a chain stays composed.
        legacy: convert the weights of the legacy ``torch.nn.utils.spectral_norm`` and
            ``weight_norm``, which a hook computes, to parametrizations, keys of the state_dict
            included. The parameter objects stay, and checkpoints of the legacy model load;
            ``remove_parametrizations`` then does what ``torch.nn.utils.remove_weight_norm`` did.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not an ``nn.Module``.
        ValueError: `strict`, and a chain stays composed; or a chain does not compute what an alias
            or an added rule declares; or `legacy`, and a module lost a tensor of its hook. The
            model is then as it was.

    >>> import torch.nn.utils.parametrize as parametrize, tritonparam as tp
    >>> layer = nn.Linear(3, 3)
    >>> for link in (tp.Skew(), tp.CayleyMap()):
    ...     _ = parametrize.register_parametrization(layer, "weight", link)
    >>> tp.explain(tp.fuse(layer, strict=True))[0].path
    'closed'
    """
    require_module("fuse", model)
    hooks = list(legacy_hooks(model)) if legacy else []
    holders = [m for module, *_ in hooks for m in (module, *_tables(module))]
    holders += [plist for *_, plist in parametrized_tensors(model)]
    modules: dict[nn.Module, None] = {}
    with restored_on_error(*holders):
        for module, name, hook in hooks:
            if is_parametrized(module):
                inject(module, name.rpartition(".")[2])
            parametrize_legacy(module, name, hook)
        for module, name, plist in parametrized_tensors(model):
            if type(plist) is ParametrizationList:
                modules[module] = None
                fuse_list(plist)
            reason = decline_reason(plist)
            if strict and reason:
                raise ValueError(
                    f"fuse: strict=True, but {name} stays composed: {reason}; "
                    "explain(model) shows every weight."
                )
    for module in modules:
        inject(module)
    for module in model.modules():
        if type(module) in once.READERS and any(map(_is_fused, module.modules())):
            module.__class__ = once.READERS[type(module)]
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused tensor of a model back to torch's own evaluation.

    Arguments:
        model: any module; it is changed in place.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not an ``nn.Module``.

    >>> import tritonparam as tp
    >>> layer = tp.register_parametrization(nn.Linear(3, 3), "weight", tp.Skew(), tp.CayleyMap())
    >>> tp.explain(tp.unfuse(layer))[0].path
    'composed'
    """
    require_module("unfuse", model)
    for module in model.modules():
        plists = list(lists(module).values())
        for plist in plists:
            unfuse_list(plist)
        if plists:
            inject(module)
        if type(module) in once.READERS.values():
            module.__class__ = type(module).__bases__[0]
    return model


def inject(module: nn.Module, *more: str) -> None:
    """Give a parametrized module the class of its kind, with the properties of `more` as well.

    While a list of the module is fused, the class has the forward that reads every weight once.
    """
    share_class(module, *more, content=once.methods if _is_fused(module) else None)
    once.forget(module)


def _is_fused(module: nn.Module) -> bool:
    return any(type(plist) is FusedParametrizationList for plist in lists(module).values())


def parametrized_tensors(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, str, ParametrizationList]]:
    """Every parametrized tensor of a model: its module, its full name and its list."""
    for prefix, module in model.named_modules():
        for name, plist in lists(module).items():
            yield module, f"{prefix}.{name}" if prefix else name, plist


def _tables(module: nn.Module) -> list[nn.Module]:
    """The modules that torch keeps the parametrizations of a module's own tensors in."""
    return [module.parametrizations] if is_parametrized(module) else []  # type: ignore[list-item]


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
    """Make a list a fused one; raise ValueError if its chain is not what was declared."""
    plist.__class__ = FusedParametrizationList
    interop.discover()
    declared.check(links_of(plist), originals(plist))
    return cast(FusedParametrizationList, plist)


def unfuse_list(plist: nn.Module) -> None:
    """Make a fused list torch's own again; leave any other module as it is."""
    if type(plist) is FusedParametrizationList:
        plist.__class__ = ParametrizationList  # type: ignore[assignment]
