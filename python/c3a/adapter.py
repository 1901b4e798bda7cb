"""Adapters on disk, in the PEFT library's format: ``adapter_model.safetensors`` (keys
``base_model.model.<layer>.c3a_kernel``, and the ``modules_to_save`` beside them) and
``adapter_config.json`` with ``peft_type: "C3A"``.

That format has no scale: it is ``1 / in_features``. A layer's own scale is multiplied into the
kernel that is stored.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import replacing
from .linear import C3ALinear
from .patch import (
    PatchPlan,
    adapted_layers,
    apply_patch,
    block_size_from_pattern,
    matches,
    modules_to_save,
    plan_patch,
    unwrapped,
)
from .sizes import features, kernel_shape

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_INIT_WEIGHTS = {"zeros": True}  # PEFT's name for it; the others are the same


def save_adapter(model: nn.Module, folder: str | Path, *, task_type: str | None = None) -> Path:
    """Write a patched model's adapter in PEFT's format.

    ``peft.PeftModel.from_pretrained(base_model, folder)`` and ``c3a.load_adapter`` read it, with
    equal outputs. Each of the two files is written whole or not at all.

    Args:
        model: a model that ``patch_model`` or ``C3ALinear`` has adapted.
        folder: created if need be.
        task_type: for the configuration, such as ``"SEQ_CLS"`` or ``"CAUSAL_LM"``.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no adapted layer, or layers that are wrapped twice.
    """
    model = unwrapped(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("c3a.save_adapter: the model has no C3ALinear layer; patch it first")
    nested = [
        name
        for name, layer in layers.items()
        if any(isinstance(part, C3ALinear) for part in layer.base_layer.modules())
    ]
    if nested:
        raise ValueError(
            f"c3a.save_adapter: the format holds one adapter a layer; {nested[0]} has several"
        )
    saved = modules_to_save(model)
    tensors = {
        f"{_PREFIX}{name}.c3a_kernel": _to_stored(layer.c3a_kernel.detach(), layer)
        for name, layer in layers.items()
    }
    for name in saved:
        for key, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"{_PREFIX}{name}.{key}"] = tensor
    left_out = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and f"{_PREFIX}{name}" not in tensors
    ]
    if left_out:
        warnings.warn(
            f"c3a.save_adapter: not saved, though trainable: {', '.join(left_out[:5])}"
            f"{', ...' if len(left_out) > 5 else ''}; name their modules in modules_to_save",
            stacklevel=2,
        )
    # Clones: safetensors takes no memory that two tensors share.
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    config = json.dumps(_config_of(model, layers, saved, task_type), indent=2, sort_keys=True)
    folder = Path(folder)
    with replacing(folder / WEIGHTS, folder / CONFIG) as (weights, configuration):
        save_file(tensors, weights, metadata={"format": "pt"})
        configuration.write_text(config + "\n", encoding="utf-8")
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load an adapter that ``save_adapter`` or the PEFT library wrote.

    A model that is not patched yet is patched from the adapter's configuration first. Everything is
    checked before anything changes. Reads safetensors only, from a local folder.

    Args:
        model: the base model, or one patched with the same layers and block sizes.
        folder: holds ``adapter_model.safetensors`` and ``adapter_config.json``.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: another kind of adapter, keys that are missing or unknown, shapes that differ,
            or an adapter for another model; the message names them. The model is then as it was.
    """
    inner = unwrapped(model)
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder)
    layers = adapted_layers(inner)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("c3a.load_adapter: the model is merged; call c3a.unmerge first")
    plan = None if layers else _plan_of(inner, config)
    shapes = _expected_shapes(inner, layers, plan)
    _check_tensors(tensors, shapes, folder)
    if plan:
        dtype = next(iter(kernels(tensors).values())).dtype
        apply_patch(inner, plan, dtype=dtype, pad=True)
        layers = adapted_layers(inner)
    with torch.no_grad():
        for name, layer in layers.items():
            stored = tensors.pop(f"{_PREFIX}{name}.c3a_kernel")
            layer.c3a_kernel.copy_(_from_stored(stored, layer))
        state = inner.state_dict(keep_vars=True)
        for key, tensor in tensors.items():
            state[key.removeprefix(_PREFIX)].copy_(tensor)
    return model


def read_config(folder: Path) -> dict:
    """Read and check ``adapter_config.json``; ValueError unless it is a C3A adapter's."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"c3a: no {CONFIG} in {folder} (adapters are read from local folders; nothing is "
            "fetched)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"c3a: {path} is not JSON: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "C3A":
        raise ValueError(f'c3a: expected "peft_type": "C3A" in {path}, got {kind!r}')
    if config.get("bias", "none") != "none":
        raise ValueError(f"c3a: {path} has bias={config['bias']!r}; only 'none' can be loaded")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``adapter_model.safetensors`` onto the CPU."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        hint = "; adapter_model.bin is a pickle, which is never read" if pickled else ""
        raise FileNotFoundError(f"c3a: no {WEIGHTS} in {folder}{hint}")
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"c3a: {path} is not a whole safetensors file: {error}") from None


def kernels(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the kernels of an adapter file by layer, as stored (scale ``1 / in_features``)."""
    return {
        key.removeprefix(_PREFIX).removesuffix(".c3a_kernel"): tensor
        for key, tensor in tensors.items()
        if key.endswith(".c3a_kernel")
    }


def _to_stored(kernel: Tensor, layer: C3ALinear) -> Tensor:
    if layer.scale == 1 / layer.in_features:
        return kernel
    return kernel * (layer.scale * layer.in_features)


def _from_stored(stored: Tensor, layer: C3ALinear) -> Tensor:
    if layer.scale == 1 / layer.in_features:
        return stored
    return stored / (layer.scale * layer.in_features)


def _config_of(
    model: nn.Module, layers: Mapping[str, C3ALinear], saved: tuple[str, ...], task_type: str | None
) -> dict:
    sizes = {name: layer.block_size for name, layer in layers.items()}
    usual, pattern = _block_sizes_of(sizes)
    inits = {layer.init for layer in layers.values()}
    init = inits.pop() if len(inits) == 1 else "zeros"
    return {
        "auto_mapping": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "bias": "none",
        "block_size": usual,
        "block_size_pattern": pattern,
        "inference_mode": True,
        "init_weights": _INIT_WEIGHTS.get(init, init),
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": list(saved) or None,
        "peft_type": "C3A",
        "revision": None,
        "target_modules": _targets_of(model, set(layers)),
        "task_type": task_type,
    }


def _block_sizes_of(sizes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return the default and the pattern that mean these block sizes to PEFT and here.

    A name in the pattern is also a regular expression for the ends of longer names, so not every
    choice of the default will do.
    """

    def meant(name: str, usual: int, pattern: dict[str, int]) -> set[int | None]:
        theirs = next((key for key in pattern if re.match(rf".*\.{key}$", name)), name)
        return {pattern.get(theirs, usual), block_size_from_pattern(pattern, name) or usual}

    values = list(sizes.values())
    for usual in sorted(set(values), key=lambda size: (-values.count(size), size)):
        # in the order of the file, since the first key that matches counts
        pattern = {name: size for name, size in sorted(sizes.items()) if size != usual}
        if all(meant(name, usual, pattern) == {size} for name, size in sizes.items()):
            return usual, pattern
    raise ValueError(
        "c3a.save_adapter: PEFT's configuration cannot tell these block sizes apart, as some names "
        f"end in others: {dict(sizes)}"
    )


def _targets_of(model: nn.Module, adapted: set[str]) -> list[str] | str:
    """Return the shortest ``target_modules`` that mean exactly these layers in this model."""
    names = [name for name, _ in model.named_modules() if name]
    names = [n for n in names if not any(n.startswith(f"{layer}.") for layer in adapted)]
    ends = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    exact = "|".join(re.escape(name) for name in sorted(adapted))
    for targets in (ends, sorted(adapted)):
        if {name for name in names if matches(targets, name)} == adapted:
            return targets
    return exact


def _plan_of(model: nn.Module, config: Mapping) -> PatchPlan:
    targets = config.get("target_modules")
    if not targets:
        raise ValueError("c3a.load_adapter: the configuration names no target_modules")
    if not isinstance(targets, str):
        targets = list(targets)
    pattern = config.get("block_size_pattern") or {}
    default = config.get("block_size")
    in_layers = _layer_filter(config)

    def is_target(name: str, module: nn.Module) -> bool:
        return matches(targets, name) and in_layers(name)

    def chosen_size(name: str) -> int:
        return block_size_from_pattern(pattern, name) or default

    # PEFT lists every usual name of a head; which of them there are, the tensors tell.
    saved = [
        name
        for name in config.get("modules_to_save") or ()
        if any(matches([name], module) for module, _ in model.named_modules() if module)
    ]
    meant = "all-linear" if targets == "all-linear" else is_target
    try:
        any_size = plan_patch(model, meant, 1, modules_to_save=saved)
    except (ValueError, TypeError) as error:
        message = str(error).removeprefix("c3a.patch_model: ")
        raise ValueError(
            f"c3a.load_adapter: the adapter does not fit this model: target_modules {targets!r}: "
            f"{message}"
        ) from None
    sizes = {name: chosen_size(name) for name in any_size.block_sizes}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"c3a.load_adapter: the configuration gives {name} block size {size!r}"
            )
    return PatchPlan(sizes, any_size.modules_to_save)


def _layer_filter(config: Mapping):
    """Return the test that ``layers_to_transform`` and ``layers_pattern`` make of a name."""
    indices = config.get("layers_to_transform")
    if indices is None or indices == []:
        return lambda name: True
    indices = {indices} if isinstance(indices, int) else set(indices)
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbered = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
    numbered = numbered or [r".*?\.[^.]*\.(?P<index>\d+)\."]

    def in_layers(name: str) -> bool:
        match = next(filter(None, (re.match(pattern, name) for pattern in numbered)), None)
        return match is not None and int(match["index"]) in indices

    return in_layers


def _expected_shapes(
    model: nn.Module, layers: Mapping[str, C3ALinear], plan: PatchPlan | None
) -> dict[str, tuple[int, ...]]:
    shapes = {f"{n}.c3a_kernel": tuple(layer.c3a_kernel.shape) for n, layer in layers.items()}
    for name, b in plan.block_sizes.items() if plan else ():
        shapes[f"{name}.c3a_kernel"] = kernel_shape(*features(model.get_submodule(name)), b)
    for name in plan.modules_to_save if plan else modules_to_save(model):
        for key, tensor in model.get_submodule(name).state_dict().items():
            shapes[f"{name}.{key}"] = tuple(tensor.shape)
    return {f"{_PREFIX}{key}": shape for key, shape in shapes.items()}


def _check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    problems = [f"missing: {key}" for key in shapes if key not in tensors]
    problems += [f"unknown: {key}" for key in tensors if key not in shapes]
    problems += [
        f"{key}: expected shape {shape}, got {tuple(tensors[key].shape)}"
        for key, shape in shapes.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ValueError(
            f"c3a.load_adapter: {folder / WEIGHTS} does not fit the model:\n  " + "\n  ".join(shown)
        )
