"""A base layer plus the shares of its adapters: what ``C3ALinear`` and PEFT's layers compute."""

import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from . import _private, autograd, shapes
from .ops import (
    block_circ_conv,
    block_circ_conv_add,
    block_circ_conv_linear,
    block_circ_conv_prepared,
    block_circ_conv_prepared_add,
)
from .prepared import PreparedKernel, PreparedStack

_Prepared = tuple[Tensor, int, Tensor | None]


class Share(NamedTuple):
    """One adapter of a layer: ``scale * block_circ_conv(x, kernel)``."""

    kernel: Tensor
    scale: float
    prepared: PreparedKernel | None  # where its prepared kernel is held
    pad: tuple[int, int] = (0, 0)  # zeros that the input is given, numbers that the output loses


def forward(
    base: nn.Module,
    x: Tensor,
    shares: Sequence[Share],
    dropout: float = 0.0,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return ``base(x, *args, **kwargs)`` plus every share of ``x``, in the base's dtype.

    The first share and a frozen ``nn.Linear`` are one node of the graph, or one operator to a
    compiler. The others, and the first onto any other base, are added in place where nobody else
    has the sum so far. ``dropout`` is the probability with which what the shares see, and not what
    the base does, is zeroed now.
    """
    y: Tensor | None = None
    if shares and not (dropout or args or kwargs):
        kernel, scale, held, pad = shares[0]
        if traced := _traced_linear(base, x, pad):
            y = block_circ_conv_linear(x, *traced, kernel, scale)
        elif frozen := _frozen_linear(base, x, kernel, pad):
            prepared = _prepared(kernel, scale, held, x, frozen[0].dtype)
            if prepared:
                y = autograd.add_to_linear(autograd.PREPARED, *frozen, x, *prepared)
            else:
                y = autograd.add_to_linear(autograd.FORWARD, *frozen, x, kernel, scale)
    if y is not None:
        if len(shares) == 1:
            return y
        shares = shares[1:]
    else:
        y = base(x, *args, **(kwargs or {}))
        if shares and x.requires_grad and torch.is_grad_enabled() and _private.is_plain(y, x):
            _look_for_a_cut_graph(base, x, y)
    if dropout:
        x = F.dropout(x, dropout)
    for kernel, scale, held, (more_in, more_out) in shares:
        is_plain = _private.is_plain(y, x, kernel)
        seen = F.pad(x, (0, more_in)) if more_in else x
        prepared = _prepared(kernel, scale, held, seen, y.dtype) if is_plain else None
        if more_out:
            if prepared:
                delta = block_circ_conv_prepared(seen, *prepared)
            else:
                delta = block_circ_conv(seen, kernel, scale)
            y = y + delta[..., : y.shape[-1]].to(y.dtype)
        elif is_plain and _private.is_sole_owner(y):
            if prepared:
                y = autograd.add_into(autograd.PREPARED, y, seen, *prepared)
            else:
                y = autograd.add_into(autograd.FORWARD, y, seen, kernel, scale)
        elif prepared:
            y = block_circ_conv_prepared_add(y, seen, *prepared)
        else:
            y = block_circ_conv_add(y, seen, kernel, scale)
    return y


class Rows(NamedTuple):
    """Adapters of one shape, stacked, of which each row takes one or none."""

    product: autograd.Product  # of many kernels
    # of the product, after its input: kernels, plain or prepared, the rows' index, ...
    operands: tuple[Any, ...]
    pad: tuple[int, int] = (0, 0)  # as of a share


def forward_rows(
    base: nn.Module,
    x: Tensor,
    choose: Callable[[Tensor, torch.dtype], Sequence[Rows]],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return ``base(x, *args, **kwargs)`` plus, for each row of ``x``, its adapter's share.

    ``choose`` is given ``x`` and the base's dtype, which is the result's.
    """
    y: Tensor = base(x, *args, **(kwargs or {}))
    for product, operands, (more_in, more_out) in choose(x, y.dtype):
        seen = F.pad(x, (0, more_in)) if more_in else x
        if more_out or not _private.is_plain(y, x, operands[0]):
            delta = product.op(shapes.widened(seen, y.dtype), *operands)
            y = (y + delta[..., : y.shape[-1]]).to(y.dtype)
        else:
            if not _private.is_sole_owner(y):
                y = y.clone(memory_format=torch.contiguous_format)
            y = autograd.add_into(product, y, seen, *operands)
    return y


def forward_by_row(
    base: nn.Module,
    x: Tensor,
    shares: Mapping[str, Share],
    names: Sequence[str],
    stacks: MutableMapping[Hashable, PreparedStack],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return ``base(x, *args, **kwargs)`` plus, for each row of ``x``, the share of its name.

    Rows whose name has no share get the base alone. A call for each shape of kernels; ``stacks``
    holds what is prepared for it.
    """

    def choose(x: Tensor, of_y: torch.dtype) -> list[Rows]:
        groups: dict[Hashable, dict[str, Share]] = {}
        for name, share in shares.items():
            w = share.kernel
            groups.setdefault((w.shape, w.dtype, w.device, share.scale), {})[name] = share
        return [_rows_of(x, of_y, some, names, stacks, kind) for kind, some in groups.items()]

    return forward_rows(base, x, choose, args, kwargs)


def _rows_of(
    x: Tensor,
    of_y: torch.dtype,
    shares: Mapping[str, Share],
    names: Sequence[str],
    stacks: MutableMapping[Hashable, PreparedStack],
    kind: Hashable,
) -> Rows:
    """Return the rows of adapters of one kind, with prepared kernels where no gradient is lost."""
    kernels = {name: share.kernel for name, share in shares.items()}
    scale = next(iter(shares.values())).scale
    grad = torch.is_grad_enabled()
    found = None
    if _private.is_plain(x, *kernels.values()) and not (
        grad and any(w.requires_grad for w in kernels.values())
    ):
        stack = stacks.setdefault(kind, PreparedStack())
        found = stack.get(kernels, scale, (x.dtype, of_y), transposed=grad and x.requires_grad)
    slots = found[2] if found else {name: slot for slot, name in enumerate(kernels)}
    index = torch.tensor([slots.get(name, -1) for name in names])
    if found is None:
        return Rows(autograd.MANY, (torch.stack(list(kernels.values())), index, scale))
    w_hat, w_hat_transposed, _ = found
    block_size = next(iter(kernels.values())).shape[-1]
    return Rows(autograd.MANY_PREPARED, (w_hat, index, block_size, w_hat_transposed))


def _frozen_linear(
    base: nn.Module, x: Tensor, kernel: Tensor, pad: tuple[int, int]
) -> tuple[Tensor, Tensor | None] | None:
    """Return the base layer's weight and bias where it and the adapter can be one node.

    In the dtype in which the base layer computes: its own, or autocast's.
    """
    if (
        not torch.is_grad_enabled()
        or not _private.is_ordinary(x, kernel)
        or not (kernel.requires_grad or x.requires_grad)
        or pad != (0, 0)
    ):
        return None
    frozen = _private.frozen_linear(base)
    # A prepared kernel has no tangent.
    if frozen is None or (not kernel.requires_grad and _private.has_tangent(kernel)):
        return None
    if not _private.any_autocast_enabled():
        return frozen if frozen[0].dtype == x.dtype else None
    weight, bias = frozen
    device = x.device.type
    if (
        not autograd.autocasts(device)
        or torch.float64 in (x.dtype, weight.dtype)
        or _private.has_tangent(x, kernel, *(t for t in frozen if t is not None))
    ):
        return None
    dtype = torch.get_autocast_dtype(device)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _traced_linear(
    base: nn.Module, x: Tensor, pad: tuple[int, int]
) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias where a compiler is given base and adapter as one operator.

    Not in ``torch.export``, whose graphs are for others to read.
    """
    if not torch.compiler.is_compiling() or _private.is_exporting() or pad != (0, 0):
        return None
    frozen = _private.frozen_linear(base)
    if frozen and (frozen[0].dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
        return frozen
    return None


def _prepared(
    kernel: Tensor, scale: float, held: PreparedKernel | None, x: Tensor, of_y: torch.dtype
) -> _Prepared | None:
    """Return ``(w_hat, block_size, w_hat_transposed)`` for a plain call, or None."""
    grad = torch.is_grad_enabled()
    if held is None or (grad and kernel.requires_grad):
        return None
    found = held.get(kernel, scale, (x.dtype, of_y), transposed=grad and x.requires_grad)
    return found and (found[0], kernel.shape[-1], found[1])


# Bases through which no gradient passes

_LOOKED_AT: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # which is done once for each
_CUTTING: set[str] = set()  # the kinds that were told of


def _look_for_a_cut_graph(base: nn.Module, x: Tensor, y: Tensor) -> None:
    """Say once for each kind of base layer that gradients do not pass through it."""
    if base in _LOOKED_AT:
        return
    _LOOKED_AT.add(base)
    if _passes_gradients(x, y):
        return
    # Some ways of quantising keep the layer's class and change that of its weight.
    weight = getattr(base, "weight", None)
    kind = f"{type(base).__name__} with a weight of type {type(weight).__name__}"
    if kind in _CUTTING:
        return
    _CUTTING.add(kind)
    warnings.warn(
        f"c3a: gradients do not pass through a base layer of type {kind}, as with "
        "dynamically quantised layers: no path of the graph leads from its result to its input. "
        "What lies below gets the adapter's share of the gradient only, which is wrong by the base "
        "layer's. Train with a base layer that differentiates (weight-only quantisation does), or "
        "adapt no layer below this one.",
        stacklevel=4,
    )


def _passes_gradients(x: Tensor, y: Tensor) -> bool:
    """Return whether the graph leads from ``y`` to ``x`` by nodes that have a derivative."""
    if not y.requires_grad:
        return False
    goal = torch.autograd.graph.get_gradient_edge(x).node
    nodes: list[Node | None] = [torch.autograd.graph.get_gradient_edge(y).node]
    seen: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node is goal:
            return True
        if node is not None and node not in seen and not node.name().endswith("NotImplemented"):
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return False


# Their weights


def kernel_device(base: nn.Module) -> torch.device | None:
    """Return where a layer computes: for one that accelerate has offloaded, where it is taken."""
    device = next((t.device for t in [*base.parameters(), *base.buffers()]), None)
    if device is not None and device.type == "meta":
        hook = getattr(base, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            place = getattr(part, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return device


def moved(weight: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """Return a parameter that no module has, moved or converted as a module's are."""
    holder: Any = nn.Module()
    holder.weight = weight
    holder._apply(fn)
    found: nn.Parameter = holder.weight
    return found
