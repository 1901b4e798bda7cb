"""Saving a patched model's adapter and loading one: what a model and an adapter's folder mean.

The folder is in the PEFT library's format: keys ``base_model.model.<layer>.c3a_kernel``, and the
``modules_to_save`` beside them. What PEFT does not know are experts: their kernels, of shape
(experts, m, n, b), have keys ``base_model.model.<parameter>.c3a_kernel``, and the configuration has
``target_parameters``, as that of its LoRA. That format has no scale: it is ``1 / in_features``. A
layer's own scale is multiplied into the kernel that is stored.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import distributed
from .adapter_files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Adapter,
    LayerFacts,
    kernel_key,
    read,
    read_adapter,
    said_by,
    write,
)
from .experts import ADAPTERS, C3AExperts, adapted_experts, stacks
from .linear import C3ALinear
from .names import ends, first_keys, fully_matched, layer_numbers, matches, shown
from .patch import (
    Chosen,
    Model,
    PatchPlan,
    adapted_layers,
    adapters,
    apply_patch,
    as_trained,
    configured_task,
    modules_to_save,
    peft_layer,
    plan_patch,
    unwrapped,
)
from .sizes import check_block_size, kernel_shape, linear_features

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Adapter",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]
_N = TypeVar("_N", int, float)
_INIT_WEIGHTS = {"zeros": True}  # PEFT's name for it; the others are the same


def save_adapter(model: nn.Module, folder: str | Path, *, task_type: str | None = None) -> Path:
    """Write a patched model's adapter in PEFT's format.

    ``peft.PeftModel.from_pretrained(base_model, folder)`` and ``c3a.load_adapter`` read it, with
    equal outputs. To ``c3a.load_adapter`` a folder holds the old adapter or the new one at any
    moment, also where the process is killed; to PEFT each of the two files does.

    Args:
        model: a model that ``patch_model`` or ``C3ALinear`` has adapted. What accelerate has
            offloaded is read from where it is.
        folder: created if need be.
        task_type: for the configuration, such as ``"SEQ_CLS"`` or ``"CAUSAL_LM"``; by default what
            the ``config`` of ``patch_model`` named.

    Returns:
        The folder. Of a sharded model every process calls this; the first one writes.

    Raises:
        ValueError: the model has no adapted layer, layers that are wrapped twice, PEFT's adapters,
            tensors on the meta device without values anywhere, or a scale that the stored kernel
            has no room for.

    Warns of what is trainable and not saved, and of layers that PEFT cannot adapt.

    >>> import c3a, torch
    >>> model = c3a.patch_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), ["0"], 4)
    >>> sorted(file.name for file in c3a.save_adapter(model, "my_adapter").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    model, folder = unwrapped(model), Path(folder)
    distributed.reshard(model)
    with said_by("c3a.save_adapter"), as_trained(model):
        tensors, config, facts = adapter_of(model, task_type)
    _warn_of_what_is_left_out(model, tensors)
    warn_of_what_peft_cannot_load(
        "c3a.save_adapter: c3a.load_adapter can load this adapter into such a model, the PEFT "
        "library cannot",
        adapters(model),
    )
    if distributed.is_sharded(model):
        distributed.by_one_process(lambda: write(folder, tensors, config, facts))
    else:
        write(folder, tensors, config, facts)
    return folder


def adapter_of(
    model: nn.Module, task_type: str | None, state: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, LayerFacts]]:
    """Return what is stored of a patched model's adapter: tensors, configuration, layers' facts.

    Args:
        model, task_type: as for ``save_adapter``, without wrappers.
        state: where it has a tensor of the model's (and its values), that one counts.

    Raises ValueError as ``save_adapter``.
    """
    layers = adapted_layers(model)
    adapted = adapters(model)
    if not adapted:
        raise ValueError("the model has no C3ALinear layer; patch it first")
    if name := peft_layer(model):
        raise ValueError(
            f"the model holds the PEFT library's adapters ({name} is one of its layers), which "
            "are not saved here: take them out with PEFT's model.unload() first"
        )
    nested = [
        name
        for name, layer in layers.items()
        if any(isinstance(part, C3ALinear) for part in layer.base_layer.modules())
    ]
    if nested:
        raise ValueError(f"the format holds one adapter a layer; {nested[0]} has several")
    saved = modules_to_save(model)
    given = {key: distributed.whole(t) for key, t in (state or {}).items() if _has_values(t)}
    # Copies: safetensors takes no memory that two tensors share.
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted.items():
        kernel = given.get(_kernel_name(name, layer))
        if kernel is None:
            kernel = kernel_of(name, layer)
        tensors[kernel_key(name)] = _to_stored(name, layer, kernel).cpu().contiguous().clone()
    for name in saved:
        module = model.get_submodule(name)
        with _onloaded(name, module, module.modules(), lambda part: _state(part).values()):
            for key, tensor in _state(module).items():
                key = f"{name}.{key}"
                value = distributed.whole(given.get(key, tensor)).detach()
                tensors[f"{PREFIX}{key}"] = value.cpu().contiguous().clone()
    task = configured_task(model) if task_type is None else task_type
    return tensors, _config_of(model, adapted, saved, task), _facts_of(layers)


def _kernel_name(name: str, layer: C3ALinear | C3AExperts) -> str:
    """Return the name of a kernel among a model's parameters."""
    if isinstance(layer, C3AExperts):
        owner, _, key = name.rpartition(".")
        name = f"{owner}.{ADAPTERS}.{key}".strip(".")
    return f"{name}.c3a_kernel"


def _facts_of(layers: Mapping[str, C3ALinear]) -> dict[str, LayerFacts]:
    facts = {
        name: LayerFacts(
            layer.in_features, layer.out_features, not hasattr(layer.base_layer, "in_features")
        )
        for name, layer in layers.items()
    }
    return {
        name: known
        for name, known in facts.items()
        if known.fan_in_fan_out
        or known.in_features % layers[name].block_size
        or known.out_features % layers[name].block_size
    }


def kernel_of(name: str, layer: C3ALinear | C3AExperts) -> Tensor:
    """Return a layer's kernel, from where accelerate has put it if it is offloaded."""
    with _onloaded(name, layer, [layer], lambda layer: [layer.c3a_kernel]):
        return distributed.whole(layer.c3a_kernel.detach())


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Load an adapter that ``save_adapter`` or the PEFT library wrote.

    A model that is not patched yet is patched from the adapter's configuration first. Everything is
    checked before anything changes. Reads safetensors only, from a local folder; regular
    expressions of its configuration get seconds.

    Args:
        model: the base model, or one patched with the same layers and block sizes.
        folder: holds ``adapter_model.safetensors`` and ``adapter_config.json``.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: another kind of adapter, keys that are missing or unknown, shapes or dtypes that
            differ, an adapter for another model, or a model that cannot take one: merged, on the
            meta device, or with PEFT's adapters; the message names file and key. The model is then
            as it was.

    Warns of kernels that are not finite.

    >>> import c3a, copy, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> model = c3a.patch_model(copy.deepcopy(base), ["0"], 4, init="gaussian")
    >>> folder = c3a.save_adapter(model, "my_adapter")
    >>> x = torch.randn(3, 8)
    >>> torch.equal(c3a.load_adapter(base, folder)(x), model(x))
    True
    """
    inner = unwrapped(model)
    with said_by("c3a.load_adapter"):
        if name := peft_layer(inner):
            raise ValueError(
                f"the model holds the PEFT library's adapters ({name} is one of its layers): load "
                "another with PEFT's model.load_adapter(folder, name), or take them out with "
                "PEFT's model.unload() and load into the model that it returns; where "
                "from_pretrained found them beside the model, use c3a.load_pretrained instead"
            )
        adapter = read(Path(folder))
        layers = adapters(inner)
        if any(layer.merged for layer in layers.values()):
            raise ValueError("the model is merged; call c3a.unmerge first")
        plan = None if layers else _plan_of(inner, adapter)
        _check_tensors(inner, layers, plan, adapter)
        _check_has_values(inner, layers, plan)
    if plan:
        dtypes = [kernel.dtype for kernel in adapter.kernels.values()]
        apply_patch(inner, plan, dtype=reduce(torch.promote_types, dtypes), pad=True)
        layers = adapters(inner)
    odd = []
    distributed.reshard(inner)
    with torch.no_grad(), as_trained(inner):
        for name, layer in layers.items():
            kernel = _from_stored(adapter.tensors.pop(kernel_key(name)), layer)
            kernel = kernel.to(layer.c3a_kernel.dtype)
            layer.c3a_kernel.copy_(distributed.placed_as(kernel, layer.c3a_kernel))
            if not kernel.isfinite().all():
                odd.append(name)
        state = inner.state_dict(keep_vars=True)
        for key, tensor in adapter.tensors.items():
            trained = state[key.removeprefix(PREFIX)]
            trained.copy_(distributed.placed_as(tensor, trained))
    if odd:
        warnings.warn(
            f"c3a.load_adapter: {adapter.weights_path} has kernels that are not finite: "
            f"{_some(odd)}",
            stacklevel=2,
        )
    return model


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: t.detach() for key, t in module.state_dict().items() if isinstance(t, Tensor)}


def _has_values(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


@contextmanager
def _onloaded(
    name: str,
    module: Model,
    parts: Iterable[nn.Module],
    tensors: Callable[[Model], Iterable[Tensor]],
) -> Iterator[None]:
    """Within the block, what accelerate has offloaded from some modules has its values."""
    with ExitStack() as stack:
        if any(tensor.is_meta for tensor in tensors(module)):
            for part in parts:
                if hasattr(part, "_hf_hook"):
                    from accelerate.utils import align_module_device

                    stack.enter_context(align_module_device(part))
            if any(tensor.is_meta for tensor in tensors(module)):
                raise ValueError(
                    f"{name} is on the meta device, where nothing has values, and accelerate has "
                    "not offloaded it either"
                )
        yield


def _to_stored(name: str, layer: C3ALinear | C3AExperts, kernel: Tensor) -> Tensor:
    kernel = kernel.detach()
    if layer.scale == 1 / layer.in_features:
        return kernel
    # A kernel of 16 bits has no room for the factor.
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    stored = (kernel.double() * (layer.scale * layer.in_features)).to(dtype)
    if not torch.equal(stored.isfinite(), kernel.isfinite()):
        raise ValueError(
            f"the kernel of {name} times its scale {layer.scale:g} is too large to be stored in "
            f"{dtype}"
        )
    return stored


def _from_stored(stored: Tensor, layer: C3ALinear | C3AExperts) -> Tensor:
    if layer.scale == 1 / layer.in_features:
        return stored
    return stored.double() / (layer.scale * layer.in_features)


def _warn_of_what_is_left_out(model: nn.Module, tensors: Collection[str]) -> None:
    kernels = {_kernel_name(name, adapter) for name, adapter in adapted_experts(model).items()}
    left_out = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and f"{PREFIX}{name}" not in tensors and name not in kernels
    ]
    if left_out:
        warnings.warn(
            f"c3a.save_adapter: not saved, though trainable: {_some(left_out)}; name their modules "
            "in modules_to_save",
            stacklevel=3,
        )


def warn_of_what_peft_cannot_load(
    consequence: str, adapted: Mapping[str, C3ALinear | C3AExperts]
) -> None:
    """Warn the caller's caller of a consequence, with the layers it is due to, if there are any."""
    layers = {name: layer for name, layer in adapted.items() if isinstance(layer, C3ALinear)}
    padded = [
        name
        for name, layer in layers.items()
        if layer.in_features % layer.block_size or layer.out_features % layer.block_size
    ]
    other = [
        f"{name} ({type(layer.base_layer).__name__})"
        for name, layer in layers.items()
        if name not in padded and not isinstance(layer.base_layer, nn.Linear)
    ]
    reasons = [f"it does not pad: {_some(padded)}"] if padded else []
    reasons += [f"it adapts torch.nn.Linear only: {_some(other)}"] if other else []
    experts = [name for name in adapted if name not in layers]
    reasons += [f"its C3A adapts no experts: {_some(experts)}"] if experts else []
    if reasons:
        warnings.warn(f"{consequence}; {'; '.join(reasons)}", stacklevel=3)


def _some(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:5])
    return f"{first}, ... ({len(names)})" if len(names) > 5 else first


# From a model to a configuration


def _config_of(
    model: nn.Module,
    adapted: Mapping[str, C3ALinear | C3AExperts],
    saved: tuple[str, ...],
    task_type: str | None,
) -> dict[str, Any]:
    inits = {layer.init for layer in adapted.values()}
    init = inits.pop() if len(inits) == 1 else "zeros"
    experts = adapted_experts(model)
    layers = frozenset(adapted) - experts.keys()
    return configuration(
        {name: layer.block_size for name, layer in adapted.items()},
        base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None),
        init_weights=_INIT_WEIGHTS.get(init, init),
        modules_to_save=list(saved) or None,
        target_modules=_targets_of(model, layers),
        task_type=task_type,
        **({"target_parameters": sorted(experts)} if experts else {}),
    )


# Settings that an adapter of any kind has, on what and for what it is.
COMMON_SETTINGS = (
    "base_model_name_or_path",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "revision",
    "target_modules",
    "task_type",
)


def configuration(sizes: Mapping[str, int], **settings: object) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter, given its layers' block sizes by name."""
    usual, pattern = as_pattern(sizes, "block sizes")
    return {
        **dict.fromkeys(COMMON_SETTINGS),
        "auto_mapping": None,
        "bias": "none",
        "block_size": usual,
        "block_size_pattern": pattern,
        "inference_mode": True,
        "init_weights": True,
        "peft_type": "C3A",
        **settings,
    }


def as_pattern(
    numbers: Mapping[str, int], what: str, first: int | None = None
) -> tuple[int, dict[str, int]]:
    """Return the default and the pattern that mean these numbers to PEFT and here.

    ``first`` is the default if it will do, otherwise the commonest number that will: a name in the
    pattern is also a regular expression for the ends of longer names. Raises ValueError, which says
    ``what`` they are, where none will.
    """
    names, values = list(numbers), list(numbers.values())

    def is_meant(usual: int, pattern: dict[str, int]) -> bool:
        keys = list(pattern)
        # PEFT counts a whole name as an end, older ones of it do not.
        newer, older = first_keys(keys, names), first_keys(keys, names, proper=True)
        return all(
            {
                of_pattern(pattern, name, here) or usual,
                pattern.get(here or name, usual),
                pattern.get(there or name, usual),
            }
            == {size}
            for (name, size), here, there in zip(numbers.items(), newer, older, strict=True)
        )

    for usual in sorted(set(values), key=lambda size: (size != first, -values.count(size), size)):
        # in the order of the file, since the first key that matches counts
        pattern = {name: size for name, size in sorted(numbers.items()) if size != usual}
        if is_meant(usual, pattern):
            return usual, pattern
    raise ValueError(
        f"PEFT's configuration cannot tell these {what} apart, as some names end in others: "
        f"{dict(numbers)}"
    )


def of_pattern(pattern: Mapping[str, _N], name: str, key: str | None) -> _N | None:
    """Return a layer's number, given the first key that matches an end of its name."""
    return pattern.get(name, None if key is None else pattern[key])


def _targets_of(model: nn.Module, adapted: frozenset[str]) -> list[str] | str:
    """Return the shortest ``target_modules`` that mean exactly these layers in this model."""

    def within(name: str) -> bool:
        parents = list(accumulate(name.split("."), "{}.{}".format))[:-1]
        return any(parent in adapted for parent in parents)

    names = [name for name, _ in model.named_modules() if name and not within(name)]
    for targets in (frozenset(name.rsplit(".", 1)[-1] for name in adapted), adapted):
        if {name for name in names if matches(targets, name)} == adapted:
            return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(adapted))


# From a configuration to a model


def _plan_of(model: nn.Module, adapter: Adapter) -> PatchPlan:
    config, source = adapter.config, adapter.config_source
    targets, parameters = config.get("target_modules"), config.get("target_parameters") or ()
    if not targets and not parameters:
        raise ValueError(f"{source} names no target_modules")
    names = [name for name, _ in model.named_modules() if name]
    words = f"target_modules {shown(targets)}"
    chosen = _chosen_of(config, source, names) if targets else set()
    if config.get("layers_to_transform") not in (None, []):
        words += f" in layers_to_transform {shown(config['layers_to_transform'])}"
    meant = "all-linear" if targets == "all-linear" else Chosen(chosen, words) if targets else None
    # PEFT lists every usual name of a head; which of them there are, the tensors tell.
    there = {end for name in names for end in ends(name)}
    saved = [name for name in config.get("modules_to_save") or () if name in there]
    try:
        any_size = plan_patch(
            model,
            meant,
            1,
            modules_to_save=list(dict.fromkeys(saved)),
            target_parameters=parameters,
        )
    except (ValueError, TypeError) as error:
        message = str(error).removeprefix("c3a.patch_model: ")
        raise ValueError(
            f"{source}: {words}: the adapter does not fit this model: {message}"
        ) from None
    sizes = _sizes_of(adapter, [*any_size.block_sizes, *any_size.parameter_sizes])
    found = _features_of(model, any_size)
    for name, size in sizes.items():
        may_pad = name in any_size.block_sizes
        with said_by(f"{source}: {name}"):
            check_block_size(size, *found[name][1:], may_pad, may_pad)
    return dataclasses.replace(
        any_size,
        block_sizes={name: sizes[name] for name in any_size.block_sizes},
        parameter_sizes={name: sizes[name] for name in any_size.parameter_sizes},
    )


def _features_of(model: nn.Module, plan: PatchPlan) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Return what stands before ``m, n, b`` in a kernel's shape, and in and out features."""
    found: dict[str, tuple[tuple[int, ...], int, int]] = {
        name: ((), *linear_features(model.get_submodule(name))) for name in plan.block_sizes
    }
    experts = stacks(model) if plan.parameter_sizes else {}
    for name in plan.parameter_sizes:
        found[name] = ((len(experts[name].weight),), *experts[name].features)
    return found


def _chosen_of(config: Mapping[str, Any], source: str, names: list[str]) -> set[str]:
    targets = config["target_modules"]
    if isinstance(targets, str):
        with said_by(f"{source}: target_modules"):
            chosen = set() if targets == "all-linear" else fully_matched(targets, names)
    else:
        wanted = frozenset(targets)
        chosen = {name for name in names if matches(wanted, name)}
    indices = config.get("layers_to_transform")
    if indices is None or indices == []:
        return chosen
    indices = {indices} if isinstance(indices, int) else set(indices)
    patterns = config.get("layers_pattern") or []
    with said_by(f"{source}: layers_pattern"):
        numbers = layer_numbers([patterns] if isinstance(patterns, str) else patterns, names)
    return {name for name in chosen if numbers.get(name) in indices}


def _sizes_of(adapter: Adapter, names: list[str]) -> dict[str, int]:
    """Return the layers' block sizes, those of their kernels where PEFT's releases read two."""
    config, source, kernels = adapter.config, adapter.config_source, adapter.kernels
    pattern, default = config.get("block_size_pattern") or {}, config.get("block_size")
    with said_by(f"{source}: block_size_pattern"):
        newer = first_keys(list(pattern), names)
        older = first_keys(list(pattern), names, proper=True)
    sizes: dict[str, int] = {}
    for name, here, there in zip(names, newer, older, strict=True):
        size = of_pattern(pattern, name, here) or default
        if name in kernels and kernels[name].shape[-1] == pattern.get(there or name, default):
            size = kernels[name].shape[-1]
        if size is None:
            raise ValueError(f"{source}: block_size: expected one for {name}, got none")
        sizes[name] = size
    return sizes


def _check_tensors(
    model: nn.Module,
    layers: Mapping[str, C3ALinear | C3AExperts],
    plan: PatchPlan | None,
    adapter: Adapter,
) -> None:
    """Raise ValueError unless the file has exactly what the model takes, in its shapes."""
    shapes = {kernel_key(name): tuple(layer.c3a_kernel.shape) for name, layer in layers.items()}
    if plan:
        found, sizes = _features_of(model, plan), plan.block_sizes | plan.parameter_sizes
        for name, (before, *its) in found.items():
            shapes[kernel_key(name)] = (*before, *kernel_shape(its[0], its[1], sizes[name]))
    heads = {
        f"{PREFIX}{name}.{key}": tensor
        for name in (plan.modules_to_save if plan else modules_to_save(model))
        for key, tensor in _state(model.get_submodule(name)).items()
    }
    shapes |= {key: tuple(tensor.shape) for key, tensor in heads.items()}
    tensors = adapter.tensors
    problems = [f"missing: {key}" for key in shapes if key not in tensors]
    problems += [f"unknown: {key}" for key in tensors if key not in shapes]
    problems += [
        f"{key}: expected shape {shape}, got {tuple(tensors[key].shape)}"
        for key, shape in shapes.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    # Among floating-point dtypes a copy rounds; from and to others it would mean something else.
    problems += [
        f"{key}: expected dtype {tensor.dtype}, got {tensors[key].dtype}"
        for key, tensor in heads.items()
        if key in tensors
        and tensors[key].dtype != tensor.dtype
        and not (tensors[key].is_floating_point() and tensor.is_floating_point())
    ]
    if problems:
        some = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ValueError(f"{adapter.weights_path} does not fit the model: {'; '.join(some)}")


def _check_has_values(
    model: nn.Module, layers: Mapping[str, C3ALinear | C3AExperts], plan: PatchPlan | None
) -> None:
    """Raise ValueError if something that is written, or what a kernel is made beside, is meta."""
    places: dict[str, Iterable[Tensor]] = {
        f"{name}.c3a_kernel": [layer.c3a_kernel] for name, layer in layers.items()
    }
    for name in plan.block_sizes if plan else ():
        module = model.get_submodule(name)
        places[name] = [*module.parameters(), *module.buffers()]
    experts = stacks(model) if plan and plan.parameter_sizes else {}
    for name in plan.parameter_sizes if plan else ():
        places[name] = [experts[name].weight]
    for name in plan.modules_to_save if plan else modules_to_save(model):
        places[name] = _state(model.get_submodule(name)).values()
    meta = [name for name, tensors in places.items() if any(t.is_meta for t in tensors)]
    if meta:
        raise ValueError(
            f"the model is on the meta device, where nothing has values: {_some(meta)}; give it "
            "its weights first, and let accelerate offload them after the adapter is loaded"
        )
