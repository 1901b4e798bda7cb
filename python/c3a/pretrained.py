"""``save_pretrained`` of a patched model of transformers: what it writes can be loaded again.

The folder holds the base model in its own names and the adapter in PEFT's format, which
``from_pretrained`` adds to it. Each kernel also stands beside its layer's weight, as
``<layer>.c3a_kernel``: that is where Trainer looks for it when it resumes. A merged model is
written as an ordinary one.
"""

import re
import sys
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import adapter_files
from .adapter import adapter_of, kernel_of, load_adapter, warn_of_what_peft_cannot_load
from .adapter_files import CONFIG, said_by
from .experts import ADAPTERS, C3AExperts, adapted_experts, plain_class
from .files import replacing_in
from .linear import C3ALinear
from .patch import adapters, as_trained

_WHO = "c3a: save_pretrained"
_RENAMING = "_c3a_renaming"
_NO_SUCH_FOLDER = "no-adapter"
# What PEFT's configurations call the tasks that a class of transformers says in its name.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


def load_pretrained(model_class: Any, folder: str | Path, **options: Any) -> nn.Module:
    """Load the folder of a patched model's ``save_pretrained``, or a checkpoint of Trainer's.

    ``model_class.from_pretrained(folder)`` gives the same function, by the PEFT library's layers,
    whose input gradient is wrong, and only where PEFT has such layers. This gives ``C3ALinear``.

    Args:
        model_class: a class of transformers that has ``from_pretrained``, such as
            ``AutoModelForSequenceClassification``.
        folder: what was saved.
        options: for ``from_pretrained``.

    Returns:
        The model, patched, with the scale ``1 / in_features``.

    Raises:
        FileNotFoundError, ValueError: as ``c3a.load_adapter``; and what ``from_pretrained`` raises.

    transformers reports the keys ``c3a_kernel`` as unexpected; they come from the adapter.

    >>> import c3a, transformers
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = transformers.BertModel(transformers.BertConfig(vocab_size=4, **sizes))
    >>> c3a.patch_model(model, ["query"], block_size=4).save_pretrained("my_model")
    >>> model = c3a.load_pretrained(transformers.BertModel, "my_model")
    >>> model.encoder.layer[0].attention.self.query.block_size
    4
    """
    # from_pretrained has no other way to leave out an adapter that lies beside the model
    leave_out = {"subfolder": _NO_SUCH_FOLDER}
    model: nn.Module = model_class.from_pretrained(folder, adapter_kwargs=leave_out, **options)
    return load_adapter(model, folder)


def take_over(model: nn.Module) -> None:
    """Give every model of transformers within a patched one a ``save_pretrained`` that knows it."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    for part in model.modules() if library else ():
        if isinstance(part, library.PreTrainedModel) and adapters(part):
            # goes with the model where that is copied or pickled
            part.__dict__.setdefault("save_pretrained", partial(save_pretrained, part))
            if adapted_experts(part) and _RENAMING not in part.__dict__:
                part.__dict__[_RENAMING] = part.register_load_state_dict_pre_hook(_take_renamed)


def give_back(model: nn.Module) -> None:
    """Undo ``take_over``."""
    for part in model.modules():
        if getattr(part.__dict__.get("save_pretrained"), "func", None) is save_pretrained:
            del part.__dict__["save_pretrained"]
        if handle := part.__dict__.pop(_RENAMING, None):
            handle.remove()


def _take_renamed(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Let the names in a model's files fit, which Trainer resumes from.

    Files of some models (Mixtral's) have other names for what holds the experts: a kernel is known
    by the numbers in its name and what follows the last of its modules.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for key in state_dict:
        if f".{ADAPTERS}." in key:
            alike.setdefault(_known_by(key), []).append(key)
    for name, _parameter in model.named_parameters(prefix.rstrip(".")):
        if f".{ADAPTERS}." in name and name not in state_dict:
            found = alike.get(_known_by(name), [])
            if len(found) == 1:
                state_dict[name] = state_dict.pop(found[0])


def _known_by(name: str) -> tuple[str, ...]:
    before, _, after = name.partition(f".{ADAPTERS}.")
    return *(part for part in before.split(".") if part.isdecimal()), after


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Write a patched model's base and adapter, or a merged model, as one step.

    Args:
        model: a patched model of transformers.
        save_directory, is_main_process, state_dict, options: as for the model's own method.

    Raises:
        ValueError: as ``c3a.save_adapter``; some layers are merged and some not; a merged model,
            and a folder with an adapter; ``push_to_hub``, or ``distributed_checkpoint``. Nothing
            is written then.

    Warns that ``from_pretrained`` cannot load layers that PEFT cannot adapt.
    """
    folder = Path(save_directory)
    with said_by(_WHO), as_trained(model):
        if unable := [key for key in ("push_to_hub", "distributed_checkpoint") if options.get(key)]:
            raise ValueError(
                f"expected {unable[0]}=False for a patched model, whose adapter is written "
                "beside it (model.push_to_hub sends both)"
            )
        layers = adapters(model)
        is_merged = _is_merged(layers)
        if is_merged and (folder / CONFIG).exists():
            raise ValueError(
                f"{folder} holds an adapter ({CONFIG}), which from_pretrained would add to the "
                "merged weights: save into another folder"
            )
        has_adapter = bool(layers) and not is_merged
        adapter = adapter_of(model, _task_of(model), state_dict) if has_adapter else None
        base = _base_of(model, is_merged)
    if state_dict is not None:
        state_dict = _in_base_names(model, state_dict, is_merged)
    kind: Any = type(base)
    write = kind.save_pretrained
    if not is_main_process:
        write(base, folder, is_main_process=False, state_dict=state_dict, **options)
        return
    if adapter:
        warn_of_what_peft_cannot_load(
            f"{_WHO}: c3a.load_pretrained can load {folder}, from_pretrained cannot, as it "
            "leaves the adapter to the PEFT library",
            layers,
        )
    with as_trained(model), replacing_in(folder, last=adapter_files.FILES) as fresh:
        write(base, fresh, state_dict=state_dict, **options)
        if adapter:
            adapter_files.prepare(fresh, folder, *adapter)
        written = {path.name for path in fresh.iterdir()}
    _remove_stale_weights(folder, written, options.get("variant"))


def _task_of(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _is_merged(layers: Mapping[str, C3ALinear | C3AExperts]) -> bool:
    names: dict[bool, list[str]] = {True: [], False: []}
    for name, layer in layers.items():
        names[layer.merged].append(name)
    if names[True] and names[False]:
        raise ValueError(
            f"some layers are merged ({names[True][0]}) and some not ({names[False][0]}): call "
            "c3a.merge or c3a.unmerge first"
        )
    return bool(names[True])


def _base_of(model: nn.Module, is_merged: bool) -> nn.Module:
    """Return a model in which the layers stand that were adapted, with all tensors of this one.

    Unless merged, a layer has its kernel as one more parameter. Only modules above an adapted layer
    are copied; the model itself is not touched, so it may run meanwhile.
    """
    names = {id(layer): name for name, layer in adapters(model).items()}
    made: dict[int, nn.Module] = {}

    def without_adapters(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            made[id(module)] = made_of(module)
        return made[id(module)]

    def made_of(module: nn.Module) -> nn.Module:
        if isinstance(module, C3ALinear):
            own = {"weight": _merged_weight(module)} if is_merged else {}
            if not is_merged:
                kernel = kernel_of(names[id(module)], module)
                own["c3a_kernel"] = nn.Parameter(kernel, requires_grad=False)
            return _copied(module.base_layer, _parameters=own)
        if is_merged and ADAPTERS in module._modules:
            return _with_merged_experts(module)
        children = {
            name: child and without_adapters(child) for name, child in module._modules.items()
        }
        if all(child is module._modules[name] for name, child in children.items()):
            return module
        return _copied(module, _modules=children)

    return without_adapters(model)


def _with_merged_experts(module: nn.Module) -> nn.Module:
    merged = {name: adapter.merged_weight for name, adapter in adapted_experts(module).items()}
    copy = _copied(module, _parameters=merged)
    copy.__class__ = plain_class(module)
    copy._modules = {name: m for name, m in module._modules.items() if name != ADAPTERS}
    return copy


def _copied(module: nn.Module, **more: dict[str, Any]) -> nn.Module:
    """Return a module with the same contents, but for some parameters or modules."""
    copy = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for kind, entries in more.items():
        copy.__dict__[kind] = {**module.__dict__[kind], **entries}
    copy.__dict__.pop("save_pretrained", None)
    return copy


def _merged_weight(layer: C3ALinear) -> nn.Parameter:
    base: Any = layer.base_layer
    weight: nn.Parameter = base.weight if layer.enabled else layer._set_aside[0]
    return weight


def _in_base_names(
    model: nn.Module, state: Mapping[str, Tensor], is_merged: bool
) -> dict[str, Tensor]:
    """Return a state dict of the model in the names of its base, as ``_base_of`` has them."""
    places = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, C3ALinear)
    }
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        for place, part in enumerate(parts):
            if part == "base_layer" and ".".join(parts[:place]) in places:
                key = ".".join(parts[:place] + parts[place + 1 :])
                break
        renamed[key] = tensor
    if is_merged:  # a state dict holds the original weights
        for name, layer in places.items():
            renamed.pop(f"{name}.c3a_kernel", None)
            if f"{name}.weight" in renamed:
                renamed[f"{name}.weight"] = _merged_weight(layer).detach()
        renamed = {key: t for key, t in renamed.items() if f".{ADAPTERS}." not in f".{key}"}
        for name, adapter in adapted_experts(model).items():
            if name in renamed:
                renamed[name] = adapter.merged_weight.detach()
    return renamed


def _remove_stale_weights(folder: Path, written: Collection[str], variant: str | None) -> None:
    """Remove what ``from_pretrained`` would take instead of the weights that were written."""
    variant = f"\\.{re.escape(variant)}" if variant else ""
    weights = re.compile(
        rf"model{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{variant}\.json"
    )
    for path in folder.iterdir():
        if weights.fullmatch(path.name) and path.name not in written:
            path.unlink()
