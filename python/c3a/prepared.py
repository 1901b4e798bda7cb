"""A layer's kernel, prepared once for many calls that want no gradient for it.

On the CPU it is prepared at the first such call, and every call compares the kernel with a copy of
what was prepared, bit by bit: whatever wrote it, and however, it is never stale. Elsewhere a
comparison would wait for the device, so it is prepared by ``C3ALinear.prepare()`` only, and dropped
when the kernel is another tensor or its version (autograd's count of writes) has changed.
"""

import ctypes
import threading
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from . import _private
from ._library import OPS as _OPS
from .shapes import sums_dtype

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Held(NamedTuple):
    """What was prepared, and from what; replaced as a whole."""

    # shape, dtype, device, scale, and off the CPU also place and version
    source: tuple[object, ...]
    copy: Tensor | None  # of the kernel, on the CPU
    dtype: torch.dtype  # what it was prepared for
    w_hat: Tensor
    w_hat_transposed: Tensor | None  # made when it is first needed


class PreparedKernel:
    """Holds the prepared kernel of one layer; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: _Held | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PreparedKernel, ()  # copies and pickles of a layer start without

    def drop(self) -> None:
        self._held = None

    def make(self, w: Tensor, scale: float, activations: torch.dtype) -> None:
        """Prepare now, whatever was there, for activations of this dtype."""
        if w.device.type != "cpu" and w.is_inference():
            raise RuntimeError(
                "c3a.C3ALinear.prepare: expected a kernel made outside inference mode: this "
                f"one counts no writes, and on {w.device} nothing else tells when it changes"
            )
        with self._lock:
            self._held = _prepared(
                _plain(w), scale, _prepared_for(w, activations), transposed=False
            )

    def get(
        self, w: Tensor, scale: float, activations: tuple[torch.dtype, ...], transposed: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return ``(w_hat, w_hat_transposed)`` of the kernel as it is now, or None.

        For activations and results of these dtypes; the second is None unless ``transposed``.
        """
        dtype = _prepared_for(w, *activations)
        held, w = self._held, _plain(w)
        if w.device.type != "cpu":
            if held is None:
                return None
            if not _is_current(held, w, scale):
                self._forget(held)
                return None
            if not _serves(held, dtype, transposed):
                return None
        elif not _serves(held, dtype, transposed) or not _is_current(held, w, scale):
            with self._lock:
                held = self._held  # another thread may have prepared it meanwhile
                if not _serves(held, dtype, transposed) or not _is_current(held, w, scale):
                    held = self._held = _prepared(w, scale, dtype, transposed)
        return held.w_hat, held.w_hat_transposed

    def _forget(self, held: _Held) -> None:
        with self._lock:
            if self._held is held:
                self._held = None


def _plain(w: Tensor) -> Tensor:
    """Return the kernel's numbers as they are now, whatever becomes of the parameter."""
    w = w.detach()
    return w.resolve_neg() if w.is_neg() else w


def _prepared_for(w: Tensor, *activations: torch.dtype) -> torch.dtype:
    """Return the dtype for which an operator would transform the kernel itself."""
    sums = sums_dtype(w.dtype, *activations)
    narrow = w.is_cpu and sums == torch.float32 and torch.bfloat16 in activations
    return torch.bfloat16 if narrow else sums


def _source(w: Tensor, scale: float) -> tuple[object, ...]:
    source = (w.shape, w.dtype, w.device, scale)
    if w.device.type == "cpu":
        return source
    return (*source, w.data_ptr(), w.stride(), _private.version(w))


def _serves(held: _Held | None, dtype: torch.dtype, transposed: bool) -> TypeGuard[_Held]:
    return (
        held is not None
        and held.dtype == dtype
        and (held.w_hat_transposed is not None or not transposed)
    )


def _is_current(held: _Held, w: Tensor, scale: float) -> bool:
    return held.source == _source(w, scale) and (
        held.copy is None or _same_bits(held.copy, w.contiguous())
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare two contiguous tensors of one shape and dtype on the CPU."""
    same: bool = _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0
    return same


@torch.no_grad()
def _prepared(w: Tensor, scale: float, dtype: torch.dtype, transposed: bool) -> _Held:
    source, copy = _source(w, scale), None
    if w.device.type == "cpu":
        w = copy = w.clone(memory_format=torch.contiguous_format)
    w_hat = _OPS.prepare(w, dtype, False, scale)
    w_hat_transposed = _OPS.prepare(w, dtype, True, scale) if transposed else None
    return _Held(source, copy, dtype, w_hat, w_hat_transposed)
