"""A kernel's spectra, kept from call to call while no gradient is wanted for the kernel.

The CPU's operators transform the kernel at every call, which is little beside many tokens and much
beside one. What is kept belongs to a piece of memory, as long as that is alive, and is used only
while the kernel has the same shape, dtype and version (the count of in-place changes by which
autograd finds stale saved tensors). Writes that go around the version, through ``w.data`` or NumPy,
are seen if they change one of 64 numbers spread over the kernel, as any step of training or loading
does; ``c3a.forget_spectra()`` after such a write to a few numbers only.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

_OPS = torch.ops.c3a
SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Kept(NamedTuple):
    storage: StorageWeakRef  # while it is held, no other storage has the same address
    facts: tuple
    by_use: dict[tuple, Tensor]


_KEPT: dict[tuple[int, int], _Kept] = {}


def forget_spectra() -> None:
    """Drop every kernel's kept spectra; they are computed anew when they are next needed."""
    _KEPT.clear()


def is_plain(*tensors: Tensor) -> bool:
    """Return whether a call on these is an ordinary one: nothing traces, wraps or transforms it."""
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and _functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
    )


def _place(w: Tensor) -> tuple[int, int]:
    return w.untyped_storage()._cdata, w.data_ptr()


def kept_spectra(w: Tensor, dtype: torch.dtype, transposed: bool, scale: float) -> Tensor | None:
    """Return the spectra of ``w``, kept or computed; None where the CPU's kernels have none."""
    if w.is_inference():
        return None
    place, facts = _place(w), (w._version, w.dtype, w.shape, w.stride())
    kept = _KEPT.get(place)
    if kept is None or kept.facts != facts or kept.storage.expired():
        for dead in [key for key, other in _KEPT.items() if other.storage.expired()]:
            del _KEPT[dead]
        kept = _KEPT[place] = _Kept(StorageWeakRef(w.untyped_storage()), facts, {})
    use = (dtype, transposed, scale)
    if use not in kept.by_use:
        kept.by_use[use] = _OPS._kernel_spectra(w, dtype, transposed, scale)
    w_hat = kept.by_use[use]
    return w_hat if w_hat.numel() else None


def apply(
    a: Tensor,
    w: Tensor,
    scale: float = 1.0,
    *,
    transposed: bool = False,
    base: Tensor | None = None,
    in_place: bool = False,
) -> Tensor | None:
    """Return the forward (onto ``base``) or the input gradient by the spectra kept of ``w``.

    ``in_place`` writes into ``base``. None where a call is not for this, bad operands included: the
    operators themselves have the messages. Runs below autograd.
    """
    if w.device.type != "cpu":
        return None
    operands = (a, w) if base is None else (a, w, base)
    if not is_plain(*operands) or w.dim() != 3 or not all(w.shape) or a.dim() == 0:
        return None
    m, n, b = w.shape
    sizes = (*a.shape[:-1], (n if transposed else m) * b)
    fits = a.shape[-1] == (m if transposed else n) * b and (base is None or base.shape == sizes)
    floats = all(t.dtype in SUPPORTED_DTYPES and t.device == w.device for t in operands)
    if not (fits and floats):
        return None
    is_double = any(t.dtype == torch.float64 for t in operands)
    dtype = torch.float64 if is_double else torch.float32
    w_hat = kept_spectra(w, dtype, transposed, scale)
    if w_hat is None:
        return None
    out = base if in_place else (a if base is None else base).new_empty(sizes)
    if not _OPS._apply_spectra(out, a, w, w_hat, transposed, base):
        del _KEPT[_place(w)]  # changed around its version
        w_hat = kept_spectra(w, dtype, transposed, scale)
        _OPS._apply_spectra(out, a, w, w_hat, transposed, base)
    return out
