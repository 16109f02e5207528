"""One fused map, two doors: an autograd function in eager mode, an operator for a compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from tritonparam.numerics import cast, compute_dtype, dense, without_autocast

Saved = tuple[Tensor, ...]
Gradients = tuple[Tensor, ...]

_REQUIRES_GRAD, _DTYPE = attrgetter("requires_grad"), attrgetter("dtype")


def one_by_one(gradients: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """The same gradients, for a batch of upstream gradients one after another.

    ``torch.autograd.grad(..., is_grads_batched=True)``, and so a vectorized jacobian, hands over
    all of a batch as one tensor of the shape of each, which neither a kernel nor ``out=`` takes.
    """

    @wraps(gradients)
    def each(*args: Any) -> Gradients:
        batched = [isinstance(x, Tensor) and is_legacy_batchedtensor(x) for x in args]
        if not any(batched):
            return gradients(*args)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        pairs = zip(args, batched, strict=True)
        args = tuple(torch._remove_batch_dim(x, level, 0, 0) if b else x for x, b in pairs)
        n = len(args[batched.index(True)])
        calls = ([x[i] if b else x for x, b in zip(args, batched, strict=True)] for i in range(n))
        stacked = map(torch.stack, zip(*[gradients(*call) for call in calls], strict=True))
        return tuple(torch._add_batch_dim(x, 0, level) for x in stacked)

    return each


def own_value(y: Tensor, saved: Saved) -> Tensor:
    """The value y as no view, which autograd would not let a caller write to: ``weight.mul_(2)``.

    A view of what is saved stays one: its version tells the backward pass of such a write.
    """
    base = y._base
    if base is None or any(x is not None and (x is base or x._base is base) for x in saved):
        return y
    return y.data


def differentiated_by(y: Tensor, gradients: Callable[..., Sequence[Tensor]], *args: Any) -> None:
    """Give a pass that is itself differentiated other gradients of y's node than torch's own.

    Arguments:
        y: what one of torch's operators has just made; it requires a gradient.
        gradients: called with the gradient of y, and with `args`; returns those of the node's
            inputs, in its order.
    """

    def replaced(found: Sequence[Tensor | None], given: Sequence[Tensor]) -> Any:
        if torch.is_grad_enabled():
            pairs = zip(found, gradients(given[0], *args), strict=True)
            return tuple(dx if x is not None else None for x, dx in pairs)

    node: Any = y.grad_fn
    node.register_hook(replaced)


class EagerMap:
    """A map of tensors to one tensor, with its own derivative; called like a function.

    The result is a fresh tensor of the shape and dtype of the argument `like`. The
    functions it is made of compute in the compute dtype of that argument (fp32 for fp16 and bf16)
    and are called with autocast off.

    Arguments:
        forward: called with the arguments; returns the value, dense in the compute dtype, and what
            to save for the backward pass, inputs and the value among it or not.
        backward: called as ``backward(g, saved, dtype, *numbers)`` with the dtype of the first
            argument; returns the gradients of the leading arguments.
        graph: the same gradients, computed by differentiable operators on `saved`, for
            ``create_graph=True``.
        n_tensors: how many of the arguments are tensors, those with gradients first; numbers
            follow.
        n_gradients: how many leading arguments have gradients.
        like: the position of the argument that has the result's shape and dtype.
        keeps: the first argument is among what `forward` saves. A leaf, or a view, is copied then:
            an optimizer may step before the backward pass, which composed chains allow.
    """

    _operator: Callable[..., Tensor] | None = None  # what a compiler is given instead

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor, Any]],
        backward: Callable[..., Gradients],
        graph: Callable[..., Gradients],
        *,
        n_tensors: int,
        n_gradients: int = 1,
        like: int = 0,
        keeps: bool = False,
    ) -> None:
        self.forward, self.backward, self.graph = forward, one_by_one(backward), graph
        self.n_tensors, self.n_gradients, self.like = n_tensors, n_gradients, like
        self.keeps = keeps

    def __call__(self, *args: Any) -> Tensor:
        """The map's value, differentiable in the leading arguments."""
        if self._operator is not None and torch.compiler.is_compiling():
            return self._operator(*args).to(args[self.like].dtype)
        return self._eager(None, args)

    def _eager(self, base: Tensor | None, args: tuple[Any, ...]) -> Tensor:
        return cast(self._computed(base, args), args[self.like].dtype)

    def _computed(self, base: Tensor | None, args: tuple[Any, ...]) -> Tensor:
        """The value before it is rounded to the dtype of the result."""
        if torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, args[: self.n_gradients])):
            return _Function.apply(self, base, _by_columns(args[0]), *self.own(args))
        return without_autocast(args[0], self.from_left, base, *args)[0]

    def from_left(self, base: Tensor | None, *args: Any) -> tuple[Tensor, Any]:
        """``forward``, multiplied from the left by a base that is not None."""
        y, saved = self.forward(*args)
        return (y if base is None else base @ y), saved

    def own(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, of which nobody can change what is saved."""
        x = args[0]
        return (x.clone(), *args[1:]) if self.keeps and (x.is_leaf or x._is_view()) else args

    def left(self, base: Tensor | None, *args: Any) -> Tensor:
        """``base @ value`` for a base [..., m, n] without gradient; None: the value.

        A product of torch's own would be differentiated under the autocast of the backward pass.
        It is a part of the map, unless its graph is made of the value, which is then no output.
        An argument of 16 bits is one of the compute dtype for a compiler.
        """
        if base is None:
            return self(*args)
        if torch.compiler.is_compiling():
            return base @ self(*args)
        return self._eager(base, args) if self.keeps else _product(self._computed(None, args), base)


def _from_base(g: Tensor, saved: Saved, dtype: torch.dtype) -> Gradients:
    return (saved[0].mT @ g,)


_product = EagerMap(
    lambda y, base: (base @ y, (base,)), backward=_from_base, graph=_from_base, n_tensors=2
)


class FusedMap(EagerMap):
    """An eager map that is an operator too, for a compiler.

    Arguments, beyond those of an eager map:
        name: of the custom operators ``tritonparam::name`` and ``tritonparam::name_backward``.
        schema: the arguments in the operator's schema, those with gradients first, then other
            tensors, then numbers: ``"Tensor w, Tensor d, float scale"``.
        resume: ``resume(value, *arguments)`` returns what `forward` saves; a compiled graph keeps
            arguments and value only. None computes `forward` again.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        forward: Callable[..., tuple[Tensor, Any]],
        backward: Callable[..., Gradients],
        graph: Callable[..., Gradients],
        *,
        n_gradients: int = 1,
        like: int = 0,
        keeps: bool = False,
        resume: Callable[..., Any] | None = None,
    ) -> None:
        sizes: dict[str, Any] = {"n_tensors": schema.count("Tensor"), "n_gradients": n_gradients}
        super().__init__(forward, backward, graph, like=like, keeps=keeps, **sizes)
        self.name, self.resume = name, resume
        self._operator = self._define(schema)

    def _define(self, schema: str) -> Callable[..., Tensor]:
        def forward(*args: Any) -> Tensor:
            return without_autocast(args[0], self.forward, *args)[0].contiguous()

        def gradients(g: Tensor, y: Tensor, *args: Any) -> Gradients:
            saved = self.resume(y, *args) if self.resume else self.forward(*args)[1]
            return self.backward(g, saved, args[0].dtype, *args[self.n_tensors :])

        def backward(g: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
            grads = without_autocast(g, gradients, g, y, *args)
            return tuple(dx.contiguous() for dx in self._as(grads, args))

        def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(output, *inputs[: self.n_tensors])
            ctx.numbers = inputs[self.n_tensors :]

        def differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            y, *tensors = ctx.saved_tensors
            grads = backward_op(g, y, *tensors, *ctx.numbers)
            rest = len(tensors) + len(ctx.numbers) - self.n_gradients
            return (*grads, *[None] * rest)

        def define(name: str, schema: str, function: Callable, fake: Callable) -> Any:
            op = torch.library.custom_op(f"tritonparam::{name}", mutates_args=(), schema=schema)
            made = op(function)
            made.register_fake(fake)
            return made

        operator = define(
            self.name,
            f"({schema}) -> Tensor",
            forward,
            lambda *args: args[self.like].new_empty(
                args[self.like].shape, dtype=compute_dtype(args[self.like].dtype)
            ),
        )
        several = ", ".join(["Tensor"] * self.n_gradients)
        single = self.n_gradients == 1
        backward_of_op = define(
            f"{self.name}_backward",
            f"(Tensor g, Tensor y, {schema}) -> " + (several if single else f"({several})"),
            (lambda *args: backward(*args)[0]) if single else backward,
            (lambda g, y, *args: args[0].new_empty(args[0].shape))
            if single
            else lambda g, y, *args: tuple(x.new_empty(x.shape) for x in args[: self.n_gradients]),
        )

        def backward_op(*args: Any) -> tuple[Tensor, ...]:
            grads = backward_of_op(*args)
            return (grads,) if single else grads

        operator.register_autograd(differentiate, setup_context=save)
        return operator

    def _as(self, grads: Gradients, args: tuple[Any, ...]) -> Gradients:
        return tuple(dx.to(x.dtype) for dx, x in zip(grads, args, strict=False))


def _by_columns(x: Tensor) -> bool:
    """Whether x is an original transposed, whose gradient is contiguous if that of x is not."""
    return not x.is_contiguous() and not x.is_leaf and x.dim() > 1 and x.mT.is_contiguous()


def laid_out(saved: Saved, by_columns: bool = False) -> Saved:
    """What is saved, such that second derivatives have the layout of first ones: rows, or columns.

    Only where they are recorded.
    """
    if not torch.is_grad_enabled():
        return saved

    def layout(g: Tensor | None) -> Tensor | None:
        if g is None:  # undefined: zero
            return None
        return g.mT.contiguous().mT if by_columns else g.contiguous()

    def with_layout(x: Tensor) -> Tensor:
        y = x.view_as(x)
        y.register_hook(layout)
        return y

    return tuple(
        with_layout(x) if x is not None and x.requires_grad and x.dim() > 1 else x for x in saved
    )


class _Function(torch.autograd.Function):
    """The eager door: EagerMap, base or None, arguments -> the value in the compute dtype."""

    @staticmethod
    def forward(
        ctx: Any, fused: EagerMap, base: Tensor | None, by_columns: bool, *args: Any
    ) -> Tensor:
        y, saved = without_autocast(args[0], fused.from_left, base, *args)
        y = own_value(y, saved)
        ctx.save_for_backward(base, *saved)
        dtypes = tuple(map(_DTYPE, args[: fused.n_gradients]))
        ctx.call = fused, dtypes, args[fused.n_tensors :], len(args) - fused.n_gradients
        ctx.by_columns = by_columns
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        fused, dtypes, numbers, n_rest = ctx.call
        saved = laid_out(ctx.saved_tensors, ctx.by_columns)
        grads = without_autocast(g, _gradients, fused, g, saved, dtypes[0], *numbers)
        if ctx.by_columns:
            grads = (grads[0].mT.contiguous().mT, *grads[1:])
        return (None, None, None, *map(cast, grads, dtypes), *[None] * n_rest)


def _gradients(fused: EagerMap, g: Tensor, saved: Saved, *rest: Any) -> Gradients:
    base, saved = saved[0], saved[1:]
    g = dense(g)
    if base is not None:
        g = base.mT @ g
    # create_graph=True: differentiate the formula itself
    return (fused.graph if torch.is_grad_enabled() else fused.backward)(g, saved, *rest)
