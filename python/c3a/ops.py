"""The operators' Python rules: shapes of fake tensors, autograd, forward mode, vmap, autocast.

The forward ``F(x, w)``, its input gradient ``I(g, w)`` and its kernel gradient ``K(g, x)`` are
bilinear, and the derivative of each is made of the other two (DESIGN.md, "Gradients"):

    F: dx = I(g, w)   dw = K(g, x)
    I: dg = F(h, w)   dw = K(g, h)      for h, the gradient that arrives at I's result
    K: dg = F(x, v)   dx = I(g, v)      for v, the gradient that arrives at K's result

A factor, ``scale``, passes through all of them unchanged. ``block_circ_conv_add`` is ``base + F``.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import spectra
from .spectra import SUPPORTED_DTYPES

_OPS = torch.ops.c3a
_LIBRARY = torch.library.Library("c3a", "FRAGMENT")


def block_circ_conv(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply every token by a block-circulant matrix.

    Equivalent to ``scale * x @ c3a.circulant(w).T``, by real FFTs in ``O(b log b)`` a block:
    ``y_i = sum_j C(w_ij) x_j`` with ``C(w)[u, t] = w[(t - u) % b]``.

    Args:
        x: activations of shape ``(..., n*b)``: float64, float32, bfloat16 or float16.
        w: kernel of shape ``(m, n, b)``, any of these dtypes, on the same device.
        scale: factor of the result, applied before it is rounded to ``x``'s dtype.

    Returns:
        ``y`` of shape ``(..., m*b)``, contiguous, in ``x``'s dtype. Sums run in float32 (float64 if
        an operand is float64) and are rounded once.

    Raises:
        RuntimeError: a shape, dtype or device breaks a rule; the message names rule and values.

    Differentiable any number of times in both arguments, in reverse and forward mode; works under
    ``torch.vmap``, ``torch.compile`` and autocast (inputs are taken as they are, and the result has
    autocast's dtype). Saves ``x`` only if ``w`` needs a gradient, ``w`` only if ``x`` does.

    Source: C3A (arXiv:2407.19342), sections 3.2 to 3.4. The input gradient is the transpose, where
    the paper's section 3.3 has it wrong.

    >>> w = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> block_circ_conv(torch.tensor([1.0, 0.0, 0.0]), w)
    tensor([1., 3., 2.])
    """
    return _OPS.block_circ_conv(x, w, scale)


def block_circ_conv_add(base: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``base + block_circ_conv(x, w, scale)`` in one pass over the activations.

    Equivalent to ``base + scale * x @ c3a.circulant(w).T``: what an adapted layer computes, without
    a temporary for the adapter's own output.

    Args:
        base: shape ``(..., m*b)`` with ``x``'s leading sizes; any of the dtypes.
        x, w, scale: as for ``block_circ_conv``.

    Returns:
        A new contiguous tensor of ``base``'s shape and dtype. The sum runs in float32 (float64 if
        an operand is float64) and is rounded once.

    Raises:
        RuntimeError: as for ``block_circ_conv``, and for a ``base`` of another shape.

    Differentiable like ``block_circ_conv``, and in ``base``; saves the same. The in-place variant
    ``torch.ops.c3a.block_circ_conv_add_`` writes into ``base``.

    Source: C3A (arXiv:2407.19342), equation of the adapted layer in section 3.2.

    >>> w = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> block_circ_conv_add(torch.ones(3), torch.tensor([1.0, 0.0, 0.0]), w)
    tensor([2., 4., 3.])
    """
    return _OPS.block_circ_conv_add(base, x, w, scale)


# Shape rules for fake tensors. cpp/problem.h states the same for real ones, in the same words.


def _check(op: str, holds, message) -> None:
    torch._check(holds, lambda: f"c3a.{op}: {message()}")


def _shape(t: Tensor) -> str:
    sizes = ", ".join(str(size) for size in t.shape)
    return f"({sizes},)" if t.dim() == 1 else f"({sizes})"


def _check_supported(op: str, what: str, dtype: torch.dtype) -> None:
    expected = "float64, float32, bfloat16 or float16"
    got = str(dtype).removeprefix("torch.")
    _check(op, dtype in SUPPORTED_DTYPES, lambda: f"expected {what} to be {expected}, got {got}")


def _check_floating(op: str, name: str, t: Tensor) -> None:
    _check_supported(op, name, t.dtype)


def _check_same_device(op: str, a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    rule = f"{a_name} and {b_name} on one device"
    _check(op, a.device == b.device, lambda: f"expected {rule}, got {a.device} and {b.device}")


def _check_tokens(op: str, name: str, t: Tensor) -> None:
    _check(op, t.dim() >= 1, lambda: f"expected {name} to have at least 1 dimension, got shape ()")


def _check_kernel(op: str, w: Tensor) -> None:
    _check_floating(op, "w", w)
    right = w.dim() == 3 and all(size >= 1 for size in w.shape)
    expected = "a kernel w of shape (m, n, b) with m, n, b >= 1"
    _check(op, right, lambda: f"expected {expected}, got {_shape(w)}")


def _check_same_leading(op: str, g: Tensor, x: Tensor) -> None:
    same = g.dim() == x.dim() and all(
        p == q for p, q in zip(g.shape[:-1], x.shape[:-1], strict=True)
    )
    rule = "grad_output and x to have the same leading dimensions"
    _check(op, same, lambda: f"expected {rule}, got {_shape(g)} and {_shape(x)}")


def _check_operands(op: str, name: str, a: Tensor, w: Tensor, blocks: str) -> None:
    """One tensor of activations and a kernel; ``blocks`` is ``"n"`` or ``"m"``."""
    _check_floating(op, name, a)
    _check_kernel(op, w)
    _check_same_device(op, name, a, "w", w)
    _check_tokens(op, name, a)
    features = w.shape["mn".index(blocks)] * w.shape[2]
    _check(
        op,
        a.shape[-1] == features,
        lambda: (
            f"expected {name}.size(-1) == {blocks} * b = {features} for a kernel of shape "
            f"{_shape(w)}, got {a.shape[-1]}"
        ),
    )


def _fake_forward(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    _check_operands("block_circ_conv", "x", x, w, "n")
    return x.new_empty((*x.shape[:-1], w.shape[0] * w.shape[2]))


def _check_base(op: str, base: Tensor, x: Tensor, w: Tensor) -> None:
    _check_operands(op, "x", x, w, "n")
    _check_floating(op, "base", base)
    _check_same_device(op, "base", base, "x", x)
    sizes = (*x.shape[:-1], w.shape[0] * w.shape[2])
    same = base.dim() == len(sizes) and all(p == q for p, q in zip(base.shape, sizes, strict=True))
    expected = ", ".join(str(size) for size in sizes) + ("," if len(sizes) == 1 else "")
    _check(op, same, lambda: f"expected base of shape ({expected}), got {_shape(base)}")


def _fake_add(base: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    _check_base("block_circ_conv_add", base, x, w)
    return base.new_empty(base.shape)


def _fake_add_(base: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> None:
    _check_base("block_circ_conv_add_", base, x, w)


def _fake_input_grad(g: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    _check_operands("block_circ_conv_input_grad", "grad_output", g, w, "m")
    return g.new_empty((*g.shape[:-1], w.shape[1] * w.shape[2]))


def _fake_kernel_grad(
    g: Tensor, x: Tensor, block_size: int, dtype: torch.dtype | None = None, scale: float = 1.0
) -> Tensor:
    op = "block_circ_conv_kernel_grad"
    _check_floating(op, "grad_output", g)
    _check_floating(op, "x", x)
    _check_same_device(op, "grad_output", g, "x", x)
    _check(op, block_size >= 1, lambda: f"expected block_size >= 1, got {block_size}")
    _check_tokens(op, "grad_output", g)
    _check_tokens(op, "x", x)
    _check_same_leading(op, g, x)
    for name, a in (("grad_output", g), ("x", x)):
        features = a.shape[-1]
        rule = f"{name}.size(-1) to be a positive multiple of block_size = {block_size}"
        right = features >= block_size and features % block_size == 0
        _check(op, right, lambda rule=rule, got=features: f"expected {rule}, got {got}")
    dtype = dtype or g.dtype
    _check_supported(op, "dtype", dtype)
    shape = (g.shape[-1] // block_size, x.shape[-1] // block_size, block_size)
    return g.new_empty(shape, dtype=dtype)


def _fake_backward(g: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    op = "block_circ_conv_backward"
    _check_operands(op, "x", x, w, "n")
    _check_operands(op, "grad_output", g, w, "m")
    _check_same_device(op, "grad_output", g, "x", x)
    _check_same_leading(op, g, x)
    return x.new_empty(x.shape), w.new_empty(w.shape)


# Derivatives, with None for what is not wanted. An operand that no wanted gradient needs is not
# saved: it comes as None.


class _Facts(NamedTuple):
    """What a derivative needs to know beside the tensors."""

    wanted: tuple[bool, bool]
    dtypes: tuple[torch.dtype, torch.dtype]
    block_size: int
    scale: float


def _vjp_forward(h, x, w, facts):
    if all(facts.wanted):
        return _OPS.block_circ_conv_backward(h, x, w, facts.scale)
    if facts.wanted[0]:
        return _OPS.block_circ_conv_input_grad(h, w, facts.scale), None
    return None, _kernel_grad(h, x, facts)


def _vjp_input_grad(h, g, w, facts):
    dg = _OPS.block_circ_conv(h, w, facts.scale) if facts.wanted[0] else None
    dw = _kernel_grad(g, h, facts) if facts.wanted[1] else None
    return dg, dw


def _vjp_kernel_grad(v, g, x, facts):
    of_g, of_x = facts.dtypes
    dg = _OPS.block_circ_conv(x, v, facts.scale).to(of_g) if facts.wanted[0] else None
    dx = _OPS.block_circ_conv_input_grad(g, v, facts.scale).to(of_x) if facts.wanted[1] else None
    return dg, dx


def _kernel_grad(g, x, facts):
    return _OPS.block_circ_conv_kernel_grad(g, x, facts.block_size, facts.dtypes[1], facts.scale)


class _Call(NamedTuple):
    """How the dispatcher called an Autograd kernel, beside the operator's own arguments."""

    keyset: torch._C.DispatchKeySet
    is_dual: bool
    grad_mode: bool


def _redispatch(op, keyset, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _compute(op, keyset, args):
    """Compute where no gradient is wanted for the kernel: by its kept spectra where it has some."""
    if op in _BY_SPECTRA:
        with torch._C._AutoDispatchBelowAutograd():
            result = _BY_SPECTRA[op](*args)
        if result is not None:
            return result
    return _redispatch(op, keyset, args)


def _needs_graph(*args) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _has_tangent(*tensors: Tensor) -> bool:
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _autograd_rule(op, vjp, defaults):
    """Return the Autograd kernel of a bilinear operator ``op(a, b, *constants)``.

    ``defaults`` are the constants' default values, which the dispatcher leaves out; the last
    constant is the scale, and the first of several is the block size.

    The dispatcher calls it at one level of ``torch.func``'s transforms at a time, which is what a
    single-level function records; the public ``Function`` would start over at the top level.
    """

    class Rule(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, call, a, b, *constants):
            needs_a, needs_b = ctx.needs_input_grad[1:3]
            ctx.save_for_backward(a if needs_b else None, b if needs_a else None)
            block_size = constants[0] if len(constants) > 1 else b.shape[-1]
            ctx.facts = _Facts((needs_a, needs_b), (a.dtype, b.dtype), block_size, constants[-1])
            if call.is_dual:
                ctx.save_for_forward(a, b)
                ctx.constants = constants
                ctx.set_materialize_grads(False)
            # A function's forward runs with both modes off; outer levels of torch.func need them.
            with torch.set_grad_enabled(call.grad_mode), forward_ad._set_fwd_grad_enabled(True):
                return (_redispatch if needs_b else _compute)(op, call.keyset, (a, b, *constants))

        @staticmethod
        def backward(ctx, h):
            facts = ctx.facts._replace(wanted=ctx.needs_input_grad[1:3])
            # A backward pass may run within an autocast region; gradients keep their dtypes.
            with torch.autocast(h.device.type, enabled=False):
                da, db = vjp(h, *ctx.saved_tensors, facts)
            return (None, da, db, *(None for _ in ctx.needs_input_grad[3:]))

        @staticmethod
        def jvp(ctx, _call, a_dot, b_dot, *_constants):
            a, b = ctx.saved_tensors
            from_a = None if a_dot is None else op(a_dot, b, *ctx.constants)
            from_b = None if b_dot is None else op(a, b_dot, *ctx.constants)
            if from_a is None or from_b is None:
                return from_b if from_a is None else from_a
            return from_a + from_b

    def kernel(keyset, a, b, *constants):
        constants = (*constants, *defaults[len(constants) :])
        is_dual = _has_tangent(a, b)
        if is_dual or _needs_graph(a, b):
            call = _Call(keyset, is_dual, torch.is_grad_enabled())
            with enable_single_level_autograd_function():
                return Rule.apply(call, a, b, *constants)
        return _compute(op, keyset, (a, b, *constants))

    return kernel


class _Add(_SingleLevelFunction):
    """``base + F(x, w)``; without ``op``, in the memory of ``base``, which nobody else may need."""

    @staticmethod
    def forward(ctx, op, call, base, x, w, scale):
        needs_x, needs_w = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None)
        ctx.facts = _Facts((needs_x, needs_w), (x.dtype, w.dtype), w.shape[-1], scale)
        if op is None:
            # The same memory as a tensor of its own: to autograd it is a new result.
            out = base.detach()
            return _compute_onto(out, x, w, scale, keep=not needs_w)
        if call.is_dual:
            ctx.save_for_forward(x, w)
            ctx.dtype = base.dtype
            ctx.set_materialize_grads(False)
        with torch.set_grad_enabled(call.grad_mode), forward_ad._set_fwd_grad_enabled(True):
            compute = _redispatch if needs_w else _compute
            return compute(op, call.keyset, (base, x, w, scale))

    @staticmethod
    def backward(ctx, h):
        facts = ctx.facts._replace(wanted=ctx.needs_input_grad[3:5])
        of_x, dx, dw = facts.dtypes[0], None, None
        if any(facts.wanted):
            with torch.autocast(h.device.type, enabled=False):
                # A gradient of x wider than h is not rounded to h's dtype on the way.
                g = h.to(torch.promote_types(h.dtype, of_x))
                dx, dw = _vjp_forward(g, *ctx.saved_tensors, facts)
                dx = None if dx is None else dx.to(of_x)
        return None, None, h if ctx.needs_input_grad[2] else None, dx, dw, None

    @staticmethod
    def jvp(ctx, _op, _call, base_dot, x_dot, w_dot, _scale):
        x, w = ctx.saved_tensors
        scale = ctx.facts.scale
        dots = [] if base_dot is None else [base_dot]
        dots += [] if x_dot is None else [_OPS.block_circ_conv(x_dot, w, scale).to(ctx.dtype)]
        dots += [] if w_dot is None else [_OPS.block_circ_conv(x, w_dot, scale).to(ctx.dtype)]
        return sum(dots[1:], dots[0])


def _add_autograd_rule(keyset, base, x, w, scale=1.0):
    op = _OPS.block_circ_conv_add.default
    is_dual = _has_tangent(base, x, w)
    if is_dual or _needs_graph(base, x, w):
        call = _Call(keyset, is_dual, torch.is_grad_enabled())
        with enable_single_level_autograd_function():
            return _Add.apply(op, call, base, x, w, scale)
    return _compute(op, keyset, (base, x, w, scale))


def _add_in_place_autograd_rule(keyset, base, x, w, scale=1.0):
    """Write in place, or where a graph or tangent is wanted, by autograd's own in-place copy."""
    if _needs_graph(base, x, w) or _has_tangent(base, x, w):
        base.copy_(_OPS.block_circ_conv_add(base, x, w, scale))
    else:
        _compute(_OPS.block_circ_conv_add_.default, keyset, (base, x, w, scale))


def _compute_onto(base, x, w, scale, keep):
    """Add onto ``base`` in place, below autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        if not keep or spectra.apply(x, w, scale, base=base, in_place=True) is None:
            _OPS.block_circ_conv_add_(base, x, w, scale)
    return base


def add_to_fresh(base: Tensor, x: Tensor, w: Tensor, scale: float) -> Tensor:
    """Return ``block_circ_conv_add`` in the memory of ``base``, which is given up.

    For a ``base`` that its producer does not save for its backward and nobody else refers to.
    Anything but an ordinary eager call gets a new tensor.
    """
    if not spectra.is_plain(base, x, w):
        return _OPS.block_circ_conv_add(base, x, w, scale)
    if _needs_graph(base, x, w):
        with enable_single_level_autograd_function():
            return _Add.apply(None, None, base, x, w, scale)
    return _compute_onto(base, x, w, scale, keep=True)


def _backward_autograd_rule(keyset, g, x, w, scale=1.0):
    """Share one transform of ``g``, or where a graph is wanted, differentiate the two halves."""
    if _needs_graph(g, x, w) or _has_tangent(g, x, w):
        dx = _OPS.block_circ_conv_input_grad(g, w, scale).to(x.dtype)
        return dx, _OPS.block_circ_conv_kernel_grad(g, x, w.shape[-1], w.dtype, scale)
    return _redispatch(_OPS.block_circ_conv_backward.default, keyset, (g, x, w, scale))


# vmap. A batch of one operand folds into the sizes that the other does not share: activations into
# tokens or block rows, kernels into m or n. Batches of both run one by one.


def _vmap_rule(op, fold_first, fold_second):
    """Return the vmap rule of ``op(a, b, *constants)``.

    ``fold_first(a, b, size, *constants)`` runs with ``a`` alone batched, along dimension 0, and
    returns the result with the dimension of its batch; ``fold_second`` likewise for ``b``.
    """

    def rule(info, in_dims, a, b, *constants):
        a_dim, b_dim = in_dims[:2]
        if a_dim is None and b_dim is None:
            return op(a, b, *constants), None
        if b_dim is None:
            return fold_first(a.movedim(a_dim, 0), b, info.batch_size, *constants)
        if a_dim is None:
            return fold_second(a, b.movedim(b_dim, 0), info.batch_size, *constants)
        pairs = zip(a.unbind(a_dim), b.unbind(b_dim), strict=True)
        return torch.stack([op(p, q, *constants) for p, q in pairs]), 0

    return rule


def _fold_tokens(op):
    return lambda a, w, size, *constants: (op(a, w, *constants), 0)


def _fold_forward_kernels(x, w, size, *constants):
    y = _OPS.block_circ_conv(x, w.flatten(0, 1), *constants)
    return y.unflatten(-1, (size, -1)), y.dim() - 1


def _fold_input_grad_kernels(g, w, size, *constants):
    dx = _OPS.block_circ_conv_input_grad(g, w.movedim(0, 1).flatten(1, 2), *constants)
    return dx.unflatten(-1, (size, -1)), dx.dim() - 1


def _fold_kernel_grad_outputs(g, x, size, *constants):
    dw = _OPS.block_circ_conv_kernel_grad(g.movedim(0, -2).flatten(-2), x, *constants)
    return dw.unflatten(0, (size, -1)), 0


def _fold_kernel_grad_inputs(g, x, size, *constants):
    dw = _OPS.block_circ_conv_kernel_grad(g, x.movedim(0, -2).flatten(-2), *constants)
    return dw.unflatten(1, (size, -1)), 1


def _add_vmap_rule(forward_rule):
    def rule(info, in_dims, base, x, w, scale=1.0):
        y, y_dim = forward_rule(info, in_dims[1:], x, w, scale)
        base_dim = in_dims[0]
        base = base if base_dim is None else base.movedim(base_dim, 0)
        y = y if y_dim is None else y.movedim(y_dim, 0)
        return (base + y).to(base.dtype), 0

    return rule


def _add_in_place_vmap_rule(add_rule):
    def rule(info, in_dims, base, x, w, scale=1.0):
        if in_dims[0] is None:
            raise RuntimeError(
                "c3a.block_circ_conv_add_: vmap cannot write a batch into a base that has none; "
                "use block_circ_conv_add"
            )
        result, _ = add_rule(info, in_dims, base, x, w, scale)
        base.movedim(in_dims[0], 0).copy_(result)
        return None, None

    return rule


def _backward_vmap_rule(input_grad_rule, kernel_grad_rule):
    def rule(info, in_dims, g, x, w, scale=1.0):
        g_dim, x_dim, w_dim = in_dims[:3]
        # The last dimension of one kernel, wherever the batch of kernels has its own.
        block_size = w.shape[-2 if w_dim == w.dim() - 1 else -1]
        dx, dx_dim = input_grad_rule(info, (g_dim, w_dim), g, w, scale)
        dw, dw_dim = kernel_grad_rule(info, (g_dim, x_dim), g, x, block_size, w.dtype, scale)
        return (dx.to(x.dtype), dw), (dx_dim, dw_dim)

    return rule


def _autocast_rule(device_type: str):
    """Take the inputs as they are (no copy to save), give the result autocast's dtype."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")

    def kernel(x, w, scale=1.0):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            y = _OPS.block_circ_conv(x, w, scale)
            return y if y.dtype == torch.float64 else y.to(torch.get_autocast_dtype(device_type))

    return kernel


def _register() -> None:
    forward = _OPS.block_circ_conv.default
    input_grad = _OPS.block_circ_conv_input_grad.default
    kernel_grad = _OPS.block_circ_conv_kernel_grad.default
    backward = _OPS.block_circ_conv_backward.default
    add = _OPS.block_circ_conv_add.default
    add_ = _OPS.block_circ_conv_add_.default
    vmaps = {
        forward: _vmap_rule(forward, _fold_tokens(forward), _fold_forward_kernels),
        input_grad: _vmap_rule(input_grad, _fold_tokens(input_grad), _fold_input_grad_kernels),
        kernel_grad: _vmap_rule(kernel_grad, _fold_kernel_grad_outputs, _fold_kernel_grad_inputs),
    }
    vmaps[add] = _add_vmap_rule(vmaps[forward])
    vmaps[add_] = _add_in_place_vmap_rule(vmaps[add])
    vmaps[backward] = _backward_vmap_rule(vmaps[input_grad], vmaps[kernel_grad])
    autograds = {
        forward: _autograd_rule(forward, _vjp_forward, (1.0,)),
        input_grad: _autograd_rule(input_grad, _vjp_input_grad, (1.0,)),
        kernel_grad: _autograd_rule(kernel_grad, _vjp_kernel_grad, (None, None, 1.0)),
        backward: _backward_autograd_rule,
        add: _add_autograd_rule,
        add_: _add_in_place_autograd_rule,
    }
    fakes = {
        forward: _fake_forward,
        input_grad: _fake_input_grad,
        kernel_grad: _fake_kernel_grad,
        backward: _fake_backward,
        add: _fake_add,
        add_: _fake_add_,
    }
    for op in fakes:
        torch.library.register_fake(op.name(), fakes[op], lib=_LIBRARY)
        torch.library.register_vmap(op.name(), vmaps[op], lib=_LIBRARY)
        _LIBRARY.impl(op.name(), autograds[op], "Autograd", with_keyset=True)
    # The gradients have no autocast rule: they fall through and keep the dtypes they are given.
    for device_type in ("cpu", "cuda"):
        key = f"Autocast{device_type.upper()}"
        _LIBRARY.impl("block_circ_conv", _autocast_rule(device_type), key)


_BY_SPECTRA = {
    _OPS.block_circ_conv.default: spectra.apply,
    _OPS.block_circ_conv_input_grad.default: partial(spectra.apply, transposed=True),
    _OPS.block_circ_conv_add.default: lambda base, *args: spectra.apply(*args, base=base),
    _OPS.block_circ_conv_add_.default: lambda base, *args: spectra.apply(
        *args, base=base, in_place=True
    ),
}

_register()
