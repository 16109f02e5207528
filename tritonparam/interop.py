"""Rules for the links of geotorch, made when a list is fused and the user has imported geotorch.

Its manifolds of orthogonal matrices are ``base @ map(x)`` with an n×n base, as torch's
``orthogonal``; its other manifolds are products of such factors and a diagonal. Of a factor the k
columns that are used are computed; how an original is cut into the arguments of the factors, and
how these are multiplied, stays geotorch's own code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonparam.links import CayleyMap, MatrixExponential, Skew, Symmetric
from tritonparam.numerics import no_autocast
from tritonparam.orthogonal import tall
from tritonparam.orthogonal_maps import from_left, from_left_declines, from_left_kernel_declines
from tritonparam.registry import Rule, links_decline
from tritonparam.rules import RULES

_OLDEST = (0, 4)

found: tuple[Rule, ...] = ()


class _Form(NamedTuple):
    """How the manifolds of a class are computed; every function takes the manifold first."""

    value: Callable[..., Tensor]
    declines: Callable[..., str]
    kernel_declines: Callable[..., str]


# By what the user's geotorch has: filled when it is found.
_forms: dict[type, _Form] = {}
_maps: dict[Any, str] = {torch.linalg.matrix_exp: "matrix_exp", torch.matrix_exp: "matrix_exp"}


def discover() -> None:
    """Make the rules for geotorch if it has been imported; nothing is imported here."""
    global found
    geotorch = sys.modules.get("geotorch")
    if geotorch is None or found:
        return
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "geotorch"]
    classes = {
        name: cls
        for module in modules
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and _is_theirs(cls)
    }
    version = getattr(geotorch, "__version__", "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    try:
        if numbers is None or tuple(map(int, numbers.groups())) < _OLDEST:
            raise AttributeError("it is older")
        found = tuple(_rules(geotorch, classes))
    except AttributeError as other:
        oldest = ".".join(map(str, _OLDEST))
        why = f"geotorch {version} is not like {oldest}, which is known: {other}"
        found = tuple(_rule(cls, _declined(why)) for cls in classes.values())


def _is_theirs(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "geotorch"


def _rules(geotorch: Any, classes: dict[str, type[nn.Module]]) -> Iterator[Rule]:
    _maps[geotorch.so.cayley_map] = "cayley"
    yield _of_a_triangle(geotorch.Skew, (Skew, CayleyMap), -1)
    yield _of_a_triangle(geotorch.Skew, (Skew, MatrixExponential), -1)
    yield _of_a_triangle(geotorch.Symmetric, (Symmetric, MatrixExponential), 1)
    _forms[geotorch.Rn] = _forms[geotorch.Skew] = _ITSELF
    for name, cls in classes.items():
        if name in _FORMS:
            _forms[cls] = _FORMS[name]
            yield _rule(cls, _FORMS[name])
        else:
            yield _rule(cls, _declined(f"geotorch's {name} has no fused form"))


def _rule(cls: type[nn.Module], form: _Form) -> Rule:
    return Rule(
        name=f"geotorch.{cls.__name__}",
        chain=(cls,),
        op=lambda links, *xs: form.value(links[0], *xs),
        declines=lambda links, *xs: form.declines(links[0], *xs),
        kernel_declines=lambda links, *xs: form.kernel_declines(links[0], *xs),
    )


def _declined(why: str) -> _Form:
    return _ITSELF._replace(declines=lambda m, *xs: why)


def _of_a_triangle(cls: type[nn.Module], chain: tuple[type[nn.Module], ...], sign: int) -> Rule:
    """The rule for a chain of ours that begins with geotorch's link: of either triangle."""
    (rule,) = [rule for rule in RULES if rule.chain == chain]

    def upper(links: Sequence[nn.Module], w: Tensor) -> Tensor:
        link: Any = links[0]
        return sign * w.mT if link.lower else w

    return replace(
        rule,
        chain=(cls, *chain[1:]),
        op=lambda links, w: rule.op(links, upper(links, w)),
        together=lambda chains: rule.together(
            [(links, (upper(links, w),)) for links, (w,) in chains]
        ),
    )


# A factor is base @ map(X): torch's, but that SO may take the upper triangle of X and that
# Grassmannian takes nothing above row k.


def _map(m: Any) -> str:
    return _maps[m.triv]


def _factor(m: Any, x: Tensor) -> Tensor:
    return from_left(m.base, _map(m), x if m.lower else -x.mT)


def _grassmannian(m: Any, x: Tensor) -> Tensor:
    k = min(x.shape[-2:])
    below = nn.functional.pad(tall(x)[..., k:, :], (0, 0, k, 0))
    return _factor(m, below.mT if m.transposed else below)


def _factor_declines(m: Any, x: Tensor) -> str:
    name = type(m).__name__
    try:
        orthogonal_map = _maps[m.triv]
    except (KeyError, TypeError):
        triv = getattr(m.triv, "__name__", type(m.triv).__name__)
        return f"{name} has a trivialization that is not geotorch's, {triv}"
    if declined := from_left_declines(m.base, orthogonal_map, x):
        return declined
    k, transposed = getattr(m, "k", m.n), getattr(m, "transposed", False)
    if k != min(x.shape[-2:]) or transposed != (x.size(-2) < x.size(-1)):
        return f"{name} is of another shape than the original"
    if not m.lower and x.size(-1) != x.size(-2):
        return f"{name} takes the upper triangle"
    return ""


def _factor_kernel_declines(m: Any, x: Tensor) -> str:
    return from_left_kernel_declines(_map(m), x)


def _product(m: Any, x: Tensor) -> Tensor:
    transposed = getattr(m, "transposed", False)
    with no_autocast(x):
        arguments = m.frame(x.mT if transposed else x)
        w = m.submersion(*map(_value, m, arguments))
    return w.mT if transposed else w


def _value(m: Any, x: Tensor) -> Tensor:
    return _forms[type(m)].value(m, x)


def _product_declines(m: Any, x: Tensor) -> str:
    k = getattr(m, "k", m.n)
    shape = (k, m.n) if getattr(m, "transposed", False) else (m.n, k)
    if x.shape != (*m.tensorial_size, *shape):
        return f"{type(m).__name__} is of another shape than the original"
    return _first(_declines, m, [_argument(part, x) for part in m])


def _product_kernel_declines(m: Any, x: Tensor) -> str:
    return _first(_kernel_declines, m, [_argument(part, x) for part in m])


def _argument(m: Any, x: Tensor) -> Tensor:
    """A tensor of the shape that a factor takes, on x's device and of its dtype."""
    shape = (m.n, m.k) if hasattr(m, "k") else (m.n,)
    return x.new_empty(()).expand(*m.tensorial_size, *shape)


def _hurwitz(m: Any, *xs: Tensor) -> Tensor:
    with no_autocast(xs[0]):
        return m.submersion(*map(_value, m, xs))


def _hurwitz_declines(m: Any, *xs: Tensor) -> str:
    return _first(_declines, m, xs)


def _hurwitz_kernel_declines(m: Any, *xs: Tensor) -> str:
    return _first(_kernel_declines, m, xs)


def _declines(m: Any, x: Tensor) -> str:
    if type(m) not in _forms:
        return f"a part of it is a {type(m).__name__}"
    return links_decline((m,)) or _forms[type(m)].declines(m, x)


def _kernel_declines(m: Any, x: Tensor) -> str:
    return _forms[type(m)].kernel_declines(m, x)


def _first(ask: Callable[[Any, Tensor], str], ms: Any, xs: Sequence[Tensor]) -> str:
    return next(filter(None, map(ask, ms, xs)), "")


_ITSELF = _Form(lambda m, *xs: m(*xs), lambda m, *xs: "", lambda m, *xs: "")
_FACTOR = _Form(_factor, _factor_declines, _factor_kernel_declines)
_PRODUCT = _Form(_product, _product_declines, _product_kernel_declines)
_FORMS = {
    "SO": _FACTOR,
    "Stiefel": _FACTOR,
    "Grassmannian": _FACTOR._replace(value=_grassmannian),
    **dict.fromkeys(("LowRank", "FixedRank", "AlmostOrthogonal", "GLp", "SL"), _PRODUCT),
    **dict.fromkeys(("SymF", "PSSDLowRank", "PSSDFixedRank", "PSSD", "PSD"), _PRODUCT),
    "Hurwitz": _Form(_hurwitz, _hurwitz_declines, _hurwitz_kernel_declines),
}
