"""C3ALinear: a frozen layer plus a block-circulant adapter."""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from . import _private, autograd, distributed
from .ops import (
    block_circ_conv,
    block_circ_conv_add,
    block_circ_conv_linear,
    block_circ_conv_prepared,
    block_circ_conv_prepared_add,
)
from .prepared import PreparedKernel
from .reference import circulant
from .shapes import SUPPORTED_DTYPES
from .sizes import check_block_size, features, kernel_shape
from .weight import AdaptedWeight, read

if TYPE_CHECKING:
    from typing_extensions import Self


def _checked_scale(scale: object) -> float:
    if not isinstance(scale, Real):
        raise TypeError(
            f"c3a.C3ALinear: expected scale to be a number, got {type(scale).__name__} {scale!r}"
        )
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"c3a.C3ALinear: expected a finite scale other than 0, got {scale}")
    return float(scale)


# One for all layers: a layer with a lock of its own could not be copied.
_EXCHANGING = threading.Lock()

INITS = ("zeros", "xavier_uniform", "kaiming_uniform", "gaussian")


class C3ALinear(nn.Module):
    """A frozen layer plus a trainable block-circulant matrix.

    ``y = base_layer(x) + scale * c3a.block_circ_conv(x, c3a_kernel)``, with
    ``m * n * block_size`` parameters, about ``in * out / block_size``.

    Args:
        base_layer: any layer with ``in_features`` and ``out_features`` (or ``Conv1D`` of
            transformers); only its forward is used, so it may be quantised. Its parameters are
            frozen.
        block_size: ``b``, a common divisor of both sizes unless ``pad``.
        scale: factor of the adapter; default ``1 / in_features``, with which learning rates of
            0.1 to 1 work.
        init: ``"zeros"`` (the layer starts equal to its base), ``"xavier_uniform"`` (bound
            ``sqrt(6 / (in + out))``), ``"kaiming_uniform"`` (bound ``sqrt(1 / in)``) or
            ``"gaussian"`` (standard normal).
        dtype: the kernel's dtype; inputs may have another. ``half()``, ``bfloat16()`` and ``to()``
            leave a wider kernel as it is: float16 cannot hold what optimizers keep of it.
        pad: accept a block size that does not divide: the input is padded with zeros, the output
            cut. Costs a padded copy of the input, and the PEFT library cannot load the adapter.

    Attributes:
        c3a_kernel: parameter of shape ``(m, n, block_size)``.
        enabled: assign False to compute the base layer alone, merged or not.
        merged: whether the base layer's weight holds the adapter now.

    Saves for the backward nothing but its input, which the base layer has in hand anyway, and the
    kernel.

    Raises:
        TypeError: ``base_layer`` has no in and out features, or the operator has no such ``dtype``.
        ValueError: the block size does not fit, or ``scale`` or ``init`` is out of range.

    Source: C3A (arXiv:2407.19342), section 3.4. ``scale`` is the PEFT library's.

    >>> import c3a, torch
    >>> layer = c3a.C3ALinear(torch.nn.Linear(64, 32), block_size=16)
    >>> layer.c3a_kernel.shape
    torch.Size([2, 4, 16])
    >>> layer(torch.randn(8, 64)).shape
    torch.Size([8, 32])
    """

    in_features: int
    out_features: int
    block_size: int
    init: str
    base_layer: nn.Module
    c3a_kernel: nn.Parameter
    _merge_after_load: bool  # while a state dict is being loaded

    if TYPE_CHECKING:  # nn.Module's takes and returns anything

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(
        self,
        base_layer: nn.Module,
        block_size: int,
        *,
        scale: float | None = None,
        init: str = "zeros",
        dtype: torch.dtype = torch.float32,
        pad: bool = False,
    ) -> None:
        super().__init__()
        sizes = features(base_layer)
        if sizes is None:
            raise TypeError(
                "c3a.C3ALinear: expected a layer with in_features and out_features, got "
                f"{type(base_layer).__name__}"
            )
        if dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"c3a.C3ALinear: expected one of {SUPPORTED_DTYPES}, got dtype {dtype}")
        self.in_features, self.out_features = sizes
        try:
            check_block_size(block_size, *sizes, pad)
        except ValueError as error:
            raise ValueError(f"c3a.C3ALinear: {error}") from None
        if init not in INITS:
            raise ValueError(f"c3a.C3ALinear: expected init to be one of {INITS}, got {init!r}")
        scale = 1 / self.in_features if scale is None else _checked_scale(scale)

        self.base_layer = base_layer
        self.block_size = block_size = int(block_size)
        self._scale = scale
        self.init = init
        shape = kernel_shape(*sizes, block_size)
        self.c3a_kernel = nn.Parameter(
            torch.empty(shape, dtype=dtype, device=_device_of(base_layer))
        )
        self._pad = (
            shape[1] * block_size - self.in_features,
            shape[0] * block_size - self.out_features,
        )
        self._enabled = True
        self._prepared = PreparedKernel()
        # The base layer that was looked at for passing gradients on, which is done once.
        self._passing_base: int | None = None
        # Odd while the weights are being exchanged, and another number after it.
        self._exchanges = 0
        # While merged, the one weight that the base layer does not use now: the original if
        # enabled, else the merged one. In a list, lest nn.Module registers it.
        self._set_aside: list[nn.Parameter] = []
        base_layer.requires_grad_(False)
        self.reset_parameters()
        self.train(base_layer.training)
        self.register_state_dict_post_hook(_state_dict_unmerged)
        self.register_load_state_dict_pre_hook(_take_base_names)
        self.register_load_state_dict_pre_hook(_unmerge_to_load)
        self.register_load_state_dict_post_hook(_merge_after_load)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the kernel with the initial values that ``init`` names."""
        bound = {
            "xavier_uniform": math.sqrt(6 / (self.in_features + self.out_features)),
            "kaiming_uniform": math.sqrt(1 / self.in_features),
        }
        if self.init == "zeros":
            self.c3a_kernel.zero_()
        elif self.init == "gaussian":
            self.c3a_kernel.normal_()
        else:
            self.c3a_kernel.uniform_(-bound[self.init], bound[self.init])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``, in the base layer's own dtype.

        Another thread may merge, unmerge, enable or disable meanwhile: the result is then computed
        anew, base layer and all.
        """
        if torch.compiler.is_compiling():
            return self._forward(x)
        while True:
            exchanges = self._exchanges
            y = self._forward(x)
            if exchanges == self._exchanges and exchanges % 2 == 0:
                return y

    def _forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if self.merged or not self.enabled:
            unadapted: Tensor = base(x)
            return unadapted
        kernel, scale = self.c3a_kernel, self.scale
        if traced := self._traced_linear(base, x):
            return block_circ_conv_linear(x, *traced, kernel, scale)
        if frozen := self._frozen_linear(base, x, kernel):
            prepared = self._prepared_for(kernel, scale, x, frozen[0].dtype)
            if prepared:
                return autograd.add_to_linear(autograd.PREPARED, *frozen, x, *prepared)
            return autograd.add_to_linear(autograd.FORWARD, *frozen, x, kernel, scale)
        y: Tensor = base(x)
        is_plain = _private.is_plain(y, x, kernel)
        wants_grad = is_plain and x.requires_grad and torch.is_grad_enabled()
        if wants_grad and self._passing_base != id(base):
            self._passing_base = id(base)
            _warn_of_a_cut_graph(base, x, y)
        more_in, more_out = self._pad
        x = F.pad(x, (0, more_in)) if more_in else x
        prepared = self._prepared_for(kernel, scale, x, y.dtype) if is_plain else None
        if more_out:
            if prepared:
                delta = block_circ_conv_prepared(x, *prepared)
            else:
                delta = block_circ_conv(x, kernel, scale)
            return y + delta[..., : self.out_features].to(y.dtype)
        # The base layer's result is written in place where nobody else has it.
        if is_plain and _private.is_sole_owner(y):
            if prepared:
                return autograd.add_into(autograd.PREPARED, y, x, *prepared)
            return autograd.add_into(autograd.FORWARD, y, x, kernel, scale)
        if prepared:
            return block_circ_conv_prepared_add(y, x, *prepared)
        return block_circ_conv_add(y, x, kernel, scale)

    def _frozen_linear(
        self, base: nn.Module, x: Tensor, kernel: Tensor
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return the base layer's weight and bias where it and the adapter can be one node.

        In the dtype in which the base layer computes: its own, or autocast's.
        """
        if (
            not torch.is_grad_enabled()
            or not _private.is_ordinary(x, kernel)
            or not (kernel.requires_grad or x.requires_grad)
            or self._pad != (0, 0)
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

    def _traced_linear(self, base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return weight and bias where a compiler is given base and adapter as one operator.

        Not in ``torch.export``, whose graphs are for others to read.
        """
        compiler = torch.compiler
        if not compiler.is_compiling() or compiler.is_exporting() or self._pad != (0, 0):
            return None
        frozen = _private.frozen_linear(base)
        if frozen and (frozen[0].dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
            return frozen
        return None

    def prepare(self) -> None:
        """Transform the kernel once for the calls to come that want no gradient for it.

        On the CPU the first such call does so by itself, and the kernel is compared at every call.
        On other devices this call is needed, before decoding token by token for instance. The
        prepared kernel is dropped by ``train()``, ``load_state_dict``, moving or converting the
        layer, and by writes to the kernel that autograd counts; writes around the count (``.data``,
        another process's) are not seen there: call this again after them. A kernel that is sharded
        is written where nothing counts, so none is prepared for it here.
        """
        if distributed.is_sharded(self):
            self._prepared.drop()
            return
        weight = getattr(self.base_layer, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) else self.c3a_kernel.dtype
        if dtype not in SUPPORTED_DTYPES:  # quantised
            dtype = self.c3a_kernel.dtype
        self._prepared.make(self.c3a_kernel, self.scale, dtype)

    def _prepared_for(
        self, kernel: Tensor, scale: float, x: Tensor, of_y: torch.dtype
    ) -> tuple[Tensor, int, Tensor | None] | None:
        """Return ``(w_hat, block_size, w_hat_transposed)`` for a plain call, or None."""
        grad = torch.is_grad_enabled()
        if grad and kernel.requires_grad:
            return None
        transposed = grad and x.requires_grad
        found = self._prepared.get(kernel, scale, (x.dtype, of_y), transposed)
        return found and (found[0], self.block_size, found[1])

    def train(self, mode: bool = True) -> "Self":
        """Set the layer's mode; training drops what was prepared."""
        if mode:
            self._prepared.drop()
        return super().train(mode)

    @property
    def weight(self) -> Tensor:
        """The weight by which the layer is a linear one, for code that reads it.

        ``base_layer.weight + delta_weight()`` in the base weight's dtype and layout, differentiable
        in the kernel. Its dtype, device and shape need no sum, which is made when something
        computes with it (``c3a.weight.AdaptedWeight``). The base layer's own weight while merged or
        disabled, and where it is not dense, as with quantised layers.
        """
        base: Any = self.base_layer
        weight: Tensor = base.weight
        if self.merged or not self.enabled or not self._is_dense(weight):
            return weight
        if weight.is_meta and not self.c3a_kernel.is_meta:  # offloaded
            return weight
        if isinstance(weight, AdaptedWeight) or _private.is_plain(weight, self.c3a_kernel):
            return read(self)
        return self.add_delta(weight, self.c3a_kernel)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def delta_weight(self) -> Tensor:
        """Return ``scale * circulant(c3a_kernel)``, ``(out_features, in_features)``, >= float32."""
        return self._delta(self.c3a_kernel)

    def _delta(self, kernel: Tensor) -> Tensor:
        kernel = distributed.whole(kernel)
        kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
        return circulant(kernel)[: self.out_features, : self.in_features] * self.scale

    def add_delta(self, weight: Tensor, kernel: Tensor) -> Tensor:
        """Return a base weight plus what a kernel stands for, in the weight's dtype and layout.

        The sum is computed in float32 at least and rounded once.
        """
        delta = self._delta(kernel).to(weight.device)
        delta = distributed.placed_as(delta.T if self._is_conv1d else delta, weight)
        total = delta.to(torch.promote_types(delta.dtype, weight.dtype)).add_(weight)
        return torch.empty_like(weight).copy_(total)

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        scale = _checked_scale(value)
        merged = self.merged
        self.unmerge()
        self._scale = scale
        if merged:
            self.merge()

    @property
    def merged(self) -> bool:
        return bool(self._set_aside)

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        with self._exchanging():
            if self.merged and bool(value) != self._enabled:
                self._swap_weights()
            self._enabled = bool(value)

    def check_mergeable(self) -> None:
        """Raise TypeError unless the base layer has a dense floating-point weight of its size.

        ValueError where the weight or the kernel is on the meta device, without values.
        """
        weight = getattr(self.base_layer, "weight", None)
        if isinstance(self.base_layer, C3ALinear):
            raise TypeError(
                "c3a: cannot merge into another adapter; merge and unwrap that one first"
            )
        if not isinstance(weight, nn.Parameter) or not self._is_dense(weight):
            got = type(weight).__name__
            if isinstance(weight, Tensor):
                got += f" of {weight.dtype} and shape {tuple(weight.shape)}"
            raise TypeError(
                f"c3a: cannot merge into a {type(self.base_layer).__name__}: expected a dense "
                f"floating-point weight of shape {self._weight_shape}, got a {got}"
            )
        if weight.is_meta or self.c3a_kernel.is_meta:
            what = "weight" if weight.is_meta else "kernel"
            raise ValueError(
                f"c3a: cannot merge: the {what} is on the meta device, where nothing has values; "
                "merge before accelerate offloads the model, or load the whole model"
            )

    @torch.no_grad()
    def merge(self, *, safe: bool = True) -> None:
        """Add the adapter to the base layer's weight: no cost at inference. Idempotent.

        The sum is computed in float32 at least and rounded once. The original weight is kept (its
        memory too) for ``unmerge``. A weight that other layers share stays as it is for them. Other
        threads may run the layer meanwhile, unless it is compiled.

        Args:
            safe: look whether the merged weight is finite.

        Raises:
            TypeError: the base layer has no dense floating-point weight of its size.
            ValueError: weight or kernel is on the meta device; or ``safe``, and the adapter makes
                numbers of the weight infinite or NaN. The layer is then as it was.
        """
        if self.merged:
            return
        self.check_mergeable()
        distributed.reshard(self)
        base: Any = self.base_layer
        original: Tensor = base.weight
        merged = self.add_delta(original, self.c3a_kernel)
        spoilt = (~merged.isfinite() & original.isfinite()).sum() if safe else 0
        if spoilt := int(distributed.whole(spoilt)):
            finite = distributed.whole(self.c3a_kernel.isfinite().all())
            kernel = "is finite" if finite else "is not finite itself"
            raise ValueError(
                f"c3a: merging would make {spoilt} of {merged.numel()} numbers of the weight "
                f"infinite or NaN in {merged.dtype} (the kernel {kernel}); pass safe=False to "
                "merge all the same"
            )
        with self._exchanging():
            if not self.merged:  # another thread may have merged meanwhile
                self._set_aside = [nn.Parameter(merged, requires_grad=False)]
                if self.enabled:
                    self._swap_weights()

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Idempotent."""
        with self._exchanging():
            if self.merged:
                if self.enabled:
                    self._swap_weights()
                self._set_aside = []

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Within the block, calls of the layer by other threads wait for its end."""
        if torch.compiler.is_compiling():  # which knows no locks
            yield
            return
        with _EXCHANGING:
            self._exchanges += 1
            try:
                yield
            finally:
                self._exchanges += 1

    @property
    def _is_conv1d(self) -> bool:
        return not hasattr(self.base_layer, "in_features")  # weight is (in, out) there

    @property
    def _weight_shape(self) -> tuple[int, int]:
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self._is_conv1d else shape

    def _is_dense(self, weight: Tensor) -> bool:
        """Return whether a weight holds the matrix itself, rather than what stands for it."""
        return (
            weight.dtype.is_floating_point
            and tuple(weight.shape) == self._weight_shape
            and (distributed.is_dtensor(weight) or not hasattr(type(weight), "__tensor_flatten__"))
        )

    @torch.no_grad()
    def _swap_weights(self) -> None:
        distributed.reshard(self)
        weight: Any = self.base_layer.weight
        if distributed.is_dtensor(weight):  # FSDP keeps to its parameter: the values are exchanged
            shown = weight.clone()
            weight.copy_(self._set_aside[0])
            self._set_aside[0].copy_(shown)
            return
        self.base_layer.weight, self._set_aside[0] = self._set_aside[0], self.base_layer.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        """Convert or move the layer; a kernel is not narrowed to 16 bits with the model.

        In float16 an optimizer's squares of gradients, and AdamW's eps, are zero.
        """
        self._prepared.drop()
        if recurse:
            for module in self.children():
                module._apply(fn)

        def of_kernel(t: Tensor) -> Tensor:
            new = fn(t)
            narrowed = new.is_floating_point() and new.itemsize == 2 and t.itemsize > 2
            return t.to(new.device) if narrowed else new

        super()._apply(of_kernel, recurse=False)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for weight in self._set_aside:
                weight.data = fn(weight.data)
        return self

    def extra_repr(self) -> str:
        state = ", merged" if self.merged else ""
        state += "" if self.enabled else ", disabled"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block_size={self.block_size}, scale={self.scale:.3g}, "
            f"parameters={self.c3a_kernel.numel()}{state}"
        )


def _device_of(base_layer: nn.Module) -> torch.device | None:
    """Return where a layer computes: for one that accelerate has offloaded, where it is taken."""
    device = next((t.device for t in [*base_layer.parameters(), *base_layer.buffers()]), None)
    if device is not None and device.type == "meta":
        hook = getattr(base_layer, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            place = getattr(part, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return device


# A state dict always holds the original weight and the kernel, whether merged or not.


def _state_dict_unmerged(
    layer: C3ALinear, state_dict: dict[str, Any], prefix: str, _metadata: object
) -> None:
    if layer.merged and layer.enabled:
        state_dict[f"{prefix}base_layer.weight"] = layer._set_aside[0].detach()


def _take_base_names(
    _layer: C3ALinear, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Let a checkpoint of the model without adapters fit: its names have no ``base_layer``."""
    own, inner = f"{prefix}c3a_kernel", f"{prefix}base_layer."
    names = [name for name in state_dict if name.startswith(prefix) and name != own]
    if not any(name.startswith(inner) for name in names):
        for name in names:
            state_dict[inner + name.removeprefix(prefix)] = state_dict.pop(name)


def _unmerge_to_load(layer: C3ALinear, *_: object) -> None:
    layer._prepared.drop()
    layer._merge_after_load = layer.merged
    layer.unmerge()


def _merge_after_load(layer: C3ALinear, _incompatible_keys: object) -> None:
    if layer.__dict__.pop("_merge_after_load", False):
        layer.merge()


_CUTTING_BASES: set[str] = set()


def _warn_of_a_cut_graph(base: nn.Module, x: Tensor, y: Tensor) -> None:
    """Say once for each kind of base layer that gradients do not pass through it."""
    if _passes_gradients(x, y):
        return
    # Some ways of quantising keep the layer's class and change that of its weight.
    weight = getattr(base, "weight", None)
    kind = f"{type(base).__name__} with a weight of type {type(weight).__name__}"
    if kind in _CUTTING_BASES:
        return
    _CUTTING_BASES.add(kind)
    warnings.warn(
        f"c3a: gradients do not pass through a base layer of type {kind}, as with "
        "dynamically quantised layers: no path of the graph leads from its result to its input. "
        "What lies below gets the adapter's share of the gradient only, which is wrong by the base "
        "layer's. Train with a base layer that differentiates (weight-only quantisation does), or "
        "adapt no layer below this one.",
        stacklevel=3,
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
