"""A kernel's spectra, kept from call to call while no gradient is wanted for the kernel.

The CPU's operators transform the kernel at every call, which is little beside many tokens and much
beside one. What is kept belongs to a tensor object and is used only while that tensor has the
same memory, shape, dtype and version (the count of in-place changes by which autograd finds stale
saved tensors). Writes that go around the version, through ``w.data``, NumPy or DLPack, are not
seen: ``c3a.forget_spectra()`` after them.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

_OPS = torch.ops.c3a
SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Kept(NamedTuple):
    tensor: weakref.ref
    alias: Tensor  # holds the memory, whose address can then not be given to another tensor
    version: int
    by_use: dict[tuple, Tensor]

    def is_of(self, w: Tensor) -> bool:
        alias = self.alias
        return (
            self.tensor() is w
            and self.version == w._version
            and alias.data_ptr() == w.data_ptr()
            and alias.dtype == w.dtype
            and alias.shape == w.shape
            and alias.stride() == w.stride()
        )


_KEPT: dict[int, _Kept] = {}


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


def kept_spectra(w: Tensor, dtype: torch.dtype, transposed: bool, scale: float) -> Tensor | None:
    """Return the spectra of ``w``, kept or computed; None where the CPU's kernels have none."""
    if w.device.type != "cpu" or w.is_inference():
        return None
    kept = _KEPT.get(id(w))
    if kept is None or not kept.is_of(w):
        key = id(w)
        tensor = weakref.ref(w, lambda _: _KEPT.pop(key, None))
        kept = _KEPT[key] = _Kept(tensor, w.detach(), w._version, {})
    use = (dtype, transposed, scale)
    if use not in kept.by_use:
        kept.by_use[use] = _OPS._kernel_spectra(kept.alias, dtype, transposed, scale)
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
    _OPS._apply_spectra(out, a, w, w_hat, transposed, base)
    return out
