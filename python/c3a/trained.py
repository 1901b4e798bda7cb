"""Checkpoints of what training changes: the frozen base stays where it was loaded from."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import nn

from .linear import C3ALinear

_T = TypeVar("_T")


def trained_of(model: nn.Module, state: Mapping[str, _T]) -> dict[str, _T]:
    """Return what training changes of a state dict of the model's.

    That is all but frozen parameters and what adapted layers' base layers have. Other buffers count
    as trained: norms write statistics into them.
    """
    is_frozen = _test_of(model)
    return {key: value for key, value in state.items() if not is_frozen(key)}


def take_without_base(model: nn.Module, stack: ExitStack) -> None:
    """Until ``stack`` is closed, ``load_state_dict`` misses nothing frozen where all of it is."""

    def forgive(_model: nn.Module, found: Any) -> None:
        if _frozen(model) <= set(found.missing_keys):
            is_frozen = _test_of(model)
            found.missing_keys[:] = [key for key in found.missing_keys if not is_frozen(key)]

    stack.callback(model.register_load_state_dict_post_hook(forgive).remove)


def give_without_base(model: nn.Module, stack: ExitStack) -> None:
    """Until ``stack`` is closed, the model's own ``state_dict`` has nothing frozen."""

    def leave_out(_model: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        is_frozen = _test_of(model)
        for key in [key for key in state if is_frozen(key.removeprefix(prefix))]:
            del state[key]

    stack.callback(model.register_state_dict_post_hook(leave_out).remove)


def _frozen(model: nn.Module) -> set[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if not parameter.requires_grad}


def _test_of(model: nn.Module) -> Callable[[str], bool]:
    frozen = _frozen(model)
    bases = tuple(
        f"{name}.base_layer.".removeprefix(".")
        for name, part in model.named_modules(remove_duplicate=False)
        if isinstance(part, C3ALinear)
    )
    return lambda key: key in frozen or key.startswith(bases)
