"""vmap: a batch of one operand folds into the sizes that the other does not share.

Activations fold into tokens or block rows, kernels into m or n. Batches of both run one by one.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ._library import OPS as _OPS
from ._private import Overload
from .shapes import widened


class Info(Protocol):
    """What torch tells a rule of the batch."""

    @property
    def batch_size(self) -> int: ...


Dims = tuple[int | None, ...]
Result = tuple[Tensor, int | None]  # with the dimension of its batch
Rule = Callable[..., Result]


def one_by_one(op: Overload) -> Rule:
    """Return the rule that calls ``op`` for each entry of a batch."""

    def rule(info: Info, in_dims: Dims, *args: Any) -> Result:
        batches = [
            [t] * info.batch_size if dim is None else t.unbind(dim)
            for t, dim in zip(args, in_dims, strict=True)
        ]
        return torch.stack([op(*entry) for entry in zip(*batches, strict=True)]), 0

    return rule


def folded(op: Overload, fold_first: Rule, fold_second: Rule) -> Rule:
    """Return the rule of ``op(a, b, *constants)``.

    ``fold_first(a, b, size, *constants)`` runs with ``a`` alone batched, along dimension 0, and
    returns the result with the dimension of its batch; ``fold_second`` likewise for ``b``.
    """

    def rule(info: Info, in_dims: Dims, a: Tensor, b: Tensor, *constants: Any) -> Result:
        a_dim, b_dim = in_dims[:2]
        if a_dim is None:
            if b_dim is None:
                return op(a, b, *constants), None
            return fold_second(a, b.movedim(b_dim, 0), info.batch_size, *constants)
        if b_dim is None:
            return fold_first(a.movedim(a_dim, 0), b, info.batch_size, *constants)
        return one_by_one(op)(info, in_dims, a, b, *constants)

    return rule


def tokens_of(op: Overload) -> Rule:
    return lambda a, w, size, *constants: (op(a, w, *constants), 0)


def kernels_of_forward(x: Tensor, w: Tensor, size: int, *constants: Any) -> Result:
    y = _OPS.block_circ_conv(x, w.flatten(0, 1), *constants)
    return y.unflatten(-1, (size, -1)), y.dim() - 1


def kernels_of_input_grad(g: Tensor, w: Tensor, size: int, *constants: Any) -> Result:
    dx = _OPS.block_circ_conv_input_grad(g, w.movedim(0, 1).flatten(1, 2), *constants)
    return dx.unflatten(-1, (size, -1)), dx.dim() - 1


def outputs_of_kernel_grad(g: Tensor, x: Tensor, size: int, *constants: Any) -> Result:
    dw = _OPS.block_circ_conv_kernel_grad(g.movedim(0, -2).flatten(-2), x, *constants)
    return dw.unflatten(0, (size, -1)), 0


def inputs_of_kernel_grad(g: Tensor, x: Tensor, size: int, *constants: Any) -> Result:
    dw = _OPS.block_circ_conv_kernel_grad(g, x.movedim(0, -2).flatten(-2), *constants)
    return dw.unflatten(1, (size, -1)), 1


def prepared(op: Overload) -> Rule:
    """Return the rule of a product with a prepared kernel: batches of activations are tokens."""

    def rule(info: Info, in_dims: Dims, x: Tensor, *rest: Any) -> Result:
        if any(dim is not None for dim in in_dims[1:]):
            return one_by_one(op)(info, in_dims, x, *rest)
        if in_dims[0] is None:
            return op(x, *rest), None
        return op(x.movedim(in_dims[0], 0), *rest), 0

    return rule


def stacked(op: Overload) -> Rule:
    """Return the rule of an operator that takes stacks in its leading dimensions."""

    def rule(info: Info, in_dims: tuple[int, None], w: Tensor, *constants: Any) -> Result:
        return op(w.movedim(in_dims[0], 0), *constants), 0

    return rule


def summed(product_rule: Rule) -> Rule:
    """Return the rule of ``base`` plus a product."""

    def rule(info: Info, in_dims: Dims, base: Tensor, *args: Any) -> Result:
        x, *rest = args
        # The product is not rounded below the sum's dtype on the way.
        y, y_dim = product_rule(info, in_dims[1:], widened(x, base.dtype), *rest)
        base = base if in_dims[0] is None else base.movedim(in_dims[0], 0)
        y = y if y_dim is None else y.movedim(y_dim, 0)
        return (base + y).to(base.dtype), 0

    return rule


def decomposed(function: Callable[..., Tensor]) -> Rule:
    """Return the rule of an operator that a function of others is equal to."""

    def rule(info: Info, in_dims: Dims, *args: Any) -> Result:
        return torch.vmap(function, in_dims)(*args), 0

    return rule


def _batched(name: str, what: str, dim: int | None, functional: str) -> int:
    if dim is None:
        raise RuntimeError(
            f"c3a.{name}: vmap cannot write a batch into a {what} that has none; use {functional}"
        )
    return dim


def in_place(name: str, sum_rule: Rule) -> Callable[..., tuple[None, None]]:
    def rule(info: Info, in_dims: Dims, base: Tensor, *args: Any) -> tuple[None, None]:
        dim = _batched(name, "base", in_dims[0], name.removesuffix("_"))
        result, _ = sum_rule(info, in_dims, base, *args)
        base.movedim(dim, 0).copy_(result)
        return None, None

    return rule


PairRule = Callable[..., tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]]


def pair(input_grad_rule: Rule, kernel_grad_rule: Rule) -> PairRule:
    def rule(
        info: Info, in_dims: Dims, g: Tensor, x: Tensor, w: Tensor, scale: float = 1.0
    ) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
        g_dim, x_dim, w_dim = in_dims[:3]
        # The last dimension of one kernel, wherever the batch of kernels has its own.
        block_size = w.shape[-2 if w_dim == w.dim() - 1 else -1]
        of_both: Dims = (g_dim, w_dim, None)
        dx, dx_dim = input_grad_rule(info, of_both, widened(g, x.dtype), w, scale)
        of_both = (g_dim, x_dim, None, None, None)
        dw, dw_dim = kernel_grad_rule(info, of_both, g, x, block_size, w.dtype, scale)
        return (dx.to(x.dtype), dw), (dx_dim, dw_dim)

    return rule


def pair_in_place(name: str, pair_rule: PairRule) -> Rule:
    def rule(info: Info, in_dims: Dims, dx: Tensor, g: Tensor, x: Tensor, *rest: Any) -> Result:
        dim = _batched(name, "grad_input", in_dims[0], "block_circ_conv_backward")
        # Not rounded below the dtype of what it is added onto on the way.
        x = widened(x, dx.dtype)
        (more, dw), (more_dim, dw_dim) = pair_rule(info, in_dims[1:], g, x, *rest)
        dx = dx.movedim(dim, 0)
        dx.copy_(dx + (more if more_dim is None else more.movedim(more_dim, 0)))
        return dw, dw_dim

    return rule
