"""Every private name of torch that this package uses, and why there is no public one.

A torch that drops or renames one breaks tests/test_private.py by that name, and nothing silently.
"""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C import (
    DispatchKeySet,
    FunctionSchema,
    _after_ADInplaceOrView_keyset,
    _after_autograd_keyset,
    _any_requires_grad,
    _AutoDispatchBelowADInplaceOrView,
    _AutoDispatchBelowAutograd,
    _DisableAutocast,
    _disabled_torch_function_impl,
    _DisableTorchDispatch,
    _functorch,
    _get_function_stack_at,
    _get_privateuse1_backend_name,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _is_fwd_grad_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _storage_Use_Count,
    _VariableFunctions,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import FunctionMeta, _SingleLevelFunction
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

__all__ = [
    "DispatchKeySet",
    "FunctionMeta",
    "FunctionSchema",
    "NestedTensor",
    "Node",
    "Overload",
    "any_autocast_enabled",
    "any_requires_grad",
    "autocast_disabled",
    "below_autograd",
    "below_version_counting",
    "forward_mode_enabled",
    "frozen_linear",
    "grouped_mm",
    "has_tangent",
    "in_transform",
    "is_batch_of_gradients",
    "is_exporting",
    "is_ordinary",
    "is_plain",
    "is_sole_owner",
    "kernels_only",
    "no_torch_function",
    "parameters",
    "privateuse1_device_type",
    "recorded_at_one_level",
    "returns_views",
    "schema",
    "tensor_without_memory",
    "version",
]

# An Autograd kernel of one's own: the public way (register_autograd) has no forward mode and
# refuses torch.func's transforms. The dispatcher calls such a kernel at one level of the transforms
# at a time, which is what a single-level function records.
recorded_at_one_level = enable_single_level_autograd_function
any_requires_grad = _any_requires_grad
any_autocast_enabled = _is_any_autocast_enabled
autocast_disabled = _DisableAutocast
# Within it, calls go to a device's kernels at once; for writes to tensors that autograd never saw.
kernels_only = _AutoDispatchBelowADInplaceOrView
forward_mode_enabled = _set_fwd_grad_enabled
privateuse1_device_type = _get_privateuse1_backend_name
# What torch.nn.functional.grouped_mm calls, and a tensor class is told of.
grouped_mm = torch._grouped_mm
# Of a tensor class that the dispatcher asks alone.
no_torch_function: Callable[..., Any] = _disabled_torch_function_impl


_unpack_dual = _VariableFunctions._unpack_dual  # found once: looking it up takes longer than it
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))
_T = TypeVar("_T", bound=Tensor)


class Overload(Protocol):
    """One overload of an operator, as ``torch.ops`` has it."""

    _schema: FunctionSchema

    @property
    def overloadpacket(self) -> Callable[..., Any]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def name(self) -> str: ...
    def redispatch(self, keyset: DispatchKeySet, /, *args: Any) -> Any: ...


class Node(_SingleLevelFunction):
    """The base of this package's autograd functions."""

    if TYPE_CHECKING:  # C++ has it

        @classmethod
        def apply(cls, *args: object) -> Tensor: ...

    # Compiled autograd asks for it; only the public Function has it.
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def below_autograd(op: Overload, keyset: DispatchKeySet, *args: Any) -> Any:
    """Call what the dispatcher has below the Autograd kernel that was called with ``keyset``."""
    with _AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _after_autograd_keyset, *args)


def below_version_counting(op: Overload, keyset: DispatchKeySet, *args: Any) -> Any:
    """Call what the dispatcher has below the ADInplaceOrView kernel."""
    with _AutoDispatchBelowADInplaceOrView():
        return op.redispatch(keyset & _after_ADInplaceOrView_keyset, *args)


def is_exporting() -> bool:
    """Return what ``torch.compiler.is_exporting`` does.

    That function is true to the compiler of torch 2.10 whenever it compiles.
    """
    return torch.compiler._is_exporting_flag


def is_batch_of_gradients(t: Tensor) -> bool:
    """Return whether a tensor stands for a batch of them (``is_grads_batched``)."""
    return _functorch.is_legacy_batchedtensor(t)


def has_tangent(*tensors: Tensor) -> bool:
    """Return whether forward mode has a tangent for one of them.

    The tensors themselves are asked: Python does not know of a level that C++ entered.
    """
    if not _is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    with _DisableTorchDispatch():  # the question is not part of a graph that is being traced
        return any([_unpack_dual(t, 0)[1] is not None for t in tensors])


def in_transform() -> bool:
    """Return whether one of torch.func's transforms is at work."""
    return _functorch.peek_interpreter_stack() is not None


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Return whether a call on these is an ordinary one: nothing traces, wraps or transforms it.

    But for forward mode: a tensor may have a tangent.
    """
    return (
        not torch.compiler.is_compiling()
        and _PLAIN_TYPES.issuperset(map(type, tensors))
        and _functorch.peek_interpreter_stack() is None
        and _len_torch_dispatch_stack() == 0
        and _get_tracing_state() is None
    )


def is_plain(*tensors: Tensor) -> bool:
    """Return whether a call on these is an ordinary one, in which no tensor has a tangent."""
    return is_ordinary(*tensors) and not has_tangent(*tensors)


_OF_TORCH = (torch.nn.Linear.__call__, torch.nn.Linear.forward, torch.nn.functional.linear)


def _sees_functions() -> bool:
    """Return whether a mode sees calls of torch's functions, other than the default device's."""
    count = _len_torch_function_stack()
    return count > 0 and any(
        type(_get_function_stack_at(i)) is not DeviceContext for i in range(count)
    )


def frozen_linear(module: torch.nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias if a call of a module is nothing but ``F.linear`` with frozen ones.

    Otherwise None: another class, hooks, a forward of the module's own, a function or class of
    torch's that was patched, parameters that are trained or that stand for others.
    """
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if (
        type(module) is not torch.nn.Linear
        or type(weight) is not torch.nn.Parameter
        or weight.requires_grad
        or (bias is not None and (type(bias) is not torch.nn.Parameter or bias.requires_grad))
        or "bias" not in parameters
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or _sees_functions()
    ):
        return None
    linear = torch.nn.Linear
    if (linear.__call__, linear.forward, torch.nn.functional.linear) != _OF_TORCH:
        return None
    return weight, bias


def parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return a module's own parameters, to change: also where its class has such a name itself."""
    return module._parameters


def tensor_without_memory(cls: type[_T], like: Tensor, device: torch.device) -> _T:
    """Make a tensor of a class with ``__torch_dispatch__``: metadata alone."""
    return Tensor._make_wrapper_subclass(
        cls,
        like.shape,
        strides=like.stride(),
        storage_offset=like.storage_offset(),
        dtype=like.dtype,
        device=device,
    )


def version(t: Tensor) -> int:
    """Return autograd's count of writes to a tensor."""
    return t._version


def schema(op: Overload) -> FunctionSchema:
    """Return an operator's schema."""
    return op._schema


def returns_views(schema: FunctionSchema) -> bool:
    """Return whether an operator's results are views of an argument."""
    aliases = [result.alias_info for result in schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _owners(t: Tensor) -> tuple[int, ...]:
    """Count who refers to a tensor, the one it is a view of, and their memory."""
    memory = t.untyped_storage()
    of_base: tuple[int, ...] = ()
    if t._is_view():
        base: Any = t._base
        of_base = sys.getrefcount(base), base._use_count()
    return (
        sys.getrefcount(t),
        t._use_count(),  # type: ignore[attr-defined]  # torch's stubs leave it out
        sys.getrefcount(memory),
        _storage_Use_Count(memory._cdata),
        *of_base,
    )


def _owners_within(t: Tensor) -> tuple[int, ...]:
    return _owners(t)


def _owners_of_new_tensors() -> Iterator[tuple[int, ...]]:
    t = torch.empty(1)
    yield _owners_within(t)  # from as deep as is_sole_owner
    t = torch.empty(1).view(1, 1)  # of a tensor that nothing else has, as nn.Linear returns it
    yield _owners_within(t)


_ALONE = frozenset(_owners_of_new_tensors())


def is_sole_owner(t: Tensor) -> bool:
    """Return whether nothing but one variable of the caller's refers to a tensor or its memory.

    No hook, mode, module, view or saved tensor has it then, so writing into it is seen by nobody.
    Memory that torch did not allocate (an array's, which others may hold) cannot be resized, and
    counts as somebody else's; so do results whose elements do not lie one after the other.
    """
    return (
        t.is_contiguous()
        and not t._is_zerotensor()
        and t.untyped_storage().resizable()
        and _owners(t) in _ALONE
    )
