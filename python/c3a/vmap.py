"""vmap: a batch of one operand folds into the sizes that the other does not share.

Activations fold into tokens or block rows, kernels into m or n. Where both are batches, they are
rows and a stack of kernels for one call of the operators that take these, and so are batches of
those operators themselves.
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


def folded(op: Overload, fold_first: Rule, fold_second: Rule, fold_both: Rule) -> Rule:
    """Return the rule of ``op(a, b, *constants)``.

    ``fold_first(a, b, size, *constants)`` runs with ``a`` alone batched, along dimension 0, and
    returns the result with the dimension of its batch; ``fold_second`` likewise for ``b``, and
    ``fold_both`` for both.
    """

    def rule(info: Info, in_dims: Dims, a: Tensor, b: Tensor, *constants: Any) -> Result:
        a_dim, b_dim = in_dims[:2]
        if a_dim is None:
            if b_dim is None:
                return op(a, b, *constants), None
            return fold_second(a, b.movedim(b_dim, 0), info.batch_size, *constants)
        if b_dim is None:
            return fold_first(a.movedim(a_dim, 0), b, info.batch_size, *constants)
        return fold_both(a.movedim(a_dim, 0), b.movedim(b_dim, 0), info.batch_size, *constants)

    return rule


def rows_of(many: Overload) -> Rule:
    """Fold both batches of an operator into rows, each with a kernel of its own."""

    def rule(a: Tensor, w: Tensor, size: int, *constants: Any) -> Result:
        return many(a, w, torch.arange(size, device=a.device), *constants), 0

    return rule


def rows_of_kernel_grad(
    g: Tensor, x: Tensor, size: int, block_size: int, *constants: Any
) -> Result:
    many = _OPS.block_circ_conv_many_kernel_grad
    return many(g, x, torch.arange(size, device=g.device), size, block_size, *constants), 0


def _batch_of(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _joined(index: Tensor, dim: int | None, size: int, adapters: int) -> Tensor:
    """Return the index of all rows into as many stacks of kernels, joined to one."""
    index = _batch_of(index, dim, size)
    first = adapters * torch.arange(size, device=index.device).unsqueeze(-1)
    return torch.where(index < 0, index, index + first).flatten()


def more_rows(op: Overload) -> Rule:
    """Return the rule of ``op(a, w, index, *constants)``: every batch becomes more rows.

    Of prepared kernels the last constant is a stack too.
    """

    def rule(info: Info, in_dims: Dims, a: Tensor, w: Tensor, *rest: Any) -> Result:
        index, *constants = rest
        size, (a_dim, w_dim, index_dim, *other_dims) = info.batch_size, in_dims
        dims = (w_dim, *other_dims)
        if index_dim is None and all(dim is None for dim in dims):
            if a_dim is None:
                return op(a, w, index, *constants), None
            return op(a.movedim(a_dim, 1), w, index, *constants), 1
        adapters, stacks = 0, [w, *constants]
        if any(dim is not None for dim in dims):
            adapters = w.shape[0] if w_dim is None else w.movedim(w_dim, 0).shape[1]
            stacks = [
                _batch_of(t, dim, size).flatten(0, 1) if isinstance(t, Tensor) else t
                for t, dim in zip(stacks, dims, strict=True)
            ]
        rows = _batch_of(a, a_dim, size)
        index = _joined(index, index_dim, size, adapters)
        y: Tensor = op(rows.flatten(0, 1), stacks[0], index, *stacks[1:])
        return y.unflatten(0, (size, rows.shape[1])), 0

    return rule


def more_rows_of_kernel_grad(
    info: Info, in_dims: Dims, g: Tensor, x: Tensor, index: Tensor, adapters: int, *rest: Any
) -> Result:
    size = info.batch_size
    rows, of_x = _batch_of(g, in_dims[0], size), _batch_of(x, in_dims[1], size)
    index = _joined(index, in_dims[2], size, adapters)
    many = _OPS.block_circ_conv_many_kernel_grad
    dw = many(rows.flatten(0, 1), of_x.flatten(0, 1), index, size * adapters, *rest)
    return dw.unflatten(0, (size, adapters)), 0


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


def prepared(op: Overload, many: Overload) -> Rule:
    """Return the rule of a product with a prepared kernel: tokens, or rows with kernels."""

    def rule(
        info: Info,
        in_dims: Dims,
        x: Tensor,
        w_hat: Tensor,
        block_size: int,
        w_hat_transposed: Tensor | None = None,
    ) -> Result:
        x_dim, w_dim, _, *t_dim = in_dims
        if w_dim is None and t_dim in ([], [None]):
            if x_dim is None:
                return op(x, w_hat, block_size, w_hat_transposed), None
            return op(x.movedim(x_dim, 0), w_hat, block_size, w_hat_transposed), 0
        size = info.batch_size
        if w_hat_transposed is not None:
            w_hat_transposed = _batch_of(w_hat_transposed, t_dim[0], size)
        w_hat, index = _batch_of(w_hat, w_dim, size), torch.arange(size, device=x.device)
        return many(_batch_of(x, x_dim, size), w_hat, index, block_size, w_hat_transposed), 0

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
