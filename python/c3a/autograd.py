"""Derivatives, in reverse and forward mode.

The forward ``F(x, w)``, its input gradient ``I(g, w)`` and its kernel gradient ``K(g, x)`` are
bilinear, and the derivative of each is made of the other two (DESIGN.md, "Gradients"):

    F: dx = I(g, w)   dw = K(g, x)
    I: dg = F(h, w)   dw = K(g, h)      for h, the gradient that arrives at I's result
    K: dg = F(x, v)   dx = I(g, v)      for v, the gradient that arrives at K's result

With a stack of kernels and an index of rows, a constant, the same holds row by row. A factor,
``scale``, passes through all of them unchanged. With a prepared kernel the product is
linear in ``x``, and its gradient is the product with the prepared kernel of the transposed matrix.

A *product* here is an operator with its derivative: ``save`` names what the derivative needs,
``gradients`` and ``tangents`` are the derivative, one entry for each of the operator's arguments.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _private, shapes
from ._library import OPS as _OPS

_CONVOLVE = _OPS.block_circ_conv.default  # found once: looking one up takes microseconds
_INPUT_GRAD = _OPS.block_circ_conv_input_grad.default
_KERNEL_GRAD = _OPS.block_circ_conv_kernel_grad.default
_BACKWARD = _OPS.block_circ_conv_backward.default
_BACKWARD_ADD_ = _OPS.block_circ_conv_backward_add_.default
_ADD = _OPS.block_circ_conv_add.default
_ADD_ = _OPS.block_circ_conv_add_.default
_PREPARED = _OPS.block_circ_conv_prepared.default
_PREPARED_ADD_ = _OPS.block_circ_conv_prepared_add_.default
_MANY = _OPS.block_circ_conv_many.default
_MANY_INPUT_GRAD = _OPS.block_circ_conv_many_input_grad.default
_MANY_KERNEL_GRAD = _OPS.block_circ_conv_many_kernel_grad.default
_MANY_PREPARED = _OPS.block_circ_conv_many_prepared.default
_MANY_ADD_ = _OPS.block_circ_conv_many_add_.default
_MANY_PREPARED_ADD_ = _OPS.block_circ_conv_many_prepared_add_.default
_P = ParamSpec("_P")
_R = TypeVar("_R")
_Args = tuple[Any, ...]  # of an operator: tensors, None and constants
_Operand = Any  # a tensor, or None where no wanted gradient needs it
_Wanted = Sequence[bool]
_Two = tuple[Tensor | None, Tensor | None]
_Function = Callable[..., Any]

# Products


class _Saved(NamedTuple):
    """What the derivative of a bilinear operator needs beside tensors, and the three operators."""

    dtypes: tuple[torch.dtype, torch.dtype]
    block_size: int
    scale: float

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        y: Tensor = _CONVOLVE(x, w, self.scale)
        return y

    def input_grad(self, g: Tensor, w: Tensor) -> Tensor:
        dx: Tensor = _INPUT_GRAD(g, w, self.scale)
        return dx

    def kernel_grad(self, g: Tensor, x: Tensor) -> Tensor:
        dw: Tensor = _KERNEL_GRAD(g, x, self.block_size, self.dtypes[1], self.scale)
        return dw

    def backward(self, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = _BACKWARD(g, x, w, self.scale)
        return both


class _SavedOfMany(NamedTuple):
    """The same for a stack of kernels; the index is there when gradients are wanted."""

    dtypes: tuple[torch.dtype, torch.dtype]
    adapters: int
    block_size: int
    scale: float
    rows: Tensor | None = None  # the index

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        y: Tensor = _MANY(x, w, self.rows, self.scale)
        return y

    def input_grad(self, g: Tensor, w: Tensor) -> Tensor:
        dx: Tensor = _MANY_INPUT_GRAD(g, w, self.rows, self.scale)
        return dx

    def kernel_grad(self, g: Tensor, x: Tensor) -> Tensor:
        dw: Tensor = _MANY_KERNEL_GRAD(
            g, x, self.rows, self.adapters, self.block_size, self.dtypes[1], self.scale
        )
        return dw

    def backward(self, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        dx = self.input_grad(shapes.widened(g, x.dtype), w)
        return dx.to(x.dtype), self.kernel_grad(g, x)


@dataclass(frozen=True, eq=False)  # a key of dictionaries: itself, quickly
class Bilinear:
    """``op(a, b, *constants)``, the last constant the scale, the first of several the block size.

    ``vjp(h, a, b, wanted, saved)`` returns the gradients of ``a`` and ``b``, None for what is not
    wanted; an operand that no wanted gradient needs comes as None.
    """

    op: _private.Overload
    vjp: Callable[[Tensor, _Operand, _Operand, _Wanted, Any], _Two]
    defaults: _Args  # of the constants: the dispatcher leaves out arguments that equal them

    def complete(self, args: _Args) -> _Args:
        return (*args, *self.defaults[len(args) - 2 :])

    def refuse(self, args: _Args) -> None:
        pass

    def save(self, needs: _Wanted, args: _Args) -> tuple[_Args, Any]:
        a, b, *constants = args
        block_size = constants[0] if len(constants) > 1 else b.shape[-1]
        kept = (a if needs[1] else None, b if needs[0] else None)
        return kept, _Saved((a.dtype, b.dtype), block_size, constants[-1])

    def gradients(self, h: Tensor, kept: _Args, saved: Any, wanted: _Wanted) -> _Two:
        a, b = kept
        return self.vjp(h, a, b, wanted, saved)

    def tangents(
        self, args: Sequence[Any], a_dot: Tensor | None, b_dot: Tensor | None, *_constants: None
    ) -> list[Tensor]:
        a, b, *constants = args
        terms = [] if a_dot is None else [self.op(a_dot, b, *constants)]
        return terms if b_dot is None else [*terms, self.op(a, b_dot, *constants)]


class BilinearOfMany(Bilinear):
    """``op(a, b, index, *constants)``; where there are several, the first two are sizes."""

    def complete(self, args: _Args) -> _Args:
        return (*args, *self.defaults[len(args) - 3 :])

    def save(self, needs: _Wanted, args: _Args) -> tuple[_Args, _SavedOfMany]:
        a, b, index, *constants = args
        adapters, block_size = constants[:2] if len(constants) > 1 else (b.shape[0], b.shape[-1])
        kept = (a if needs[1] else None, b if needs[0] else None, index)
        return kept, _SavedOfMany((a.dtype, b.dtype), adapters, block_size, constants[-1])

    def gradients(self, h: Tensor, kept: _Args, saved: _SavedOfMany, wanted: _Wanted) -> _Two:
        a, b, index = kept
        return self.vjp(h, a, b, wanted, saved._replace(rows=index))


@dataclass(frozen=True, eq=False)  # a key of dictionaries: itself, quickly
class Prepared:
    """``op(x, w_hat, block_size, w_hat_transposed)``, linear in ``x``.

    With a stack of kernels an index is the third of five arguments.
    """

    op: _private.Overload
    arguments: int = 4

    def complete(self, args: _Args) -> _Args:
        return (*args, *(None,) * (self.arguments - len(args)))

    def refuse(self, args: _Args) -> None:
        """Raise where a gradient would be lost."""
        x, *_, w_hat_transposed = args
        name = f"c3a.{self.op.name().partition('::')[2]}"
        prepared = [t for t in (args[1], w_hat_transposed) if t is not None]
        if any(t.requires_grad for t in prepared) or _private.has_tangent(*prepared):
            single = "" if self.arguments == 4 else "_many"
            raise RuntimeError(
                f"{name}: a prepared kernel takes no gradient and no tangent, and w_hat has one; "
                f"call c3a.block_circ_conv{single}, which differentiates in w"
            )
        if x.requires_grad and w_hat_transposed is None:
            raise RuntimeError(
                f"{name}: x requires a gradient, which needs the transposed matrix: give "
                "w_hat_transposed = c3a.prepare(w, transposed=True), or call it under "
                "torch.no_grad()"
            )

    def save(self, needs: _Wanted, args: _Args) -> tuple[_Args, int]:
        _, w_hat, *index, block_size, w_hat_transposed = args
        return (w_hat, w_hat_transposed, *index), block_size

    def gradients(self, h: Tensor, kept: _Args, block_size: int, wanted: _Wanted) -> _Two:
        w_hat, w_hat_transposed, *index = kept
        if not wanted[0]:
            return None, None
        return self.op(h, w_hat_transposed, *index, block_size, w_hat), None

    def tangents(self, args: Sequence[Any], x_dot: Tensor | None, *_: None) -> list[Tensor]:
        return [] if x_dot is None else [self.op(x_dot, *args[1:])]


Product = Bilinear | Prepared


def _vjp_forward(h: Tensor, x: _Operand, w: _Operand, wanted: _Wanted, saved: Any) -> _Two:
    if all(wanted):
        both: _Two = saved.backward(h, x, w)
        return both
    if wanted[0]:
        return saved.input_grad(h, w), None
    return None, saved.kernel_grad(h, x)


def _vjp_input_grad(h: Tensor, g: _Operand, w: _Operand, wanted: _Wanted, saved: Any) -> _Two:
    dg = saved.convolve(h, w) if wanted[0] else None
    dw = saved.kernel_grad(g, h) if wanted[1] else None
    return dg, dw


def _vjp_kernel_grad(v: Tensor, g: _Operand, x: _Operand, wanted: _Wanted, saved: Any) -> _Two:
    of_g, of_x = saved.dtypes
    dg = dx = None
    if wanted[0]:
        dg = saved.convolve(shapes.widened(x, of_g), v).to(of_g)
    if wanted[1]:
        dx = saved.input_grad(shapes.widened(g, of_x), v).to(of_x)
    return dg, dx


FORWARD = Bilinear(_CONVOLVE, _vjp_forward, (1.0,))
INPUT_GRAD = Bilinear(_INPUT_GRAD, _vjp_input_grad, (1.0,))
KERNEL_GRAD = Bilinear(_KERNEL_GRAD, _vjp_kernel_grad, (None, None, 1.0))
PREPARED = Prepared(_PREPARED)
MANY = BilinearOfMany(_MANY, _vjp_forward, (1.0,))
MANY_INPUT_GRAD = BilinearOfMany(_MANY_INPUT_GRAD, _vjp_input_grad, (1.0,))
MANY_KERNEL_GRAD = BilinearOfMany(_MANY_KERNEL_GRAD, _vjp_kernel_grad, (None, None, None, 1.0))
MANY_PREPARED = Prepared(_MANY_PREPARED, arguments=5)

# Autograd nodes


_Node = type[_private.Node]


class _Context(Protocol):
    """What autograd tells a node of a call, and what the node keeps of it."""

    needs_input_grad: tuple[bool, ...]
    saved: Any  # by the product
    constants: _Args
    of_x: torch.dtype
    of_base: torch.dtype
    is_dual: bool

    @property
    def saved_tensors(self) -> _Args: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def save_for_forward(self, *tensors: Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class _Call(NamedTuple):
    """How a node's forward is to compute."""

    compute: Callable[..., Tensor]
    is_dual: bool
    grad_mode: bool


def _node(name: str, members: dict[str, object]) -> _Node:
    """Make the autograd function ``name``; its node in a graph is called ``<name>Backward``."""
    members = {"__module__": __name__, **members}
    return cast(_Node, _private.FunctionMeta(name, (_private.Node,), members))


def _forward(ctx: _Context, product: Product, first: int, call: _Call, args: _Args) -> Tensor:
    """Save for both modes, then compute; ``args[first:]`` are the product's arguments."""
    operands = args[first:]
    needs = ctx.needs_input_grad[1 + first : 3 + first]
    kept, ctx.saved = product.save(needs, operands)
    ctx.save_for_backward(*kept)
    if call.is_dual:
        _save_for_tangents(ctx, operands)
    if not _private.in_transform():
        return call.compute(*args)
    # A function's forward runs with both modes off; outer levels of torch.func need them.
    with torch.set_grad_enabled(call.grad_mode), _private.forward_mode_enabled(True):
        return call.compute(*args)


def _save_for_tangents(ctx: _Context, operands: _Args) -> None:
    tensors: list[Tensor | None] = []
    constants = []
    for t in operands:
        is_tensor = isinstance(t, Tensor)
        tensors.append(t if is_tensor else None)
        constants.append(None if is_tensor else t)
    ctx.save_for_forward(*tensors)
    ctx.constants = tuple(constants)
    ctx.set_materialize_grads(False)


def _tangents(
    ctx: _Context, product: Product, dots: _Args, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return the terms of the result's tangent, ``dtype`` at least."""
    pairs = zip(ctx.saved_tensors[-len(dots) :], ctx.constants[-len(dots) :], strict=True)
    args = [c if t is None else t for t, c in pairs]
    if dtype is not None:
        args[0] = shapes.widened(args[0], dtype)
        dots = (None if dots[0] is None else shapes.widened(dots[0], dtype), *dots[1:])
    return product.tangents(args, *dots)


def autocasts(device_type: str) -> bool:
    """Return whether autocast is at work on a device; on some, such as meta, it never is."""
    # Compiled autograd can trace the first of these on every torch, not the second.
    has_autocast = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Let gradients keep their dtypes where a backward pass runs within an autocast region."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def _product_node(name: str, product: Product) -> _Node:
    def forward(ctx: _Context, call: _Call, *args: Any) -> Tensor:
        return _forward(ctx, product, 0, call, args)

    def backward(ctx: _Context, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:  # no gradient arrived, which only a node with tangents is told
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[1:3]
        with _without_autocast(h.device.type):
            grads = product.gradients(h, ctx.saved_tensors, ctx.saved, wanted)
        return (None, *grads, *(None for _ in ctx.needs_input_grad[3:]))

    def jvp(ctx: _Context, _call: None, *dots: Tensor | None) -> Tensor:
        terms = _tangents(ctx, product, dots)
        return sum(terms[1:], terms[0])

    functions: dict[str, _Function] = {"forward": forward, "backward": backward, "jvp": jvp}
    return _node(name, {key: staticmethod(f) for key, f in functions.items()})


def _sum_node(name: str, product: Product) -> _Node:
    """Make the node of ``base`` plus a product."""

    def forward(ctx: _Context, call: _Call, base: Tensor, *args: Any) -> Tensor:
        ctx.of_x, ctx.of_base = args[0].dtype, base.dtype
        return _forward(ctx, product, 1, call, (base, *args))

    def backward(ctx: _Context, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[2:4]
        dx, dw = None, None
        if any(wanted):
            with _without_autocast(h.device.type):
                # Where the result is dx alone, it has h's dtype: it is not rounded below x's.
                g = shapes.widened(h, ctx.of_x) if wanted[0] and not wanted[1] else h
                dx, dw = product.gradients(g, ctx.saved_tensors, ctx.saved, wanted)
                dx = None if dx is None else dx.to(ctx.of_x)
        rest = (None for _ in ctx.needs_input_grad[4:])
        return (None, h if ctx.needs_input_grad[1] else None, dx, dw, *rest)

    def jvp(ctx: _Context, _call: None, base_dot: Tensor | None, *dots: Tensor | None) -> Tensor:
        terms = [] if base_dot is None else [base_dot]
        # Not rounded below the sum's dtype on the way.
        terms += [term.to(ctx.of_base) for term in _tangents(ctx, product, dots, ctx.of_base)]
        return sum(terms[1:], terms[0])

    functions: dict[str, _Function] = {"forward": forward, "backward": backward, "jvp": jvp}
    return _node(name, {key: staticmethod(f) for key, f in functions.items()})


# Kernels for the dispatcher's Autograd key


def typed_errors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make out of memory torch's own exception, whose type is lost in a C interface."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "out of memory" in str(error) and type(error) is RuntimeError:
                raise torch.OutOfMemoryError(str(error)) from None
            raise

    return call


@typed_errors
def _compute(op: _private.Overload, keyset: _private.DispatchKeySet, *args: Any) -> Any:
    return _private.below_autograd(op, keyset, *args)


def _needs_graph(*args: object) -> bool:
    return torch.is_grad_enabled() and _private.any_requires_grad(*args)


def _tensors(args: _Args) -> list[Tensor]:
    return [t for t in args if isinstance(t, Tensor)]


def _apply(node: _Node, compute: Callable[..., Tensor], args: _Args, is_dual: bool) -> Tensor:
    with _private.recorded_at_one_level():
        return node.apply(_Call(compute, is_dual, torch.is_grad_enabled()), *args)


def _recorded(op: _private.Overload, product: Product, node: _Node, first: int) -> _Function:
    """Return the Autograd kernel of ``op``, whose arguments from ``first`` on are the product's."""

    check = shapes.argument_check(op)

    def kernel(keyset: _private.DispatchKeySet, *args: Any) -> Any:
        check(args)
        is_dual = _private.has_tangent(*_tensors(args))
        if not is_dual and not _needs_graph(*args):
            return _compute(op, keyset, *args)
        args = (*args[:first], *product.complete(args[first:]))
        product.refuse(args[first:])
        return _apply(node, partial(_compute, op, keyset), args, is_dual)

    return kernel


def product_rule(product: Product, name: str) -> _Function:
    return _recorded(product.op, product, _product_node(name, product), 0)


def sum_rule(op: _private.Overload, product: Product, name: str) -> _Function:
    return _recorded(op, product, _sum_node(name, product), 1)


def sum_of(product: Product, check: Callable[..., None]) -> Callable[..., Tensor]:
    """Return what an operator in place does that has no functional one: a product, then a sum."""

    def function(base: Tensor, x: Tensor, *args: Any) -> Tensor:
        check(base, x, *args)
        # The product is not rounded below the sum's dtype on the way.
        total: Tensor = base + product.op(shapes.widened(x, base.dtype), *args)
        return total

    return function


def in_place_rule(op: _private.Overload, functional: Callable[..., Tensor]) -> _Function:
    """Write in place, or where a graph or tangent is wanted, by autograd's own in-place copy."""

    check = shapes.argument_check(op)

    def kernel(keyset: _private.DispatchKeySet, base: Tensor, *args: Any) -> None:
        check((base, *args))
        if _needs_graph(base, *args) or _private.has_tangent(base, *_tensors(args)):
            base.copy_(functional(base, *args))
        else:
            _compute(op, keyset, base, *args)

    return kernel


def _halves(g: Tensor, x: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return both gradients, the input's in the dtype of ``x`` at least, differentiable."""
    dx = _INPUT_GRAD(shapes.widened(g, x.dtype), w, scale)
    return dx, _KERNEL_GRAD(g, x, w.shape[-1], w.dtype, scale)


def pair_rule(op: _private.Overload) -> _Function:
    """Share one transform of ``g``, or where a graph is wanted, differentiate the two halves."""

    check = shapes.argument_check(op)

    def kernel(
        keyset: _private.DispatchKeySet, g: Tensor, x: Tensor, w: Tensor, scale: float = 1.0
    ) -> Any:
        check((g, x, w))
        if _needs_graph(g, x, w) or _private.has_tangent(g, x, w):
            dx, dw = _halves(g, x, w, scale)
            return dx.to(x.dtype), dw
        return _compute(op, keyset, g, x, w, scale)

    return kernel


def pair_in_place_rule(op: _private.Overload) -> _Function:
    """Likewise, with the input's gradient added onto one that is there."""

    check = shapes.argument_check(op)

    def kernel(
        keyset: _private.DispatchKeySet,
        dx: Tensor,
        g: Tensor,
        x: Tensor,
        w: Tensor,
        scale: float = 1.0,
    ) -> Any:
        check((dx, g, x, w))
        if _needs_graph(dx, g, x, w) or _private.has_tangent(dx, g, x, w):
            more, dw = _halves(g, shapes.widened(x, dx.dtype), w, scale)
            dx.copy_(dx + more)
            return dw
        return _compute(op, keyset, dx, g, x, w, scale)

    return kernel


def prepare_rule(op: _private.Overload) -> _Function:
    """Refuse what would lose a derivative."""

    check = shapes.argument_check(op)

    def kernel(keyset: _private.DispatchKeySet, w: Tensor, *args: Any) -> Any:
        check((w, *args))
        if _needs_graph(w) or _private.has_tangent(w):
            raise RuntimeError(
                "c3a.prepare: a prepared kernel takes no gradient, and w requires one; prepare "
                "w.detach(), or call it under torch.no_grad()"
            )
        return _compute(op, keyset, w, *args)

    return kernel


# Sums in memory that nobody else has, for the layer


class _InPlace(NamedTuple):
    """A product's sums in place; to be called where autograd's rules are not at work."""

    add_: _private.Overload  # (base, *arguments of the product)
    # (dx, h, kept, saved, wanted) adds the input gradient onto dx and returns the kernel's.
    add_gradient: Callable[[Tensor, Tensor, _Two, Any, _Wanted], Tensor | None]


def _add_gradient(
    dx: Tensor, h: Tensor, kept: _Two, saved: _Saved, wanted: _Wanted
) -> Tensor | None:
    x, w = kept
    if not wanted[1]:
        dx.add_(_INPUT_GRAD(h, w, saved.scale))
        return None
    dw: Tensor = _BACKWARD_ADD_(dx, h, x, w, saved.scale)
    return dw


def _add_prepared_gradient(
    dx: Tensor, h: Tensor, kept: _Two, block_size: int, _wanted: _Wanted
) -> None:
    w_hat, w_hat_transposed = kept
    _PREPARED_ADD_(dx, h, w_hat_transposed, block_size, w_hat)


_IN_PLACE: dict[Product, _InPlace] = {
    FORWARD: _InPlace(_ADD_, _add_gradient),
    PREPARED: _InPlace(_PREPARED_ADD_, _add_prepared_gradient),
}


def _sum_in_place(add_: _private.Overload) -> Callable[..., Tensor]:
    @typed_errors
    def compute(base: Tensor, *args: Any) -> Tensor:
        out = base.detach()  # the same memory as a tensor of its own: to autograd, a new result
        with _private.kernels_only():
            add_(out, *args)
        return out

    return compute


_INTO_BASE: dict[Product, tuple[_Node, Callable[..., Tensor]]] = {
    FORWARD: (_sum_node("BlockCircConvAdd", FORWARD), _sum_in_place(_ADD_)),
    PREPARED: (_sum_node("BlockCircConvPreparedAdd", PREPARED), _sum_in_place(_PREPARED_ADD_)),
    MANY: (_sum_node("BlockCircConvManyAdd", MANY), _sum_in_place(_MANY_ADD_)),
    MANY_PREPARED: (
        _sum_node("BlockCircConvManyPreparedAdd", MANY_PREPARED),
        _sum_in_place(_MANY_PREPARED_ADD_),
    ),
}


def add_into(product: Product, base: Tensor, *args: Any) -> Tensor:
    """Return ``base`` plus a product in the memory of ``base``, which is given up.

    For a plain call (``_private.is_plain``) and a ``base`` that nobody else refers to.
    """
    node, compute = _INTO_BASE[product]
    if _needs_graph(base, *args):
        return _apply(node, compute, (base, *product.complete(args)), is_dual=False)
    return compute(base, *args)


def _linear_node(name: str, product: Product, traced: bool = False) -> _Node:
    """Make the node of a frozen linear layer plus a product of the same input.

    Its arguments are weight, bias and the product's. The linear layer computes in the weight's
    dtype, which under autocast is not the input's. Both sums, the result's and the input
    gradient's, are made in the linear layer's share. In a graph that is ``traced`` these writes are
    the compiler's to keep in place.
    """
    in_place = _IN_PLACE[product]
    at_once = nullcontext if traced else _private.kernels_only
    is_alone = _is_last if traced else _is_alone

    def forward(ctx: _Context, *args: Any) -> Tensor:
        weight, bias, x, *rest = args
        needs = ctx.needs_input_grad[2:4]
        kept, ctx.saved = product.save(needs, args[2:])
        ctx.save_for_backward(*kept, weight if needs[0] else None)
        _save_for_tangents(ctx, args)
        ctx.is_dual = False
        ctx.of_x = x.dtype
        with at_once(), _private.autocast_disabled():
            y = F.linear(_in(weight.dtype, x), weight, bias)
            in_place.add_(y, x, *rest)
        return y

    def backward(ctx: _Context, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad
        wanted = needs[2:4]
        saved = ctx.saved_tensors
        kept, weight = saved[:2], saved[2]
        dx: Tensor | None
        if not ctx.is_dual and is_alone(h, saved):
            with at_once(), _private.autocast_disabled():
                if wanted[0]:
                    dx = share = _in(ctx.of_x, h.matmul(weight))
                    dw = in_place.add_gradient(share, h, kept, ctx.saved, wanted)
                else:
                    dx, dw = product.gradients(h, kept, ctx.saved, wanted)
        else:
            with _without_autocast(h.device.type):
                dx, dw = product.gradients(h, kept, ctx.saved, wanted)
                dx = None if dx is None else h.matmul(weight).to(ctx.of_x) + dx
        return (None, None, dx, dw) + (None,) * (len(needs) - 4)

    def jvp(
        ctx: _Context, weight_dot: Tensor | None, bias_dot: Tensor | None, *dots: Tensor | None
    ) -> Tensor:
        ctx.is_dual = True
        weight, _, x = ctx.saved_tensors[:3]
        terms = _tangents(ctx, product, dots)
        terms += [] if dots[0] is None else [F.linear(dots[0], weight)]
        terms += [] if weight_dot is None else [F.linear(x, weight_dot)]
        terms += [] if bias_dot is None else [bias_dot.expand(*x.shape[:-1], -1)]
        return sum(terms[1:], terms[0])

    functions: dict[str, _Function] = {
        "forward": typed_errors(forward),
        "backward": typed_errors(backward),
        "jvp": jvp,
    }
    return _node(name, {key: staticmethod(f) for key, f in functions.items()})


def _in(dtype: torch.dtype, t: Tensor) -> Tensor:
    """Return a tensor in a dtype; asked first, since the call takes a microsecond."""
    return t if t.dtype == dtype else t.to(dtype)


def _is_last(h: Tensor, _saved: _Args) -> bool:
    """Return whether nothing differentiates or transforms a backward pass."""
    return (
        not torch.is_grad_enabled()
        and h.layout == torch.strided
        and not _private.in_transform()
        and not _private.is_batch_of_gradients(h)
        and not _private.has_tangent(h)
    )


def _is_alone(h: Tensor, saved: _Args) -> bool:
    """Return whether nothing traces or wraps it either."""
    return _private.is_ordinary(h, *saved) and _is_last(h, saved)


_ON_LINEAR: dict[Product, _Node] = {
    FORWARD: _linear_node("BlockCircConvLinear", FORWARD),
    PREPARED: _linear_node("BlockCircConvPreparedLinear", PREPARED),
}


def add_to_linear(
    product: Product, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any
) -> Tensor:
    """Return ``F.linear(x, weight, bias)`` plus a product of ``x``, as one node of the graph.

    For an ordinary call (``_private.is_ordinary``) that wants a gradient, with a weight and a bias
    that want none, and all arguments of the product. The result has the weight's dtype; where that
    is not the input's, nothing may have a tangent.
    """
    return _ON_LINEAR[product].apply(weight, bias, x, *args)


_TRACED_ON_LINEAR = _linear_node("BlockCircConvLinear", FORWARD, traced=True)


def linear_as_a_sum(
    x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, scale: float = 1.0
) -> Tensor:
    """Return what ``block_circ_conv_linear`` does, by a node for each term."""
    total: Tensor = _ADD(F.linear(_in(weight.dtype, x), weight, bias), x, w, scale)
    return total


def linear_rule(op: _private.Overload) -> _Function:
    """Decompose, for compilers to see a linear layer; as one node unless the layer is trained."""

    check = shapes.argument_check(op)

    def kernel(
        _keyset: _private.DispatchKeySet,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        w: Tensor,
        scale: float = 1.0,
    ) -> Tensor:
        check((x, weight, bias, w))
        shapes.linear(x, weight, bias, w, scale)
        tensors = _tensors((x, weight, bias, w))
        if (
            _needs_graph(weight, bias)
            or _private.in_transform()
            or _private.has_tangent(*tensors)
            or _private.is_exporting()  # to a graph for others, who know no writes in place
        ):
            return linear_as_a_sum(x, weight, bias, w, scale)
        if _needs_graph(x, w):
            is_ordinary = _private.is_ordinary(*tensors)
            node = _ON_LINEAR[FORWARD] if is_ordinary else _TRACED_ON_LINEAR
            return node.apply(weight, bias, x, w, scale)
        y = F.linear(_in(weight.dtype, x), weight, bias)
        _ADD_(y, x, w, scale)
        return y

    return kernel
