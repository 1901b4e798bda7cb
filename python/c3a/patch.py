"""Patching a whole model in place: choosing layers and block sizes, wrapping, and undoing it."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import torch
from torch import nn

from .linear import C3ALinear
from .names import block_size_from_pattern, matches
from .sizes import auto_block_size, check_block_size, features

Targets = str | re.Pattern | Iterable[str] | Callable[[str, nn.Module], bool]
BlockSize = int | str | Mapping[str, int]


@dataclass
class _Record:
    """What a patch leaves on the model, as ``model._c3a_record``."""

    modules_to_save: tuple[str, ...]
    trainable_before: frozenset[str]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``'s and data parallelism's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def adapted_layers(model: nn.Module) -> dict[str, C3ALinear]:
    """Return the adapted layers of a model by name, the outermost of nested ones."""
    found: dict[str, C3ALinear] = {}
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, C3ALinear) and not any(name.startswith(f"{n}.") for n in found):
            found[name] = module
    return found


def modules_to_save(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that ``patch_model`` left trainable."""
    record = getattr(unwrapped(model), "_c3a_record", None)
    return record.modules_to_save if record else ()


def patch_model(
    model: nn.Module,
    target_modules: Targets,
    block_size: BlockSize,
    *,
    rank: int = 8,
    scale: float | None = None,
    init: str = "zeros",
    dtype: torch.dtype = torch.float32,
    modules_to_save: Iterable[str] = (),
    pad: bool = False,
) -> nn.Module:
    """Wrap the chosen layers of a model in ``C3ALinear``, in place, and freeze the rest.

    Args:
        model: any ``nn.Module`` that holds linear layers.
        target_modules: what to wrap. A list of names, each whole or the end of one
            (``["query", "value"]``); a regular expression for whole names, as a string or compiled;
            a predicate ``(name, module) -> bool``; or ``"all-linear"``, every linear layer but the
            output embeddings and ``modules_to_save``.
        block_size: one number; a mapping from name or regular expression for the end of a name to
            numbers; or ``"auto"``, the common divisor of both sizes nearest to
            ``sqrt(in * out) / rank``.
        rank: for ``"auto"``, the LoRA rank one would use.
        scale, init, dtype, pad: as for ``C3ALinear``.
        modules_to_save: names (whole or the end of one) of modules that stay trainable and are
            saved with the adapter, such as a new classifier.

    Returns:
        The same model.

    Raises:
        ValueError: nothing matched, a size does not divide, or the model is patched already; the
            message lists what there is. The model is then as it was.
        TypeError: a target is not a linear layer, or one whose owner reads its weight directly.
    """
    inner = unwrapped(model)
    plan = plan_patch(
        inner,
        target_modules,
        block_size,
        rank=rank,
        modules_to_save=modules_to_save,
        pad=pad,
    )
    apply_patch(inner, plan, scale=scale, init=init, dtype=dtype, pad=pad)
    return model


@dataclass
class PatchPlan:
    """Which layers get which block size, and which modules stay trainable. Changes nothing."""

    block_sizes: dict[str, int]
    modules_to_save: tuple[str, ...]


def plan_patch(
    model: nn.Module,
    target_modules: Targets,
    block_size: BlockSize,
    *,
    rank: int = 8,
    modules_to_save: Iterable[str] = (),
    pad: bool = False,
) -> PatchPlan:
    """Resolve the arguments of ``patch_model`` against a model, raising all that it raises."""
    if features(model) is not None and not list(model.children()):
        raise ValueError(
            f"c3a.patch_model: the model is itself a layer, a {type(model).__name__}; wrap it with "
            "c3a.C3ALinear(layer, block_size)"
        )
    if adapted_layers(model):
        raise ValueError(
            "c3a.patch_model: the model is patched already; call c3a.unpatch_model first"
        )
    saved = _resolve_modules_to_save(model, modules_to_save)
    targets = _resolve_targets(model, target_modules, saved)
    if not isinstance(rank, Real) or not 1 <= rank < math.inf:
        raise ValueError(f"c3a.patch_model: expected rank to be a number >= 1, got {rank!r}")
    if isinstance(block_size, str) and block_size != "auto":
        raise ValueError(
            "c3a.patch_model: expected block_size to be a number, a mapping from names to numbers, "
            f"or 'auto', got {block_size!r}"
        )
    sizes: dict[str, int] = {}
    problems = []
    for name, module in targets.items():
        in_features, out_features = features(module)
        if block_size == "auto":
            size = auto_block_size(in_features, out_features, rank)
        elif isinstance(block_size, Mapping):
            size = block_size_from_pattern(block_size, name)
            if size is None:
                problems.append(f"{name}: no key of the mapping {dict(block_size)} matches")
                continue
        else:
            size = block_size
        try:
            check_block_size(size, in_features, out_features, pad)
        except ValueError as error:
            problems.append(f"{name}: {error}")
        sizes[name] = size
    if problems:
        raise ValueError("c3a.patch_model: " + "\n  ".join(problems))
    return PatchPlan(sizes, saved)


def apply_patch(
    model: nn.Module,
    plan: PatchPlan,
    *,
    scale: float | None = None,
    init: str = "zeros",
    dtype: torch.dtype = torch.float32,
    pad: bool = False,
) -> nn.Module:
    """Carry out a plan: all layers are made before the first one is put in place."""
    from . import pretrained  # which saves adapters, for which it needs this module

    trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    wrapped: dict[int, C3ALinear] = {}
    try:
        for name, block_size in plan.block_sizes.items():
            base = model.get_submodule(name)
            wrapped[id(base)] = C3ALinear(
                base, block_size, scale=scale, init=init, dtype=dtype, pad=pad
            )
    except Exception:
        _restore_requires_grad(model, trainable)
        raise
    # A layer that stands in several places is wrapped once and replaced in all of them.
    _replace_children(model, wrapped)
    model.requires_grad_(False)
    for layer in wrapped.values():
        layer.c3a_kernel.requires_grad_(True)
    for name in plan.modules_to_save:
        model.get_submodule(name).requires_grad_(True)
    model._c3a_record = _Record(plan.modules_to_save, trainable)
    pretrained.take_over(model)
    return model


def unpatch_model(model: nn.Module, *, merge: bool = False, safe: bool = True) -> nn.Module:
    """Take the adapters out of a model, in place.

    Args:
        model: a patched model.
        merge: add each adapter to its layer's weight first, and keep no copy of the original. By
            default the weights are as before the patch, bit for bit.
        safe: with ``merge``, look whether the merged weights are finite.

    Returns:
        The same model, without ``C3ALinear`` layers; what was trainable before the patch is again.

    Raises:
        TypeError, ValueError: ``merge`` and a base layer that cannot take the adapter, or ``safe``
            and a weight that would not be finite; the model is then as it was.
    """
    from . import pretrained

    if merge:
        _merge_all(model, safe)
    outer, model = model, unwrapped(model)
    while layers := adapted_layers(model):
        inner = {}
        for layer in layers.values():
            if merge:
                layer.enabled = True
            else:
                layer.unmerge()
            inner[id(layer)] = layer.base_layer
        _replace_children(model, inner)
    pretrained.give_back(model)
    record = model.__dict__.pop("_c3a_record", None)
    if record is not None:
        _restore_requires_grad(model, record.trainable_before)
    return outer


def merge(model: nn.Module, *, safe: bool = True) -> nn.Module:
    """Merge every adapter of a model (``C3ALinear.merge``): all, or none where one cannot be.

    Raises:
        TypeError, ValueError: as ``C3ALinear.merge``, with the layer's name.
    """
    _merge_all(model, safe)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo ``merge``: every weight is as it was, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, the model computes what its base model does, merged or not.

    >>> model = patch_model(nn.Sequential(nn.Linear(4, 4)), ["0"], 2, init="gaussian")
    >>> with disabled(model):
    ...     y = model(torch.ones(4))
    >>> torch.equal(y, unpatch_model(model)(torch.ones(4)))
    True
    """
    layers = [module for module in model.modules() if isinstance(module, C3ALinear)]
    states = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer.enabled = state


def _replace_children(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace modules, given by ``id``, wherever they stand in the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def _merge_all(model: nn.Module, safe: bool) -> None:
    done = []
    try:
        for name, layer in adapted_layers(model).items():
            if not layer.merged:
                try:
                    layer.merge(safe=safe)
                except (TypeError, ValueError) as error:
                    said = str(error).removeprefix("c3a: ")
                    raise type(error)(f"c3a: {name}: {said}") from None
                done.append(layer)
    except Exception:
        for layer in done:
            layer.unmerge()
        raise


def _restore_requires_grad(model: nn.Module, trainable: frozenset[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def _available(model: nn.Module) -> str:
    """Return the linear layers there are, as ``query (6), dense (18), ...``."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if name and features(module):
            last = name.rsplit(".", 1)[-1]
            last = name if last.isdigit() else last
            counts[last] = counts.get(last, 0) + 1
    listed = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in counts.items())
    return f"linear layers of the model: {listed or 'none'}"


def _resolve_modules_to_save(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(
            f"c3a.patch_model: expected modules_to_save to be a list of names, got {names!r}"
        )
    resolved = []
    for wanted in names:
        found = [name for name, _ in model.named_modules() if name and matches([wanted], name)]
        if not found:
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"c3a.patch_model: no module is named {wanted!r} (modules_to_save); modules at the "
                f"top: {children}"
            )
        resolved += found
    return tuple(dict.fromkeys(resolved))


def _resolve_targets(
    model: nn.Module, targets: Targets, saved: tuple[str, ...]
) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    reads_weight = _read_by_weight(model)
    if isinstance(targets, re.Pattern):
        pattern = targets
        chosen = [name for name in modules if pattern.fullmatch(name)]
    elif isinstance(targets, str) and targets == "all-linear":
        outputs = _output_embeddings(model)
        chosen = [
            name
            for name, module in modules.items()
            if _is_innermost_linear(module)
            and module is not outputs
            and id(module) not in reads_weight
        ]
    elif isinstance(targets, str):
        chosen = [name for name in modules if matches(targets, name)]
    elif callable(targets):
        chosen = [name for name, module in modules.items() if targets(name, module)]
    else:
        targets = list(targets)
        missing = [t for t in targets if not any(matches([t], name) for name in modules)]
        if missing:
            raise ValueError(
                f"c3a.patch_model: no module is named {', '.join(map(repr, missing))}; "
                + _available(model)
            )
        chosen = [name for name in modules if matches(targets, name)]
    chosen = [n for n in chosen if not any(n == s or n.startswith(f"{s}.") for s in saved)]
    if not chosen:
        hint = (
            "; a string is a regular expression for whole names: for the ends of names pass a list"
            if isinstance(targets, str) and targets != "all-linear"
            else ""
        )
        raise ValueError(f"c3a.patch_model: nothing matched {targets!r}{hint}; {_available(model)}")
    for name in chosen:
        module = modules[name]
        if features(module) is None:
            raise TypeError(
                f"c3a.patch_model: {name} is a {type(module).__name__}, which has no in and out "
                f"features; {_available(model)}"
            )
        if owner := reads_weight.get(id(module)):
            raise TypeError(
                f"c3a.patch_model: {name} cannot be adapted: its owner, a {owner}, reads its "
                "weight instead of calling it, so an adapter would have no effect"
            )
    return {name: modules[name] for name in chosen}


def _is_innermost_linear(module: nn.Module) -> bool:
    parts = [part for part in module.modules() if part is not module]
    return features(module) is not None and not any(features(part) for part in parts)


def _read_by_weight(model: nn.Module) -> dict[int, str]:
    """Return the layers whose owners read ``.weight`` instead of calling them, with the owner."""
    found = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found[id(module.out_proj)] = "MultiheadAttention"
        elif isinstance(module, nn.TransformerEncoderLayer):
            # its fused path at inference
            for layer in (module.linear1, module.linear2):
                found[id(layer)] = "TransformerEncoderLayer"
    return found


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None
