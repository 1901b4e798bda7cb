"""Sharding rules of the operators, for DTensor; and what the package does with sharded tensors.

A product is made in parts in three ways (DESIGN.md, "Sharded"): each process has some of the
tokens, some of the output blocks (rows of blocks of the kernel), or some of the input blocks
(columns), of which last the results are to be summed. What an operator takes and returns are parts
of one product, so its rule says which part each of them is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._library import OPS as _OPS
from ._private import Overload
from .imports import on_import
from .shapes import widened

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

_DTENSOR = "torch.distributed.tensor"

# Whole in each process, a summand, sharded on a dimension of the tokens, on the first one where the
# tokens' first one is, on the last, or on a numbered one.
_Place = Literal["whole", "summand", "tokens", "rows", "last", 0, 1, 2]


class _Part(NamedTuple):
    """Where a tensor is when tokens, output blocks or input blocks are divided."""

    tokens: _Place
    outputs: _Place
    inputs: _Place


_X = _Part("tokens", "whole", "last")
_DX = _Part("tokens", "summand", "last")
_Y = _Part("tokens", "last", "summand")
_G = _Part("tokens", "last", "whole")
_W = _Part("whole", 0, 1)  # also a linear layer's weight
_DW = _Part("summand", 0, 1)
_BIAS = _Part("whole", 0, "summand")
_PREPARED = _Part("whole", "whole", "whole")
_STACK = _Part("whole", 1, 2)
_STACK_GRAD = _Part("summand", 1, 2)
_INDEX = _Part("rows", "whole", "whole")


@dataclass(frozen=True)
class Parts:
    """Which part of a product each result and operand is; None stands for no tensor."""

    results: tuple[_Part, ...]
    operands: tuple[_Part | None, ...]
    blocks: Callable[..., Sequence[int]]  # from the arguments: how many output and input blocks

    def __call__(self, *args: Any) -> list[tuple[list[Any], list[Any]]]:
        """Return the choices of placements on one dimension of a mesh, as torch asks for them.

        Blocks are divided where every process gets equally many. Otherwise the features, which are
        divided evenly, would not be those of the blocks.
        """
        x = args[0]
        last = len(x.shape) - 1
        choices = [self._placed(None, last, args)]
        choices += [self._placed("tokens", dimension, args) for dimension in range(last)]
        for way, count in zip(("outputs", "inputs"), self.blocks(*args), strict=True):
            if count % x.mesh.size() == 0:
                choices.append(self._placed(way, last, args))
        return choices

    def _placed(
        self, way: str | None, dimension: int, args: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        def place(part: _Part) -> "Placement":
            return _placement("whole" if way is None else getattr(part, way), dimension)

        operands = [
            None if part is None or arg is None else place(part)
            for part, arg in zip(self.operands, args, strict=False)
        ]
        return [place(part) for part in self.results], operands


def _placement(place: _Place, dimension: int) -> "Placement":
    from torch.distributed.tensor import Partial, Replicate, Shard

    if place == "whole" or (place == "rows" and dimension > 0):
        return Replicate()
    if place == "rows":
        return Shard(0)
    if place == "summand":
        return Partial()
    return Shard(dimension if isinstance(place, str) else place)


def _of_kernel(place: int) -> Callable[..., Sequence[int]]:
    return lambda *args: args[place].shape[-3:-1]


def _indivisible(*_: object) -> Sequence[int]:
    return 1, 1


def _of_activations(place: int) -> Callable[..., Sequence[int]]:
    """Return the blocks of two activations; the argument at ``place`` is the block size."""
    return lambda g, x, *args: (g.shape[-1] // args[place - 2], x.shape[-1] // args[place - 2])


FORWARD = Parts((_Y,), (_X, _W), _of_kernel(1))
ADD = Parts((_Y,), (_Y, _X, _W), _of_kernel(2))
ADD_ = Parts((), (_Y, _X, _W), _of_kernel(2))
LINEAR = Parts((_Y,), (_X, _W, _BIAS, _W), _of_kernel(3))
INPUT_GRAD = Parts((_DX,), (_G, _W), _of_kernel(1))
KERNEL_GRAD = Parts((_DW,), (_G, _X), _of_activations(2))
BACKWARD = Parts((_DX, _DW), (_G, _X, _W), _of_kernel(2))
PREPARED = Parts((_Y,), (_X, _PREPARED, None, _PREPARED), _indivisible)
PREPARED_ADD = Parts((_Y,), (_Y, _X, _PREPARED, None, _PREPARED), _indivisible)
PREPARED_ADD_ = Parts((), (_Y, _X, _PREPARED, None, _PREPARED), _indivisible)
MANY = Parts((_Y,), (_X, _STACK, _INDEX), _of_kernel(1))
MANY_ADD_ = Parts((), (_Y, _X, _STACK, _INDEX), _of_kernel(2))
MANY_INPUT_GRAD = Parts((_DX,), (_G, _STACK, _INDEX), _of_kernel(1))
MANY_KERNEL_GRAD = Parts((_STACK_GRAD,), (_G, _X, _INDEX), _of_activations(4))
MANY_PREPARED = Parts((_Y,), (_X, _PREPARED, _INDEX, None, _PREPARED), _indivisible)
MANY_PREPARED_ADD_ = Parts((), (_Y, _X, _PREPARED, _INDEX, None, _PREPARED), _indivisible)


def backward_add_(dx: Any, g: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """Add in a step of its own: DTensor takes an operator in place to return what it writes."""
    from torch.distributed.tensor import Replicate

    more, dw = _OPS.block_circ_conv_backward(g, widened(x, dx.dtype), w, scale)
    if more.placements != dx.placements:  # there is no way from a part to a summand but the whole
        places = [Replicate() if place.is_partial() else place for place in dx.placements]
        more = more.redistribute(placements=places)
    dx.add_(more)
    return dw  # type: ignore[no-any-return]


def prepare(w: Any, *args: Any) -> Tensor:
    """Gather the kernels, for what is prepared cannot be divided."""
    from torch.distributed.tensor import DTensor, Replicate

    whole = w.redistribute(placements=[Replicate()] * w.device_mesh.ndim)
    w_hat = _OPS.prepare(whole.to_local(), *args)
    return DTensor.from_local(w_hat, whole.device_mesh, whole.placements, run_check=False)


Rule = Parts | Callable[..., Tensor]


def register(rules: Mapping[Overload, Rule], library: torch.library.Library) -> None:
    """Give DTensor the rules when it is imported; ``library`` is that of the operators."""

    def give(dtensor: ModuleType) -> None:
        from torch.distributed.tensor.experimental import register_sharding

        for op, rule in rules.items():
            if isinstance(rule, Parts):
                register_sharding(op)(rule)  # type: ignore[arg-type]  # ours have types of their own
            else:
                torch.library.register_torch_dispatch(
                    op.name(), dtensor.DTensor, _without_class(rule), lib=library
                )

    on_import(_DTENSOR, give)


def _without_class(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dispatch(
        _cls: type, _func: Overload, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        return rule(*args, **(kwargs or {}))

    return dispatch
