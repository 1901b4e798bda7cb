"""A layer's kernel or kernels, prepared once for many calls that want no gradient for them.

On the CPU it is prepared at the first such call, and every call compares the kernel with a copy of
what was prepared, bit by bit: whatever wrote it, and however, it is never stale. Elsewhere a
comparison would wait for the device, so it is prepared by ``C3ALinear.prepare()`` only, and dropped
when the kernel is another tensor or its version (autograd's count of writes) has changed.
"""

import ctypes
import threading
from collections.abc import Mapping
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
            self._held = _prepared(_plain(w), scale, prepared_for(w, activations), transposed=False)

    def get(
        self, w: Tensor, scale: float, activations: tuple[torch.dtype, ...], transposed: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return ``(w_hat, w_hat_transposed)`` of the kernel as it is now, or None.

        For activations and results of these dtypes; the second is None unless ``transposed``.
        """
        dtype = prepared_for(w, *activations)
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


class _Stack(NamedTuple):
    """Slots of one tensor; filled ones are never written again."""

    dtype: torch.dtype  # what its kernels are prepared for
    w_hat: Tensor
    w_hat_transposed: Tensor | None
    held: dict[str, tuple[int, _Held]]  # slot and what is in it, by name


class PreparedStack:
    """Holds prepared kernels of one shape and scale, stacked, for rows that choose one each.

    On the CPU only, where every call compares those that it uses. A name has a slot from its first
    use on. Where a kernel has changed another stack begins, so that what a call was given stays as
    it is. Safe to use from many threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stack: _Stack | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PreparedStack, ()

    def get(
        self,
        kernels: Mapping[str, Tensor],
        scale: float,
        activations: tuple[torch.dtype, ...],
        transposed: bool,
    ) -> tuple[Tensor, Tensor | None, dict[str, int]] | None:
        """Return ``(w_hat, w_hat_transposed, slots by name)`` of the kernels as they are now.

        Or None off the CPU; otherwise as ``PreparedKernel.get``.
        """
        if any(not w.is_cpu for w in kernels.values()):
            return None
        kernels = {name: _plain(w) for name, w in kernels.items()}
        dtype = prepared_for(next(iter(kernels.values())), *activations)
        stack = self._stack
        if stack is None or not _has_current(stack, kernels, scale, dtype, transposed):
            with self._lock:
                stack = self._stack
                if stack is None or not _has_current(stack, kernels, scale, dtype, transposed):
                    stack = self._stack = _stack_with(stack, kernels, scale, dtype, transposed)
        slots = {name: stack.held[name][0] for name in kernels}
        return stack.w_hat, stack.w_hat_transposed, slots


def _serves_as(stack: _Stack, dtype: torch.dtype, transposed: bool) -> bool:
    return stack.dtype == dtype and (stack.w_hat_transposed is not None or not transposed)


def _has_current(
    stack: _Stack,
    kernels: Mapping[str, Tensor],
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
) -> bool:
    return _serves_as(stack, dtype, transposed) and all(
        name in stack.held and _is_current(stack.held[name][1], w, scale)
        for name, w in kernels.items()
    )


def _stack_with(
    old: _Stack | None,
    kernels: Mapping[str, Tensor],
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
) -> _Stack:
    """Return a stack in which these kernels have slots: the old one while it has room."""
    entries: dict[str, _Held] = {}
    if old and _serves_as(old, dtype, transposed):
        entries = {name: held for name, (_, held) in old.held.items()}
        if not all(_is_current(entries[k], w, scale) for k, w in kernels.items() if k in entries):
            entries = {}
    kept = len(entries)
    for name, w in kernels.items():
        if name not in entries:
            entries[name] = _prepared(w, scale, dtype, transposed)
    stack = old
    if stack is None or not kept or len(entries) > len(stack.w_hat):
        stack, kept = _empty_stack(next(iter(entries.values())), 2 * len(entries)), 0
    for slot, (name, held) in list(enumerate(entries.items()))[kept:]:
        stack.held[name] = slot, _put(stack, slot, held)
    return stack


def _empty_stack(like: _Held, slots: int) -> _Stack:
    def of(t: Tensor) -> Tensor:
        return torch.empty((slots, *t.shape), dtype=t.dtype)

    with torch.inference_mode(False):  # its tensors could be written within it only
        w_hat_t = None if like.w_hat_transposed is None else of(like.w_hat_transposed)
        return _Stack(like.dtype, of(like.w_hat), w_hat_t, {})


def _put(stack: _Stack, slot: int, held: _Held) -> _Held:
    """Fill a slot, and return what is in it."""

    def filled(t: Tensor, what: Tensor) -> Tensor:
        # Past the version's count: graphs may have saved the stack, and use other slots.
        return t.data[slot].copy_(what)

    w_hat_t = None
    if stack.w_hat_transposed is not None and held.w_hat_transposed is not None:
        w_hat_t = filled(stack.w_hat_transposed, held.w_hat_transposed)
    return held._replace(w_hat=filled(stack.w_hat, held.w_hat), w_hat_transposed=w_hat_t)


def _plain(w: Tensor) -> Tensor:
    """Return the kernel's numbers as they are now, whatever becomes of the parameter."""
    w = w.detach()
    return w.resolve_neg() if w.is_neg() else w


def prepared_for(w: Tensor, *activations: torch.dtype) -> torch.dtype:
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
