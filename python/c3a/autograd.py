"""Derivatives, in reverse and forward mode.

The forward ``F(x, w)``, its input gradient ``I(g, w)`` and its kernel gradient ``K(g, x)`` are
bilinear, and the derivative of each is made of the other two (DESIGN.md, "Gradients"):

    F: dx = I(g, w)   dw = K(g, x)
    I: dg = F(h, w)   dw = K(g, h)      for h, the gradient that arrives at I's result
    K: dg = F(x, v)   dx = I(g, v)      for v, the gradient that arrives at K's result

A factor, ``scale``, passes through all of them unchanged. With a prepared kernel the product is
linear in ``x``, and its gradient is the product with the prepared kernel of the transposed matrix.

A *product* here is an operator with its derivative: ``save`` names what the derivative needs,
``gradients`` and ``tangents`` are the derivative, one entry for each of the operator's arguments.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _private, shapes

_OPS = torch.ops.c3a

# Products


class _Saved(NamedTuple):
    """What the derivative of a bilinear operator needs beside tensors."""

    dtypes: tuple[torch.dtype, torch.dtype]
    block_size: int
    scale: float


@dataclass(frozen=True, eq=False)  # a key of dictionaries: itself, quickly
class Bilinear:
    """``op(a, b, *constants)``, the last constant the scale, the first of several the block size.

    ``vjp(h, a, b, wanted, saved)`` returns the gradients of ``a`` and ``b``, None for what is not
    wanted; an operand that no wanted gradient needs comes as None.
    """

    op: Any
    vjp: Callable
    defaults: tuple  # of the constants: the dispatcher leaves out arguments that equal them

    def complete(self, args: tuple) -> tuple:
        return (*args, *self.defaults[len(args) - 2 :])

    def refuse(self, args: tuple) -> None:
        pass

    def save(self, needs, args) -> tuple[tuple, _Saved]:
        a, b, *constants = args
        block_size = constants[0] if len(constants) > 1 else b.shape[-1]
        kept = (a if needs[1] else None, b if needs[0] else None)
        return kept, _Saved((a.dtype, b.dtype), block_size, constants[-1])

    def gradients(self, h, kept, saved, wanted) -> tuple:
        return self.vjp(h, *kept, wanted, saved)

    def tangents(self, args, a_dot, b_dot, *_constants) -> list[Tensor]:
        a, b, *constants = args
        terms = [] if a_dot is None else [self.op(a_dot, b, *constants)]
        return terms if b_dot is None else [*terms, self.op(a, b_dot, *constants)]


@dataclass(frozen=True, eq=False)  # a key of dictionaries: itself, quickly
class Prepared:
    """``op(x, w_hat, block_size, w_hat_transposed)``, linear in ``x``."""

    op: Any

    def complete(self, args: tuple) -> tuple:
        return (*args, *(None,) * (4 - len(args)))

    def refuse(self, args: tuple) -> None:
        """Raise where a gradient would be lost."""
        x, *_, w_hat_transposed = args
        name = f"c3a.{self.op.name().removeprefix('c3a::')}"
        prepared = [t for t in (args[1], w_hat_transposed) if t is not None]
        if any(t.requires_grad for t in prepared) or _private.has_tangent(*prepared):
            raise RuntimeError(
                f"{name}: a prepared kernel takes no gradient and no tangent, and w_hat has one; "
                "call c3a.block_circ_conv(x, w), which differentiates in w"
            )
        if x.requires_grad and w_hat_transposed is None:
            raise RuntimeError(
                f"{name}: x requires a gradient, which needs the transposed matrix: give "
                "w_hat_transposed = c3a.prepare(w, transposed=True), or call it under "
                "torch.no_grad()"
            )

    def save(self, needs, args) -> tuple[tuple, int]:
        _, w_hat, block_size, w_hat_transposed = args
        return (w_hat, w_hat_transposed), block_size

    def gradients(self, h, kept, block_size, wanted) -> tuple:
        w_hat, w_hat_transposed = kept
        return (self.op(h, w_hat_transposed, block_size, w_hat) if wanted[0] else None, None)

    def tangents(self, args, x_dot, *_) -> list[Tensor]:
        return [] if x_dot is None else [self.op(x_dot, *args[1:])]


def _vjp_forward(h, x, w, wanted, saved):
    if all(wanted):
        return _OPS.block_circ_conv_backward(h, x, w, saved.scale)
    if wanted[0]:
        return _OPS.block_circ_conv_input_grad(h, w, saved.scale), None
    return None, _kernel_grad(h, x, saved)


def _vjp_input_grad(h, g, w, wanted, saved):
    dg = _OPS.block_circ_conv(h, w, saved.scale) if wanted[0] else None
    dw = _kernel_grad(g, h, saved) if wanted[1] else None
    return dg, dw


def _vjp_kernel_grad(v, g, x, wanted, saved):
    of_g, of_x = saved.dtypes
    dg = dx = None
    if wanted[0]:
        dg = _OPS.block_circ_conv(shapes.widened(x, of_g), v, saved.scale).to(of_g)
    if wanted[1]:
        dx = _OPS.block_circ_conv_input_grad(shapes.widened(g, of_x), v, saved.scale).to(of_x)
    return dg, dx


def _kernel_grad(g, x, saved):
    return _OPS.block_circ_conv_kernel_grad(g, x, saved.block_size, saved.dtypes[1], saved.scale)


FORWARD = Bilinear(_OPS.block_circ_conv.default, _vjp_forward, (1.0,))
INPUT_GRAD = Bilinear(_OPS.block_circ_conv_input_grad.default, _vjp_input_grad, (1.0,))
KERNEL_GRAD = Bilinear(
    _OPS.block_circ_conv_kernel_grad.default, _vjp_kernel_grad, (None, None, 1.0)
)
PREPARED = Prepared(_OPS.block_circ_conv_prepared.default)

# Autograd nodes


class _Call(NamedTuple):
    """How a node's forward is to compute."""

    compute: Callable
    is_dual: bool
    grad_mode: bool


def _node(name: str, members: dict) -> type:
    """Make the autograd function ``name``; its node in a graph is called ``<name>Backward``."""
    return _private.FunctionMeta(name, (_private.Node,), {"__module__": __name__, **members})


def _forward(ctx, product, first: int, call: _Call, args: tuple) -> Tensor:
    """Save for both modes, then compute; ``args[first:]`` are the product's arguments."""
    operands = args[first:]
    needs = ctx.needs_input_grad[1 + first : 3 + first]
    kept, ctx.saved = product.save(needs, operands)
    ctx.save_for_backward(*kept)
    if call.is_dual:
        tensors = tuple(t if isinstance(t, Tensor) else None for t in operands)
        ctx.save_for_forward(*tensors)
        ctx.constants = tuple(None if isinstance(t, Tensor) else t for t in operands)
        ctx.set_materialize_grads(False)
    if not _private.in_transform():
        return call.compute(*args)
    # A function's forward runs with both modes off; outer levels of torch.func need them.
    with torch.set_grad_enabled(call.grad_mode), _private.forward_mode_enabled(True):
        return call.compute(*args)


def _tangents(ctx, product, dots: tuple, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the terms of the result's tangent, ``dtype`` at least."""
    pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
    args = [c if t is None else t for t, c in pairs]
    if dtype is not None:
        args[0] = shapes.widened(args[0], dtype)
        dots = (None if dots[0] is None else shapes.widened(dots[0], dtype), *dots[1:])
    return product.tangents(args, *dots)


def _without_autocast(device_type: str):
    """Let gradients keep their dtypes where a backward pass runs within an autocast region."""
    # Compiled autograd can trace the first of these on every torch, not the second.
    has_autocast = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    if has_autocast and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _product_node(name: str, product) -> type:
    def forward(ctx, call, *args):
        return _forward(ctx, product, 0, call, args)

    def backward(ctx, h):
        if h is None:  # no gradient arrived, which only a node with tangents is told
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[1:3]
        with _without_autocast(h.device.type):
            grads = product.gradients(h, ctx.saved_tensors, ctx.saved, wanted)
        return (None, *grads, *(None for _ in ctx.needs_input_grad[3:]))

    def jvp(ctx, _call, *dots):
        terms = _tangents(ctx, product, dots)
        return sum(terms[1:], terms[0])

    functions = {"forward": forward, "backward": backward, "jvp": jvp}
    return _node(name, {key: staticmethod(f) for key, f in functions.items()})


def _sum_node(name: str, product) -> type:
    """Make the node of ``base`` plus a product."""

    def forward(ctx, call, base, *args):
        ctx.of_x, ctx.of_base = args[0].dtype, base.dtype
        return _forward(ctx, product, 1, call, (base, *args))

    def backward(ctx, h):
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

    def jvp(ctx, _call, base_dot, *dots):
        terms = [] if base_dot is None else [base_dot]
        # Not rounded below the sum's dtype on the way.
        terms += [term.to(ctx.of_base) for term in _tangents(ctx, product, dots, ctx.of_base)]
        return sum(terms[1:], terms[0])

    functions = {"forward": forward, "backward": backward, "jvp": jvp}
    return _node(name, {key: staticmethod(f) for key, f in functions.items()})


# Kernels for the dispatcher's Autograd key


def typed_errors(function: Callable) -> Callable:
    """Make out of memory torch's own exception, whose type is lost in a C interface."""

    @wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "out of memory" in str(error) and type(error) is RuntimeError:
                raise torch.OutOfMemoryError(str(error)) from None
            raise

    return call


@typed_errors
def _compute(op, keyset, *args):
    return _private.below_autograd(op, keyset, *args)


def _needs_graph(*args) -> bool:
    return torch.is_grad_enabled() and _private.any_requires_grad(*args)


def _tensors(args) -> list[Tensor]:
    return [t for t in args if isinstance(t, Tensor)]


def _apply(node: type, compute: Callable, args: tuple, is_dual: bool) -> Tensor:
    with _private.recorded_at_one_level():
        return node.apply(_Call(compute, is_dual, torch.is_grad_enabled()), *args)


def _recorded(op, product, node: type, first: int) -> Callable:
    """Return the Autograd kernel of ``op``, whose arguments from ``first`` on are the product's."""

    check = shapes.argument_check(op)

    def kernel(keyset, *args):
        check(args)
        is_dual = _private.has_tangent(*_tensors(args))
        if not is_dual and not _needs_graph(*args):
            return _compute(op, keyset, *args)
        args = (*args[:first], *product.complete(args[first:]))
        product.refuse(args[first:])
        return _apply(node, partial(_compute, op, keyset), args, is_dual)

    return kernel


def product_rule(product, name: str) -> Callable:
    return _recorded(product.op, product, _product_node(name, product), 0)


def sum_rule(op, product, name: str) -> Callable:
    return _recorded(op, product, _sum_node(name, product), 1)


def in_place_rule(op, functional) -> Callable:
    """Write in place, or where a graph or tangent is wanted, by autograd's own in-place copy."""

    check = shapes.argument_check(op)

    def kernel(keyset, base, *args):
        check((base, *args))
        if _needs_graph(base, *args) or _private.has_tangent(base, *_tensors(args)):
            base.copy_(functional(base, *args))
        else:
            _compute(op, keyset, base, *args)

    return kernel


def pair_rule(op) -> Callable:
    """Share one transform of ``g``, or where a graph is wanted, differentiate the two halves."""

    check = shapes.argument_check(op)

    def kernel(keyset, g, x, w, scale=1.0):
        check((g, x, w))
        if _needs_graph(g, x, w) or _private.has_tangent(g, x, w):
            dx = _OPS.block_circ_conv_input_grad(shapes.widened(g, x.dtype), w, scale).to(x.dtype)
            return dx, _OPS.block_circ_conv_kernel_grad(g, x, w.shape[-1], w.dtype, scale)
        return _compute(op, keyset, g, x, w, scale)

    return kernel


def prepare_rule(op) -> Callable:
    """Refuse what would lose a derivative."""

    check = shapes.argument_check(op)

    def kernel(keyset, w, *args):
        check((w, *args))
        if _needs_graph(w) or _private.has_tangent(w):
            raise RuntimeError(
                "c3a.prepare: a prepared kernel takes no gradient, and w requires one; prepare "
                "w.detach(), or call it under torch.no_grad()"
            )
        return _compute(op, keyset, w, *args)

    return kernel


# The sum in the memory of its base, for the layer


def _in_place(operator) -> Callable:
    @typed_errors
    def compute(base, *args):
        out = base.detach()  # the same memory as a tensor of its own: to autograd, a new result
        with _private.kernels_only():
            operator(out, *args)
        return out

    return compute


_INTO_BASE = {
    FORWARD: (
        _sum_node("BlockCircConvAdd", FORWARD),
        _in_place(_OPS.block_circ_conv_add_.default),
    ),
    PREPARED: (
        _sum_node("BlockCircConvPreparedAdd", PREPARED),
        _in_place(_OPS.block_circ_conv_prepared_add_.default),
    ),
}


def add_into(product, base: Tensor, *args) -> Tensor:
    """Return ``base`` plus a product in the memory of ``base``, which is given up.

    For a plain call (``_private.is_plain``) and a ``base`` that nobody else refers to.
    """
    node, compute = _INTO_BASE[product]
    if _needs_graph(base, *args):
        return _apply(node, compute, (base, *product.complete(args)), is_dual=False)
    return compute(base, *args)
