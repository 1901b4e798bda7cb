"""The weight of an adapted layer, for code that reads it instead of calling the layer.

Much code reads a layer's ``weight``: most of it for the dtype or the device, at every call, which
must not add anything up; some of it to compute with, which must not leave the adapter out.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from . import _private

_T = TypeVar("_T", bound="AdaptedWeight")


class _Layer(Protocol):
    """What is asked of a ``C3ALinear``."""

    scale: float

    @property
    def base_layer(self) -> Any: ...  # with a weight

    @property
    def c3a_kernel(self) -> Tensor: ...

    def add_delta(self, weight: Tensor, kernel: Tensor) -> Tensor: ...


class AdaptedWeight(Tensor):
    """``base_layer.weight + scale * circulant(c3a_kernel)``, added up anew by every computation.

    Its dtype, device and shape are the base weight's, and need no sum; nor do views of it. It is a
    value, as the result of an addition is: writing to it, or computing with it after the layer has
    changed, raises RuntimeError.
    """

    _sum: Callable[[], Tensor]
    _addends: tuple[Tensor, ...]  # the base weight and the kernel; of a view none

    @staticmethod
    def __new__(
        cls: type[_T],
        like: Tensor,
        device: torch.device,
        sum: Callable[[], Tensor],
        addends: tuple[Tensor, ...] = (),
    ) -> _T:
        self = _private.tensor_without_memory(cls, like, device)
        self._sum, self._addends = sum, addends
        return self

    __torch_function__: ClassVar[Callable[..., Any]] = _private.no_torch_function

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a plain function
        cls,
        func: _private.Overload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        schema = _private.schema(func)
        for place, argument in enumerate(schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            given = given if isinstance(given, list | tuple) else [given]
            if argument.is_write and any(isinstance(t, cls) for t in given):
                raise _written(func)
        if args and isinstance(args[0], cls) and _private.returns_views(schema):
            return _view(func, args[0], args[1:], kwargs)
        return func(*_summed(args), **_summed(kwargs))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _written("data")

    @property
    def requires_grad(self) -> bool:
        addends = self._addends
        return any(t.requires_grad for t in addends) if addends else super().requires_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.requires_grad_(requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> "AdaptedWeight":
        """Freeze or unfreeze the base layer's weight."""
        if not self._addends:  # as nn.Parameter(layer.weight) asks
            raise _written("requires_grad_")
        self._addends[0].requires_grad_(requires_grad)
        return self

    # What needs memory gets the sum's.

    def data_ptr(self) -> int:
        raise RuntimeError(
            "c3a: the weight of an adapted layer has no memory of its own; take "
            "layer.weight.clone(), or layer.base_layer.weight without the adapter"
        )

    def numpy(self, *, force: bool = False) -> Any:
        if self.requires_grad and not force:
            raise RuntimeError("c3a: the weight requires grad; use layer.weight.detach().numpy()")
        return self._sum().numpy(force=force)

    def tolist(self) -> Any:
        return self._sum().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._sum()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._sum().__reduce_ex__(protocol)

    def __repr__(  # type: ignore[override]  # mypy loses the name of torch's argument
        self, *, tensor_contents: object = None
    ) -> str:
        return f"AdaptedWeight({self._sum()!r}, requires_grad={self.requires_grad})"


class _Read(torch.autograd.Function):
    """Take the sum for a function of the base weight and the kernel."""

    if TYPE_CHECKING:  # torch's takes anything

        @classmethod
        def apply(cls, layer: _Layer, kind: type[_T], weight: Tensor, kernel: Tensor) -> _T: ...

    @staticmethod
    def forward(
        ctx: Any, layer: _Layer, kind: type[AdaptedWeight], weight: Tensor, kernel: Tensor
    ) -> Tensor:
        ctx.layer = layer
        addends = (weight, kernel)
        total = partial(_sum, layer, _state_of(layer), *addends)
        return kind(weight, weight.device, total, addends)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor | None, Tensor]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # The sum is linear in it: any kernel of its shape gives the gradient.
            kernel = ctx.layer.c3a_kernel.detach().requires_grad_()
            delta = ctx.layer.add_delta(torch.zeros_like(g), kernel)
        (of_kernel,) = torch.autograd.grad(delta, kernel, g, create_graph=again)
        return None, None, g if ctx.needs_input_grad[2] else None, of_kernel


@torch.no_grad()
def _sum(layer: _Layer, state: tuple[object, ...], weight: Tensor, kernel: Tensor) -> Tensor:
    if _state_of(layer) != state:
        raise RuntimeError(
            "c3a: the layer has changed since its weight was read; read layer.weight again"
        )
    return layer.add_delta(weight, kernel)


def read(layer: _Layer, kind: type[_T]) -> _T:
    """Return an adapted layer's weight: differentiable in kernel and base weight."""
    return _Read.apply(layer, kind, layer.base_layer.weight, layer.c3a_kernel)


def _state_of(layer: _Layer) -> tuple[object, ...]:
    """Return what tells whether a layer's weight is still what it was."""
    parts: list[object] = []
    part: Any = layer
    while hasattr(part, "c3a_kernel"):
        parts += [part.scale, _version(part.c3a_kernel)]
        part = part.base_layer
    return (*parts, _version(part.weight))


def _version(t: Tensor) -> tuple[int, int | None]:
    return id(t), None if t.is_inference() else _private.version(t)


def _summed(value: Any) -> Any:
    """Return an operator's arguments with each adapted weight replaced by its sum."""
    if isinstance(value, AdaptedWeight):
        return value._sum()
    if isinstance(value, list | tuple):
        return type(value)(_summed(item) for item in value)
    if isinstance(value, dict):
        return {key: _summed(item) for key, item in value.items()}
    return value


def _view(
    func: _private.Overload, whole: AdaptedWeight, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return views of an adapted weight that have no memory either."""

    def views() -> Any:
        return func(whole._sum(), *args, **kwargs)

    like = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device="meta")
    found = func(like, *args, **kwargs)
    if isinstance(found, Tensor):
        return AdaptedWeight(found, whole.device, views)

    def part(place: int) -> Callable[[], Tensor]:
        return lambda: views()[place]

    return [AdaptedWeight(view, whole.device, part(place)) for place, view in enumerate(found)]


def _written(what: object) -> RuntimeError:
    return RuntimeError(
        f"c3a: {what}: the weight of an adapted layer is a sum, which cannot be written to nor "
        "made a parameter; write to layer.base_layer.weight, or take layer.weight.clone()"
    )
