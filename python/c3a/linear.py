"""C3ALinear: a frozen layer plus a block-circulant adapter."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _private, adapted, distributed, merging
from .prepared import PreparedKernel
from .shapes import SUPPORTED_DTYPES
from .sizes import check_block_size, features, kernel_shape
from .weight import AdaptedWeight, read

if TYPE_CHECKING:
    from typing_extensions import Self


def checked_scale(who: str, scale: object) -> float:
    """Return a factor as a float, or raise TypeError or ValueError."""
    if not isinstance(scale, Real):
        raise TypeError(
            f"{who}: expected scale to be a number, got {type(scale).__name__} {scale!r}"
        )
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"{who}: expected a finite scale other than 0, got {scale}")
    return float(scale)


def checked_dropout(who: str, dropout: object) -> float:
    """Return a probability as a float, or raise TypeError or ValueError."""
    if isinstance(dropout, bool) or not isinstance(dropout, Real):
        raise TypeError(
            f"{who}: expected dropout to be a number, got {type(dropout).__name__} {dropout!r}"
        )
    probability = float(dropout)
    if not 0 <= probability < 1:
        raise ValueError(f"{who}: expected 0 <= dropout < 1, got {dropout}")
    return probability


# One for all layers: a layer with a lock of its own could not be copied.
_EXCHANGING = threading.Lock()

INITS = ("zeros", "xavier_uniform", "kaiming_uniform", "gaussian")


def check_kernel(who: str, dtype: torch.dtype, init: str) -> None:
    """Raise TypeError or ValueError unless kernels can have this dtype and these values."""
    if dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{who}: expected one of {SUPPORTED_DTYPES}, got dtype {dtype}")
    if init not in INITS:
        raise ValueError(f"{who}: expected init to be one of {INITS}, got {init!r}")


@torch.no_grad()
def initialise(kernel: Tensor, init: str, in_features: int, out_features: int) -> None:
    """Fill a kernel, or a stack of kernels, with the initial values that ``init`` names."""
    bound = {
        "xavier_uniform": math.sqrt(6 / (in_features + out_features)),
        "kaiming_uniform": math.sqrt(1 / in_features),
    }
    if init == "zeros":
        kernel.zero_()
    elif init == "gaussian":
        kernel.normal_()
    else:
        kernel.uniform_(-bound[init], bound[init])


def keeping_wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what moves or converts kernels as ``fn`` does, but does not narrow them to 16 bits.

    In float16 an optimizer's squares of gradients, and AdamW's eps, are zero.
    """

    def of_kernel(t: Tensor) -> Tensor:
        new = fn(t)
        narrowed = new.is_floating_point() and new.itemsize == 2 and t.itemsize > 2
        return t.to(new.device) if narrowed else new

    return of_kernel


def why_not_finite(total: Tensor, original: Tensor, kernel: Tensor) -> str | None:
    """Say what is infinite or NaN in a merged weight and not in the original."""
    spoilt = int(distributed.whole((~total.isfinite() & original.isfinite()).sum()))
    if not spoilt:
        return None
    finite = distributed.whole(kernel.isfinite().all())
    said = "is finite" if finite else "is not finite itself"
    return (
        f"c3a: merging would make {spoilt} of {total.numel()} numbers of the weight infinite "
        f"or NaN in {total.dtype} (the kernel {said}); pass safe=False to merge all the same"
    )


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
        dropout: in training, the probability with which a number of the adapter's input is zeroed
            (``torch.nn.functional.dropout``); the base layer sees all of it. The paper's language
            models had 0.05. The adapter's files do not hold it.

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
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = features(base_layer)
        if sizes is None:
            raise TypeError(
                "c3a.C3ALinear: expected a layer with in_features and out_features, got "
                f"{type(base_layer).__name__}"
            )
        check_kernel("c3a.C3ALinear", dtype, init)
        self.in_features, self.out_features = sizes
        try:
            check_block_size(block_size, *sizes, pad)
        except ValueError as error:
            raise ValueError(f"c3a.C3ALinear: {error}") from None
        scale = 1 / self.in_features if scale is None else checked_scale("c3a.C3ALinear", scale)
        self._dropout = checked_dropout("c3a.C3ALinear", dropout)

        self.base_layer = base_layer
        self.block_size = block_size = int(block_size)
        self._scale = scale
        self.init = init
        shape = kernel_shape(*sizes, block_size)
        self.c3a_kernel = nn.Parameter(
            torch.empty(shape, dtype=dtype, device=adapted.kernel_device(base_layer))
        )
        self._pad = (
            shape[1] * block_size - self.in_features,
            shape[0] * block_size - self.out_features,
        )
        self._enabled = True
        self._prepared = PreparedKernel()
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
        initialise(self.c3a_kernel, self.init, self.in_features, self.out_features)

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
        if self.merged or not self.enabled:
            unadapted: Tensor = self.base_layer(x)
            return unadapted
        share = adapted.Share(self.c3a_kernel, self._scale, self._prepared, self._pad)
        dropout = self._dropout if self.training else 0.0
        return adapted.forward(self.base_layer, x, (share,), dropout)

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
        if self.merged or not self.enabled or not merging.is_dense(base, weight):
            return weight
        if weight.is_meta and not self.c3a_kernel.is_meta:  # offloaded
            return weight
        if isinstance(weight, AdaptedWeight) or _private.is_plain(weight, self.c3a_kernel):
            return read(self, AdaptedWeight)
        return self.add_delta(weight, self.c3a_kernel)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def delta_weight(self) -> Tensor:
        """Return ``scale * circulant(c3a_kernel)``, ``(out_features, in_features)``, >= float32."""
        return self._delta(self.c3a_kernel)

    def _delta(self, kernel: Tensor) -> Tensor:
        return merging.delta(kernel, self.scale)[: self.out_features, : self.in_features]

    def add_delta(self, weight: Tensor, kernel: Tensor) -> Tensor:
        """Return a base weight plus what a kernel stands for, in the weight's dtype and layout.

        The sum is computed in float32 at least and rounded once.
        """
        return merging.dense_sum(self.base_layer, weight, self._delta(kernel))

    @property
    def dropout(self) -> float:
        """The probability with which a number of the adapter's input is zeroed in training."""
        return self._dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        self._dropout = checked_dropout("c3a.C3ALinear", value)

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        scale = checked_scale("c3a.C3ALinear", value)
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
        """Raise TypeError unless the base layer's weight can take the adapter.

        ValueError where the weight or the kernel is on the meta device, without values.
        """
        if isinstance(self.base_layer, C3ALinear):
            raise TypeError(
                "c3a: cannot merge into another adapter; merge and unwrap that one first"
            )
        merging.check(self.base_layer, self.c3a_kernel)

    @torch.no_grad()
    def merge(self, *, safe: bool = True) -> None:
        """Add the adapter to the base layer's weight: no cost at inference. Idempotent.

        The sum is computed in float32 at least and rounded once. A quantised weight (torchao's and
        bitsandbytes') is dequantised, and the sum quantised in the same way; a warning says what
        that loses. The original weight is kept (its memory too) for ``unmerge``. A weight that
        other layers share stays as it is for them. Other threads may run the layer meanwhile,
        unless it is compiled.

        Args:
            safe: look whether the merged weight is finite.

        Raises:
            TypeError: the base layer has no dense floating-point weight of its size, nor one that
                is quantised in a known way.
            ValueError: weight or kernel is on the meta device; or ``safe``, and the adapter makes
                numbers of the weight infinite or NaN. The layer is then as it was.
        """
        if self.merged:
            return
        self.check_mergeable()
        distributed.reshard(self)
        merged = merging.merged(
            self.base_layer, self.delta_weight(), self._spoilt if safe else lambda *_: None
        )
        with self._exchanging():
            if not self.merged:  # another thread may have merged meanwhile
                self._set_aside = [merged]
                if self.enabled:
                    self._swap_weights()

    def _spoilt(self, total: Tensor, original: Tensor) -> str | None:
        """Say what is infinite or NaN in a sum and not in the original."""
        return why_not_finite(total, original, self.c3a_kernel)

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

    def _swap_weights(self) -> None:
        distributed.reshard(self)
        self._set_aside[0] = merging.exchange(self.base_layer, self._set_aside[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        """Convert or move the layer; a kernel is not narrowed to 16 bits with the model."""
        self._prepared.drop()
        if recurse:
            for module in self.children():
                module._apply(fn)

        super()._apply(keeping_wide(fn), recurse=False)  # type: ignore[no-untyped-call]
        self._set_aside = [adapted.moved(weight, fn) for weight in self._set_aside]
        return self

    def extra_repr(self) -> str:
        state = ", merged" if self.merged else ""
        state += "" if self.enabled else ", disabled"
        dropout = f", dropout={self.dropout:.3g}" if self.dropout else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block_size={self.block_size}, scale={self.scale:.3g}{dropout}, "
            f"parameters={self.c3a_kernel.numel()}{state}"
        )


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
