"""The private names of torch that the package uses: each has a test that fails by its name."""

import ast
from pathlib import Path

import pytest
import torch

import c3a
from c3a import _private

NAMES = [
    "torch._C.DispatchKeySet",
    "torch._C.FunctionSchema",
    "torch._C._after_ADInplaceOrView_keyset",
    "torch._C._after_autograd_keyset",
    "torch._C._any_requires_grad",
    "torch._C._AutoDispatchBelowADInplaceOrView",
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._disabled_torch_function_impl",
    "torch._C._DisableAutocast",
    "torch._C._functorch",
    "torch._C._get_function_stack_at",
    "torch._C._get_privateuse1_backend_name",
    "torch._C._get_tracing_state",
    "torch._C._is_any_autocast_enabled",
    "torch._C._DisableTorchDispatch",
    "torch._C._is_fwd_grad_enabled",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._len_torch_function_stack",
    "torch._C._storage_Use_Count",
    "torch._C._VariableFunctions",
    "torch._functorch.utils.enable_single_level_autograd_function",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch.autograd.function.FunctionMeta",
    "torch.autograd.function._SingleLevelFunction",
    "torch.nested._internal.nested_tensor.NestedTensor",
    "torch.nn.modules.module._has_any_global_hook",
    "torch.utils._device.DeviceContext",
]
# What is reached through those and through public names.
ATTRIBUTES = [
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._VariableFunctions._unpack_dual",
    "torch.autograd.Function._compiled_autograd_key",
    "torch._grouped_mm",
    "torch.Tensor._base",
    "torch.Tensor._is_view",
    "torch.Tensor._is_zerotensor",
    "torch.Tensor._make_wrapper_subclass",
    "torch.Tensor._use_count",
    "torch.Tensor._version",
    "torch.UntypedStorage._cdata",
    "torch.compiler._is_exporting_flag",
    "torch._ops.OpOverload.redispatch",
    "torch._ops.OpOverload._schema",
    "torch.nn.Module._backward_hooks",
    "torch.nn.Module._backward_pre_hooks",
    "torch.nn.Module._compiled_call_impl",
    "torch.nn.Module._forward_hooks",
    "torch.nn.Module._forward_pre_hooks",
    "torch.nn.Module._parameters",
]
PACKAGE = Path(c3a.__file__).parent


@pytest.mark.parametrize("name", NAMES + ATTRIBUTES)
def test_torch_has(name):
    found = torch
    for part in name.split(".")[1:]:
        if part == "_schema":
            found = torch.ops.aten.add.Tensor
        if found is torch.nn.Module:  # the instances have them
            found = torch.nn.Module()
        assert hasattr(found, part), f"this torch has no {name}"
        found = getattr(found, part)


def imported_from_torch(source: Path) -> set[str]:
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch")
        for alias in node.names
    }


def test_the_list_is_that_of_the_one_file_that_uses_them():
    assert set(NAMES) == imported_from_torch(PACKAGE / "_private.py") - {"torch.Tensor"}


def attributes_of_torch(path: Path) -> set[str]:
    """Return the private attributes that a file asks of torch's objects."""
    names = {name.rpartition(".")[2] for name in NAMES + ATTRIBUTES}
    found = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    return found & {name for name in names if name.startswith("_")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_other_file_uses_one(path):
    if path.name == "_private.py":
        return
    imported = {name for name in imported_from_torch(path) if "._" in name}
    reached = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._")
    }
    assert not imported
    assert attributes_of_torch(path) == set()
    assert reached <= {"torch._check", "torch.__version__"}


def test_a_new_tensor_has_one_owner_and_one_that_anything_holds_has_more():
    t = torch.zeros(3)
    found = [_private.is_sole_owner(t)]  # not within an assertion, which pytest gives variables
    held = [t]
    found.append(not _private.is_sole_owner(t))
    held.clear()
    found.append(_private.is_sole_owner(t))
    for hold in (lambda t: t.view(-1), lambda t: t.detach(), lambda t: t[0]):
        other = hold(t)
        found.append(not _private.is_sole_owner(t))
        del other
        found.append(_private.is_sole_owner(t))
    array = t.numpy()
    found.append(not _private.is_sole_owner(t))
    del array
    found.append(not _private.is_sole_owner(t))  # from now on to torch it is not its own memory
    x = torch.zeros(3, requires_grad=True)
    y = x.exp()  # which saves its result
    found.append(not _private.is_sole_owner(y))
    y = x * 2
    found.append(_private.is_sole_owner(y))
    whole = x * 2
    y = whole.view(1, 3)
    found.append(not _private.is_sole_owner(y))
    del whole
    found.append(_private.is_sole_owner(y))
    assert found == [True] * len(found)
