"""Patching a whole model in place: choosing layers and block sizes, wrapping, and undoing it."""

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import distributed
from .experts import C3AExperts, Stack, adapted_experts, put_in, stacks, take_out
from .linear import C3ALinear
from .names import block_size_from_pattern, ends, matches, shown
from .peft_config import PeftConfig, block_sizes_of, meaning_of
from .shapes import SUPPORTED_DTYPES
from .sizes import auto_block_size, check_block_size, features, linear_features

Targets = str | re.Pattern[str] | Iterable[str] | Callable[[str, nn.Module], bool]
BlockSize = int | str | Mapping[str, int]
Model = TypeVar("Model", bound=nn.Module)
_F = TypeVar("_F", bound=Callable[..., Any])
_MOST_SAID = 3  # layers of a message


@dataclass
class _Record:
    """What a patch leaves on the model, as ``model._c3a_record``."""

    modules_to_save: tuple[str, ...]
    trainable_before: frozenset[str]
    # The parameters and buffers of modules_to_save, by name: copies of what they were.
    originals: dict[str, Tensor]
    task_type: str | None = None
    # While disabled, the trained ones.
    set_aside: dict[str, Tensor] = field(default_factory=dict)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``'s and data parallelism's wrappers.

    Raises TypeError for what is no model.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module):
            return model
        else:
            raise TypeError(
                "c3a: expected the model to be a torch.nn.Module, got "
                f"{type(model).__name__} {shown(model)}"
            )


def adapted_layers(model: nn.Module) -> dict[str, C3ALinear]:
    """Return the adapted layers of a model by name, the outermost of nested ones.

    Raises ValueError where an ``AdapterPool`` has the model.
    """
    found: dict[str, C3ALinear] = {}
    for name, module in unwrapped(model).named_modules():
        if hasattr(module, "c3a_pool"):
            raise ValueError("the model is a c3a.AdapterPool's; call the pool's close() first")
        if isinstance(module, C3ALinear) and not any(name.startswith(f"{n}.") for n in found):
            found[name] = module
    return found


def adapters(model: nn.Module) -> dict[str, C3ALinear | C3AExperts]:
    """Return what is adapted of a model by name: layers, and the parameters of experts."""
    return {**adapted_layers(model), **adapted_experts(unwrapped(model))}


def modules_to_save(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that ``patch_model`` left trainable."""
    record = getattr(unwrapped(model), "_c3a_record", None)
    return record.modules_to_save if record else ()


def configured_task(model: nn.Module) -> str | None:
    """Return the task that a configuration named when the model was patched."""
    record = getattr(unwrapped(model), "_c3a_record", None)
    return record.task_type if record else None


def peft_layer(model: nn.Module) -> str | None:
    """Return the name of a layer that the PEFT library has put into a model."""
    has = (name for name, part in model.named_modules() if hasattr(part, "adapter_layer_names"))
    return next(has, None)


def patch_model(
    model: Model,
    target_modules: Targets | PeftConfig | None = None,
    block_size: BlockSize | None = None,
    *,
    config: PeftConfig | None = None,
    rank: int = 8,
    scale: float | None = None,
    init: str = "zeros",
    dtype: torch.dtype = torch.float32,
    modules_to_save: Iterable[str] = (),
    target_parameters: Iterable[str] = (),
    pad: bool = False,
    dropout: float = 0.0,
) -> Model:
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
        config: a ``peft.C3AConfig``, in the place of ``target_modules`` (where it may stand as
            well), ``block_size``, ``rank``, ``init`` and ``modules_to_save``: the layers, sizes and
            initial values that PEFT's ``get_peft_model`` gives. Its ``task_type`` is kept for
            ``save_adapter``.
        rank: for ``"auto"``, the LoRA rank one would use.
        scale, init, dtype, pad, dropout: as for ``C3ALinear``.
        modules_to_save: names (whole or the end of one) of modules that stay trainable and are
            saved with the adapter, such as a new classifier. A copy of what they hold now is kept,
            for ``disabled`` and ``unpatch_model``: their memory once more.
        target_parameters: names (whole or the end of one) of parameters that hold a matrix for each
            expert, ``(experts, out, in)``, or ``(experts, in, out)`` where transformers marks the
            module so (``is_transposed``): ``["experts.gate_up_proj", "experts.down_proj"]``. Every
            expert gets a kernel of its own. Without ``target_modules`` no layer is adapted. Not
            padded, and without dropout.

    Returns:
        The same model.

    Raises:
        ValueError: nothing matched, a size does not divide, the model is patched already or holds
            the PEFT library's adapters; a setting of ``config`` cannot be honoured; the message
            lists what there is. The model is then as it was.
        TypeError: a target is not a linear layer; an argument of another kind, or one that
            ``config`` has too.

    Warns of experts' matrices that ``"all-linear"`` skips: those that are kept as one parameter of
    three dimensions, and that are not in ``target_parameters``.

    Warns of a head that ``from_pretrained`` of transformers (5 or newer) has made anew, as its
    checkpoint held none, and that is not in ``modules_to_save``: it would never be trained. A head
    that ``load_state_dict`` has filled since then cannot be told from a new one; of a model that
    was not made by ``from_pretrained`` nothing is said.

    >>> import c3a, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> model = c3a.patch_model(model, ["0"], block_size=4, modules_to_save=["1"])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.c3a_kernel', '1.weight', '1.bias']
    """
    inner = unwrapped(model)
    if isinstance(target_modules, PeftConfig):
        if config is not None:
            raise TypeError("c3a.patch_model: expected one config, got two")
        config, target_modules = target_modules, None
    target_parameters = _names("target_parameters", "a list of names", target_parameters)
    task = None
    wanted = getattr(config, "target_modules", target_modules)
    wants_all = isinstance(wanted, str) and wanted.lower() == "all-linear"
    if config is not None:
        given = {
            "target_modules": target_modules is not None,
            "block_size": block_size is not None,
            "rank": rank != 8,
            "init": init != "zeros",
            "modules_to_save": modules_to_save != (),
        }
        if twice := [name for name, is_given in given.items() if is_given]:
            raise TypeError(
                f"c3a.patch_model: expected config alone to say {', '.join(given)}, got "
                f"{', '.join(twice)} too"
            )
        _check_patchable(inner)
        block_size, modules_to_save, init, task = meaning_of(config, inner)
        target_modules = Chosen(block_size, f"{type(config).__name__}.target_modules")
        parameters = _resolve_parameters(inner, target_parameters, modules_to_save)
        block_size = {**block_size, **block_sizes_of(config, parameters)}
    plan = plan_patch(
        inner,
        target_modules,
        block_size,
        rank=rank,
        modules_to_save=modules_to_save,
        target_parameters=target_parameters,
        pad=pad,
    )
    if plan.parameter_sizes and dropout:
        raise ValueError(
            "c3a.patch_model: expected dropout=0 with target_parameters, for experts have none, "
            f"got {dropout!r}; give it to the layers after the patch: layer.dropout = {dropout!r}"
        )
    if new := _new_heads(inner, plan.modules_to_save):
        warnings.warn(
            f"c3a.patch_model: {', '.join(new)}: weights that the model's checkpoint did not hold "
            "are random, and would stay so, for they are frozen; to train them and save them with "
            f"the adapter, pass modules_to_save={[*plan.modules_to_save, *new]}",
            stacklevel=2,
        )
    if wants_all and (skipped := _skipped_experts(inner, plan)):
        ends_of_names = sorted({_end_of(name) for name in skipped})
        warnings.warn(
            f"c3a.patch_model: 'all-linear' skips {len(skipped)} parameters that hold a matrix for "
            f"each expert and stay frozen: {_counted(skipped)}; to adapt them too, pass "
            f"target_parameters={ends_of_names}; to leave them, name the layers to adapt "
            "(target_modules); modules_to_save trains them whole",
            stacklevel=2,
        )
    apply_patch(
        inner,
        plan,
        scale=scale,
        init=init,
        dtype=dtype,
        pad=pad,
        dropout=dropout,
        task_type=task,
    )
    return model


class Chosen:
    """The test whether a module is among the chosen ones, with the words that chose them."""

    def __init__(self, names: Collection[str], words: str) -> None:
        self.names: Collection[str] = names
        self.words: str = words

    def __call__(self, name: str, module: nn.Module) -> bool:
        return name in self.names

    def __repr__(self) -> str:
        return self.words


@dataclass
class PatchPlan:
    """Which layers get which block size, and which modules stay trainable. Changes nothing."""

    block_sizes: dict[str, int]
    modules_to_save: tuple[str, ...]
    parameter_sizes: dict[str, int] = field(default_factory=dict)  # of experts


def plan_patch(
    model: nn.Module,
    target_modules: Targets | None,
    block_size: BlockSize | None,
    *,
    rank: int = 8,
    modules_to_save: Iterable[str] = (),
    target_parameters: Iterable[str] = (),
    pad: bool = False,
) -> PatchPlan:
    """Resolve the arguments of ``patch_model`` against a model, raising all that it raises."""
    _check_patchable(model)
    saved = _resolve_modules_to_save(model, modules_to_save)
    parameters = _resolve_parameters(model, target_parameters, saved)
    targets: dict[str, tuple[int, int]] = {}
    if target_modules is not None or not parameters:
        found = _resolve_targets(model, target_modules, saved)
        targets = {name: linear_features(module) for name, module in found.items()}
    given: object = rank
    if not isinstance(given, Real) or not 1 <= rank < math.inf:
        raise ValueError(f"c3a.patch_model: expected rank to be a number >= 1, got {rank!r}")
    _check_kind(block_size)
    assert block_size is not None
    sizes: dict[str, int] = {}
    problems = {}
    for name, (in_features, out_features) in [*targets.items(), *parameters.items()]:
        if isinstance(block_size, str):
            size = auto_block_size(in_features, out_features, rank)
        elif isinstance(block_size, Mapping):
            of_pattern = block_size_from_pattern(block_size, name)
            if of_pattern is None:
                problems[name] = f"no key of the mapping {dict(block_size)} matches"
                continue
            size = of_pattern
        else:
            size = block_size
        try:
            may_pad = name in targets
            check_block_size(size, in_features, out_features, pad and may_pad, may_pad)
        except ValueError as error:
            problems[name] = str(error)
        sizes[name] = size
    if problems:
        said = [f"{name}: {problem}" for name, problem in problems.items()][:_MOST_SAID]
        if more := len(problems) - len(said):
            said.append(f"and {more} more layers")
        if isinstance(block_size, Real) and len(problems) < len(targets) + len(parameters):
            last = [name for name, module in model.named_modules() if features(module)][-1]
            if target_modules == "all-linear" and last in problems:
                said.append(
                    f"if {last} is a new head, pass modules_to_save={[*saved, last]}, which "
                    "trains it whole"
                )
            said.append("block_size='auto' or a mapping gives each layer a size of its own")
        raise ValueError("c3a.patch_model: " + "; ".join(said))
    of_parameters = {name: size for name, size in sizes.items() if name in parameters}
    return PatchPlan(
        {name: size for name, size in sizes.items() if name in targets}, saved, of_parameters
    )


def _check_patchable(model: nn.Module) -> None:
    if features(model) is not None and not list(model.children()):
        raise ValueError(
            f"c3a.patch_model: the model is itself a layer, a {type(model).__name__}; wrap it with "
            "c3a.C3ALinear(layer, block_size)"
        )
    if name := peft_layer(model):
        raise ValueError(
            f"c3a.patch_model: the model holds the PEFT library's adapters ({name} is one of its "
            "layers): take them out with PEFT's model.unload() or model.merge_and_unload() first, "
            "and patch the model that it returns"
        )
    if distributed.is_sharded(model):
        raise ValueError(
            "c3a.patch_model: the model is sharded over processes, and a kernel would not be; "
            "patch it, or load its adapter, before it is sharded"
        )
    if adapters(model):
        raise ValueError(
            "c3a.patch_model: the model is patched already; call c3a.unpatch_model first"
        )


def apply_patch(
    model: Model,
    plan: PatchPlan,
    *,
    scale: float | None = None,
    init: str = "zeros",
    dtype: torch.dtype = torch.float32,
    pad: bool = False,
    dropout: float = 0.0,
    task_type: str | None = None,
) -> Model:
    """Carry out a plan: all adapters are made before the first one is put in place."""
    from . import pretrained  # which saves adapters, for which it needs this module

    trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    wrapped: dict[int, C3ALinear] = {}
    experts: list[C3AExperts] = []
    try:
        originals = _copies(model, plan.modules_to_save)
        for name, block_size in plan.block_sizes.items():
            base = model.get_submodule(name)
            wrapped[id(base)] = C3ALinear(
                base, block_size, scale=scale, init=init, dtype=dtype, pad=pad, dropout=dropout
            )
        found = stacks(model) if plan.parameter_sizes else {}
        for name, block_size in plan.parameter_sizes.items():
            experts.append(C3AExperts(found[name], block_size, scale=scale, init=init, dtype=dtype))
    except Exception:
        _restore_requires_grad(model, trainable)
        raise
    # A layer that stands in several places is wrapped once and replaced in all of them.
    replace_children(model, wrapped)
    model.requires_grad_(False)
    put_in(experts)
    for adapter in (*wrapped.values(), *experts):
        adapter.c3a_kernel.requires_grad_(True)
    for name in plan.modules_to_save:
        model.get_submodule(name).requires_grad_(True)
    model.__dict__["_c3a_record"] = _Record(plan.modules_to_save, trainable, originals, task_type)
    pretrained.take_over(model)
    return model


def unpatch_model(model: Model, *, merge: bool = False, safe: bool = True) -> Model:
    """Take the adapters out of a model, in place.

    Args:
        model: a patched model.
        merge: add each adapter to its layer's weight first, and keep no copy of the original;
            ``modules_to_save`` stay as they are trained. By default everything is as before the
            patch, bit for bit, in the same parameters and buffers.
        safe: with ``merge``, look whether the merged weights are finite.

    Returns:
        The same model, without ``C3ALinear`` layers; what was trainable before the patch is again.

    Raises:
        TypeError, ValueError: ``merge`` and a base layer that cannot take the adapter, or ``safe``
            and a weight that would not be finite; otherwise one of ``modules_to_save`` that has
            other shapes now, or that accelerate has offloaded. The model is then as it was.

    >>> import c3a, torch
    >>> model = c3a.patch_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), ["0"], 4)
    >>> c3a.unpatch_model(model)
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    from . import pretrained

    patched = unwrapped(model)
    records = _records(patched)
    if merge:
        _merge_all(patched, safe)
    else:
        _copy_back(list(chain.from_iterable(_pairs(*found) for found in records)))
    while layers := adapted_layers(patched):
        inner = {}
        for layer in layers.values():
            if merge:
                layer.enabled = True
            else:
                layer.unmerge()
            inner[id(layer)] = layer.base_layer
        replace_children(patched, inner)
    take_out(adapted_experts(patched).values(), merge)
    pretrained.give_back(patched)
    for part, record in records:
        _show_trained(patched, part, record)
        del part._c3a_record
        _restore_requires_grad(part, record.trainable_before)
    return model


def merge(model: Model, *, safe: bool = True) -> Model:
    """Merge every adapter of a model (``C3ALinear.merge``): all, or none where one cannot be.

    Raises:
        TypeError, ValueError: as ``C3ALinear.merge``, with the layer's name.

    >>> import c3a, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> model, x = c3a.patch_model(model, ["0"], 4, init="gaussian"), torch.randn(3, 8)
    >>> y = model(x)
    >>> torch.allclose(c3a.merge(model)(x), y, atol=1e-5)
    True
    """
    _merge_all(model, safe)
    return model


def unmerge(model: Model) -> Model:
    """Undo ``merge``: every weight is as it was, bit for bit.

    >>> import c3a, torch
    >>> base = torch.nn.Linear(8, 8)
    >>> weight = base.weight
    >>> model = c3a.patch_model(torch.nn.Sequential(base), ["0"], 4, init="gaussian")
    >>> c3a.merge(model)[0].base_layer.weight is weight
    False
    >>> c3a.unmerge(model)[0].base_layer.weight is weight
    True
    """
    for adapter in adapters(model).values():
        adapter.unmerge()
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Within the block, the model computes what its base model does, merged or not.

    ``modules_to_save`` are then what they were at the patch too, in the device and dtype that they
    have now: other, frozen parameters and buffers stand in their places, also in a state dict.
    (What had no values at the patch, on the meta device, stays as it is.)

    Raises:
        ValueError: one of ``modules_to_save`` has other shapes than at the patch, or accelerate has
            offloaded it; nothing is changed then.

    >>> import c3a, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> model = c3a.patch_model(model, ["0"], 2, init="gaussian")
    >>> with c3a.disabled(model):
    ...     y = model(torch.ones(4))
    >>> torch.equal(y, c3a.unpatch_model(model)(torch.ones(4)))
    True
    """
    inner = unwrapped(model)
    layers = [part for part in inner.modules() if isinstance(part, C3ALinear | C3AExperts)]
    states = [layer.enabled for layer in layers]
    found = _records(inner)
    heads = [(p, record) for p, record in found if record.originals and not record.set_aside]
    try:
        for part, record in heads:
            _uncompiled(_show_originals)(inner, part, record)
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer.enabled = state
        for part, record in heads:
            _uncompiled(_show_trained)(inner, part, record)


def _uncompiled(function: _F) -> _F:
    """Keep the compiler, which makes no parameters, out of a function (without importing it)."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Within the block, ``modules_to_save`` are the trained ones, also in a ``disabled`` model."""
    heads = [(part, record) for part, record in _records(model) if record.set_aside]
    for part, record in heads:
        _show_trained(model, part, record)
    try:
        yield
    finally:
        for part, record in heads:
            _show_originals(model, part, record)


def _records(model: nn.Module) -> list[tuple[nn.Module, _Record]]:
    """Return the parts of a model that were patched, each with its record."""
    found = ((part, vars(part).get("_c3a_record")) for part in model.modules())
    return [(part, record) for part, record in found if record is not None]


def _tensors(module: nn.Module, prefix: str = "", recurse: bool = True) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module, tied ones under each of their names."""
    arguments: dict[str, Any] = {"prefix": prefix, "recurse": recurse, "remove_duplicate": False}
    return dict(chain(module.named_parameters(**arguments), module.named_buffers(**arguments)))


def _copies(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copy the parameters and buffers of some modules, tied ones once."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= _tensors(model.get_submodule(name), name)
    valued = {key: t for key, t in tensors.items() if not (t.is_meta or is_lazy(t))}
    copies = {id(t): t.detach().clone() for t in {id(t): t for t in valued.values()}.values()}
    return {key: copies[id(t)] for key, t in valued.items()}


def _pairs(part: nn.Module, record: _Record) -> list[tuple[Tensor, Tensor]]:
    """Return each trained tensor with what it was at the patch, in its device and dtype now."""
    tensors = _tensors(part) | record.set_aside
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for key, original in record.originals.items():
        trained = tensors.get(key)
        if trained is None or trained.shape != original.shape:
            got = "none" if trained is None else f"one of shape {tuple(trained.shape)}"
            raise ValueError(
                f"c3a: {key} cannot be put back as it was at the patch: expected a tensor of "
                f"shape {tuple(original.shape)}, got {got}"
            )
        if trained.is_meta and hasattr(part.get_submodule(key.rpartition(".")[0]), "_hf_hook"):
            raise ValueError(
                f"c3a: {key} cannot be put back as it was at the patch, since accelerate has "
                "offloaded it: call accelerate.hooks.remove_hook_from_submodules(model) first"
            )
        if id(trained) not in pairs:
            pairs[id(trained)] = trained, original.to(trained.device, trained.dtype)
    return list(pairs.values())


@torch.no_grad()
def _copy_back(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for tensor, original in pairs:
        # What is as it was may not be writable: a buffer that is expanded, for instance.
        if not tensor.is_meta and not torch.equal(tensor, original):
            tensor.copy_(original)


def _show_originals(model: nn.Module, part: nn.Module, record: _Record) -> None:
    """Put what ``modules_to_save`` were in the place of what they are, wherever that stands."""
    shown_instead = {
        # A forward pass writes into buffers, and is not to write into the copies.
        id(trained): nn.Parameter(original, requires_grad=False)
        if isinstance(trained, nn.Parameter)
        else original.clone()
        for trained, original in _pairs(part, record)
    }
    tensors = _tensors(part)
    record.set_aside = {key: tensors[key] for key in record.originals}
    _replace_tensors(model, shown_instead)


def _show_trained(model: nn.Module, part: nn.Module, record: _Record) -> None:
    """Undo ``_show_originals``; what has moved or converted the model meanwhile counts."""
    tensors, trained_instead = _tensors(part), {}
    for key, trained in record.set_aside.items():
        shown_now = tensors.get(key)
        if shown_now is not None:
            trained.data = trained.data.to(shown_now.device, shown_now.dtype)
            trained_instead[id(shown_now)] = trained
    _replace_tensors(model, trained_instead)
    record.set_aside = {}


def _replace_tensors(model: nn.Module, replacements: Mapping[int, Tensor]) -> None:
    """Replace parameters and buffers, given by ``id``, wherever they stand in the model."""
    for module in model.modules():
        for name, tensor in _tensors(module, recurse=False).items():
            if id(tensor) in replacements:
                setattr(module, name, replacements[id(tensor)])


def replace_children(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace modules, given by ``id``, wherever they stand in the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def _merge_all(model: nn.Module, safe: bool) -> None:
    done = []
    inner = unwrapped(model)
    distributed.reshard(inner)
    weights = [id(t) for t in _tensors(inner).values()] if distributed.is_sharded(inner) else []
    try:
        for name, layer in adapters(inner).items():
            if isinstance(layer, C3ALinear) and weights.count(id(layer.base_layer.weight)) > 1:
                raise ValueError(
                    f"c3a: {name}: cannot merge: others share its weight, and in a sharded model "
                    "it is written in place; merge before the model is sharded"
                )
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


def _new_heads(model: nn.Module, saved: Iterable[str]) -> list[str]:
    """Return the largest modules of a model with a head that have nothing but new weights.

    ``from_pretrained`` of transformers marks the parameters that it read from the checkpoint.
    """
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return []
    outputs = _output_embeddings(model)  # resized ones are not marked
    known = {
        id(parameter)
        for part in (outputs, *map(model.get_submodule, saved))
        if part is not None
        for parameter in part.parameters()
    }
    marked = {id(p) for p in model.parameters() if getattr(p, "_is_hf_initialized", False)}
    found: list[str] = []
    for name, module in model.named_modules() if marked else ():
        within = any(name.startswith(f"{outer}.") for outer in found)
        ids = {id(parameter) for parameter in module.parameters()}
        if ids and not within and ids.isdisjoint(marked | known):
            found.append(name)
    return found


def _within(name: str, saved: Iterable[str]) -> bool:
    return any(name == outer or name.startswith(f"{outer}.") for outer in saved)


def _skipped_experts(model: nn.Module, plan: PatchPlan) -> dict[str, Stack]:
    return {
        name: stack
        for name, stack in stacks(model).items()
        if name not in plan.parameter_sizes and not _within(name, plan.modules_to_save)
    }


def _end_of(name: str) -> str:
    """Return the end of a parameter's name that tells it from others: its module's and its own."""
    return ".".join(name.split(".")[-2:])


def _counted(experts: Mapping[str, Stack]) -> str:
    """Say which parameters, by pattern of name and shape."""
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, stack in experts.items():
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tuple(stack.weight.shape)
        counts[pattern] = counts.get(pattern, 0) + 1
    said = [f"{name} ({count}, of shape {shape})" for (name, shape), count in counts.items()]
    more = [f"and {len(said) - _MOST_SAID} more"] if len(said) > _MOST_SAID else []
    return ", ".join(said[:_MOST_SAID] + more)


def _resolve_parameters(
    model: nn.Module, names: Iterable[str], saved: tuple[str, ...]
) -> dict[str, tuple[int, int]]:
    """Return the in and out features of the experts' parameters that are meant, by name."""
    wanted = _names("target_parameters", "a list of names", names)
    found = stacks(model) if wanted else {}
    by_end: dict[str, list[str]] = {}
    for name in found:
        for end in ends(name):
            by_end.setdefault(end, []).append(name)
    chosen: dict[str, tuple[int, int]] = {}
    for target in wanted:
        its = by_end.get(target, [])
        if not its:
            shapes = [tuple(p.shape) for n, p in model.named_parameters() if matches([target], n)]
            got = f"one of shape {shapes[0]}" if shapes else "no parameter of that name"
            raise ValueError(
                f"c3a.patch_model: target_parameters: expected {target!r} to be a parameter with a "
                f"matrix for each expert, got {got}; there are: {_counted(found) or 'none'}"
            )
        for name in its:
            if (dtype := found[name].weight.dtype) not in SUPPORTED_DTYPES:
                raise TypeError(
                    f"c3a.patch_model: {name}: expected one of {SUPPORTED_DTYPES}, got {dtype}"
                )
            if not _within(name, saved):
                chosen[name] = found[name].features
    chosen = {name: chosen[name] for name in found if name in chosen}
    if wanted and not chosen:
        raise ValueError(
            f"c3a.patch_model: all that target_parameters {wanted} matched is in modules_to_save "
            f"{list(saved)}, and is trained whole instead of adapted"
        )
    return chosen


def _check_kind(block_size: object) -> None:
    if isinstance(block_size, Real | Mapping) or (
        isinstance(block_size, str) and block_size == "auto"
    ):
        return
    error = ValueError if isinstance(block_size, str) else TypeError
    raise error(
        "c3a.patch_model: expected block_size to be a number, a mapping from names to numbers, "
        f"or 'auto', got {shown(block_size)}"
    )


def _names(argument: str, kinds: str, names: object) -> list[str]:
    """Return a list of names, or raise TypeError."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"c3a.patch_model: expected {argument} to be {kinds}, got {shown(names)}")
    names = list(names)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(
            f"c3a.patch_model: expected {argument} to hold names, got {type(wrong[0]).__name__} "
            f"{shown(wrong[0])}"
        )
    return names


def _resolve_modules_to_save(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    resolved = []
    for wanted in _names("modules_to_save", "a list of names", names):
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
    model: nn.Module, targets: Targets | None, saved: tuple[str, ...]
) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    kinds = "a list of names, a regular expression, a predicate or 'all-linear'"
    if isinstance(targets, re.Pattern) and isinstance(targets.pattern, str):
        chosen = [name for name in modules if targets.fullmatch(name)]
    elif isinstance(targets, str) and targets == "all-linear":
        outputs = _output_embeddings(model)
        chosen = [
            name
            for name, module in modules.items()
            if _is_innermost_linear(module) and module is not outputs
        ]
    elif isinstance(targets, str):
        chosen = [name for name in modules if matches(targets, name)]
    elif callable(targets):
        chosen = [name for name, module in modules.items() if _says_yes(targets, name, module)]
    else:
        targets = _names("target_modules", kinds, targets)
        missing = [t for t in targets if not any(matches([t], name) for name in modules)]
        if missing:
            shapes = {
                end: tuple(parameter.shape)
                for name, parameter in model.named_parameters()
                for end in ends(name)
                if end in missing and not is_lazy(parameter)
            }
            parameters = "".join(
                f" ({end} is a parameter of shape {shape}: target_parameters adapts experts')"
                for end, shape in shapes.items()
            )
            raise ValueError(
                f"c3a.patch_model: no module is named {', '.join(map(repr, missing))}{parameters}; "
                + _available(model)
            )
        chosen = [name for name in modules if matches(targets, name)]
    matched = chosen
    chosen = [n for n in matched if not any(n == s or n.startswith(f"{s}.") for s in saved)]
    if matched and not chosen:
        raise ValueError(
            f"c3a.patch_model: all that target_modules {targets!r} matched is in modules_to_save "
            f"{list(saved)}, and is trained whole instead of adapted; {_available(model)}"
        )
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
    return {name: modules[name] for name in chosen}


def _says_yes(predicate: Callable[[str, nn.Module], bool], name: str, module: nn.Module) -> bool:
    try:
        return bool(predicate(name, module))
    except Exception as error:
        raise ValueError(
            f"c3a.patch_model: the predicate target_modules failed for {name!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _is_innermost_linear(module: nn.Module) -> bool:
    parts = [part for part in module.modules() if part is not module]
    return features(module) is not None and not any(features(part) for part in parts)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None
