"""What a configuration of the PEFT library, a ``peft.C3AConfig``, means to ``patch_model``.

The library is imported only to ask it which modules it would choose.
"""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import nn

from .names import shown
from .sizes import is_count


@runtime_checkable
class PeftConfig(Protocol):
    """What every configuration of the PEFT library has; which ones will do, ``meaning_of`` says."""

    @property
    def peft_type(self) -> Any: ...


class Meaning(NamedTuple):
    """A configuration in the words of ``patch_model``, modules by their whole names."""

    block_sizes: dict[str, int]
    modules_to_save: tuple[str, ...]
    init: str
    task_type: str | None


_WHO = "c3a.patch_model: C3AConfig"
# What get_peft_model adds to modules_to_save, where the model has it.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_INITS = {
    True: "zeros",
    False: "xavier_uniform",
    "xavier_uniform": "xavier_uniform",
    "kaiming_uniform": "kaiming_uniform",
    "gaussian": "gaussian",
}
_READ = {
    *("bias", "block_size", "block_size_pattern", "exclude_modules", "inference_mode"),
    *("init_weights", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type"),
    *("target_modules", "task_type"),
}
_OF_FILES = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision"}


def meaning_of(config: Any, model: nn.Module) -> Meaning:
    """Return what a configuration means for a model. Changes neither.

    Raises TypeError for what is no C3AConfig, and ValueError, with the setting's name, for what
    cannot be honoured.
    """
    kind = getattr(config, "peft_type", None)
    if getattr(kind, "value", kind) != "C3A":
        raise TypeError(
            f"c3a.patch_model: expected config to be a C3AConfig, got a {type(config).__name__}; "
            "pass what it holds: target_modules=config.target_modules, block_size='auto', "
            "modules_to_save=config.modules_to_save or ()"
        )
    _refuse_the_rest(config)
    init = _init_of(getattr(config, "init_weights", "xavier_uniform"))
    task: Any = getattr(config, "task_type", None)
    task = getattr(task, "value", task)
    names = [name for name, _ in model.named_modules() if name]
    wanted, saved = _modules_to_save(config, task, names)

    asked = copy.copy(config)  # in which PEFT writes, as it resolves what to adapt
    asked.modules_to_save = [*wanted, *_HEADS.get(task or "", ())] or None
    chosen = _chosen_by_peft(asked, model, names)
    if not chosen:
        raise ValueError(
            f"{_WHO}.target_modules: expected to match modules, {shown(config.target_modules)} "
            "matches none that the other settings leave"
        )
    return Meaning(block_sizes_of(config, chosen), saved, init, task)


def block_sizes_of(config: Any, names: Iterable[str]) -> dict[str, int]:
    """Return the block sizes that a configuration gives to what has these names."""
    pattern = getattr(config, "block_size_pattern", None) or {}
    sizes = {name: _block_size_of(pattern, config.block_size, name) for name in names}
    for name, size in sizes.items():
        if not is_count(size):
            raise ValueError(
                f"{_WHO}.block_size: expected a whole number >= 1, got {shown(size)} for {name}"
            )
    return sizes


def _refuse_the_rest(config: Any) -> None:
    if (bias := getattr(config, "bias", "none")) != "none":
        raise ValueError(f"{_WHO}.bias: expected 'none', for biases stay frozen, got {bias!r}")
    if getattr(config, "inference_mode", False):
        raise ValueError(
            f"{_WHO}.inference_mode: expected False, for what is patched is to be trained, got "
            "True; c3a.load_adapter(model, folder) loads what is trained"
        )
    for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        value = getattr(config, field.name)
        usual = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        if field.name not in _READ | _OF_FILES and value and value != usual:
            raise ValueError(
                f"{_WHO}.{field.name}: expected {usual!r}, for no other is known here, got "
                f"{shown(value)}"
            )


def _init_of(init_weights: object) -> str:
    if isinstance(init_weights, bool | str) and init_weights in _INITS:
        return _INITS[init_weights]
    raise ValueError(
        f"{_WHO}.init_weights: expected one of {list(_INITS)}, got {shown(init_weights)}"
    )


def _modules_to_save(
    config: Any, task: str | None, names: list[str]
) -> tuple[list[str], tuple[str, ...]]:
    """Return the ends of names that are wanted, and the modules that have them."""
    wanted = list(getattr(config, "modules_to_save", None) or ())
    usual = _HEADS.get(task or "", ())
    for end in wanted:
        # get_peft_model writes its usual names into the configuration that it is given.
        if end not in usual and not any(name.endswith(end) for name in names):
            raise ValueError(f"{_WHO}.modules_to_save: no module is named {end!r}")
    ends = (*wanted, *usual)
    return wanted, tuple(name for name in names if ends and name.endswith(ends))


def _chosen_by_peft(config: Any, model: nn.Module, names: list[str]) -> list[str]:
    """Return the names of the modules that the PEFT library would adapt, in their order."""
    from peft.tuners.c3a import C3AModel
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from peft.utils import TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING

    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        known: Mapping[str, Any] = TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING
        usual = known.get(kind or "")
        if usual is None:
            raise ValueError(
                f"{_WHO}.target_modules: expected names, for PEFT has none for models of type "
                f"{kind!r}, got None"
            )
        config.target_modules = usual if isinstance(usual, str) else set(usual)
    config = _maybe_include_all_linear_layers(config, model)
    return [name for name in names if C3AModel._check_target_module_exists(config, name)]


def _block_size_of(pattern: Mapping[str, int], default: int, name: str) -> int:
    """As PEFT's C3AModel: the first key that ends a longer name counts, then the whole name."""
    try:
        key = next((key for key in pattern if re.match(rf".*\.{key}$", name)), name)
    except re.error as error:
        raise ValueError(
            f"{_WHO}.block_size_pattern: expected regular expressions, got {shown(dict(pattern))}: "
            f"{error}"
        ) from None
    return pattern.get(key, default)
