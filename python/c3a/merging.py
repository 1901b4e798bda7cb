"""Adding an adapter's matrix to a base layer's weight: in a new parameter, dense or quantised."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .quantised import scheme_of
from .reference import circulant
from .shapes import SUPPORTED_DTYPES
from .sizes import is_transposed, linear_features


def weight_shape(base: nn.Module) -> tuple[int, int]:
    """Return the shape that a dense weight of a layer has."""
    in_features, out_features = linear_features(base)
    return (in_features, out_features) if is_transposed(base) else (out_features, in_features)


def is_dense(base: nn.Module, weight: Tensor) -> bool:
    """Return whether a weight holds the matrix itself, rather than what stands for it."""
    return (
        weight.dtype in SUPPORTED_DTYPES
        and tuple(weight.shape) == weight_shape(base)
        and not hasattr(type(weight), "__tensor_flatten__")
        # Asked first, since a compiler cannot follow the other question.
        and (type(weight) is nn.Parameter or scheme_of(weight) is None)
    )


def check(base: nn.Module, *kernels: Tensor) -> None:
    """Raise TypeError unless an adapter can be merged into a layer's weight.

    ValueError where the weight or a kernel is on the meta device, without values.
    """
    weight = getattr(base, "weight", None)
    is_known = isinstance(weight, nn.Parameter) and (
        scheme_of(weight) is not None or is_dense(base, weight)
    )
    if not is_known:
        got = type(weight).__name__
        if isinstance(weight, Tensor):
            got += f" of {weight.dtype} and shape {tuple(weight.shape)}"
        raise TypeError(
            f"c3a: cannot merge into a {type(base).__name__}: expected a dense floating-point "
            f"weight of shape {weight_shape(base)}, got a {got}, which c3a cannot quantise anew; "
            "leave the adapter unmerged, or dequantise the layer first"
        )
    assert isinstance(weight, nn.Parameter)
    if weight.is_meta or any(kernel.is_meta for kernel in kernels):
        what = "weight" if weight.is_meta else "kernel"
        raise ValueError(
            f"c3a: cannot merge: the {what} is on the meta device, where nothing has values; "
            "merge before accelerate offloads the model, or load the whole model"
        )


def delta(kernel: Tensor, scale: float) -> Tensor:
    """Return ``scale * circulant(kernel)``, ``(out, in)``, in float32 at least."""
    return circulant(kernel.to(torch.promote_types(kernel.dtype, torch.float32))) * scale


def laid_out(base: nn.Module, matrix: Tensor) -> Tensor:
    """Return a matrix ``(out, in)`` in the layout of a layer's dense weight."""
    return matrix.T if is_transposed(base) else matrix


def dense_sum(base: nn.Module, weight: Tensor, delta: Tensor) -> Tensor:
    """Return a dense weight plus a matrix ``(out, in)``, in the weight's dtype and layout.

    The sum is computed in float32 at least and rounded once.
    """
    delta = laid_out(base, delta.to(weight.device))
    total = delta.to(torch.promote_types(delta.dtype, weight.dtype)).add_(weight)
    return torch.empty_like(weight).copy_(total)


@torch.no_grad()
def merged(
    base: nn.Module,
    delta: Tensor,
    complaint: Callable[[Tensor, Tensor], str | None],
    weight: nn.Parameter | None = None,
) -> nn.Parameter:
    """Return a base layer's weight plus a matrix ``(out, in)``, of a layer that passed ``check``.

    ``weight`` takes the place of the weight that the layer has now.

    ``complaint`` is given the sum and the weight as it was, both dense, and returns why it may not
    be, which is raised as ValueError, or None. A quantised weight is dequantised, and the sum
    quantised in the same way; a warning says what that loses.
    """
    if weight is None:
        weight = cast(nn.Parameter, base.weight)
    scheme = scheme_of(weight)
    was: Tensor = scheme.dequantise(base, weight) if scheme else weight
    total = was + delta.to(was.device, was.dtype) if scheme else dense_sum(base, was, delta)
    if problem := complaint(total, was):
        raise ValueError(problem)
    if scheme is None:
        return nn.Parameter(total, requires_grad=weight.requires_grad)
    quantised = scheme.quantise(weight, total)
    found = (
        quantised
        if isinstance(quantised, nn.Parameter)
        else nn.Parameter(quantised, requires_grad=False)
    )
    _report(base, found, scheme.dequantise(base, found) - total, delta)
    return found


def _report(base: nn.Module, weight: Tensor, lost: Tensor, delta: Tensor) -> None:
    size = delta.float().norm().item()
    if size:
        warnings.warn(
            f"c3a: merging into a {type(base).__name__} quantised the sum anew, as "
            f"{type(weight).__name__}: the weight now errs by {lost.norm().item() / size:.2g} of "
            "the adapter's own norm",
            stacklevel=5,
        )


def exchange(base: nn.Module, weight: nn.Parameter) -> nn.Parameter:
    """Give a layer another weight, with what belongs to it, and return the one that it had."""
    layer: Any = base
    former: nn.Parameter = layer.weight
    if scheme := scheme_of(former):
        scheme.leave(base, former)
    layer.weight = weight
    if scheme := scheme_of(weight):
        scheme.enter(base, weight)
    return former
