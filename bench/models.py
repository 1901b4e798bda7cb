"""A training step of a six-layer encoder, every linear layer adapted, eager and compiled.

Random weights at MiniLM's sizes, float32, with its dropout; a step is forward, backward and AdamW.
Block sizes by "auto", LoRA of rank 8; the classifier is trained beside them.
"""

import copy
import warnings
from collections.abc import Callable

import peft
import torch
from rich.progress import track
from torch import nn

import c3a
from report import Grid, Mark, Result
from timing import Contenders, compiler, measure, threads

SIZES = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
BATCH = (16, 64)
QUICK = {**SIZES, "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 1}
QUICK |= {"intermediate_size": 96}
HEAD = "classifier"
RANK = 8


def adapted_models(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """The same encoder with nothing but its head trained, and with each adapter."""
    import transformers

    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).train()
    ours = c3a.patch_model(
        copy.deepcopy(model), "all-linear", "auto", rank=RANK, modules_to_save=[HEAD]
    )
    blocks = {
        name: layer.block_size
        for name, layer in ours.named_modules()
        if isinstance(layer, c3a.C3ALinear)
    }
    common = {"target_modules": list(blocks), "task_type": "SEQ_CLS"}
    lora = peft.LoraConfig(r=RANK, **common)
    theirs = peft.C3AConfig(block_size=1, block_size_pattern=blocks, **common)
    for name, part in model.named_parameters():
        part.requires_grad_(name.startswith(HEAD))
    with warnings.catch_warnings():
        # peft's use of transformers
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        of_peft = [peft.get_peft_model(copy.deepcopy(model), config) for config in (lora, theirs)]
    return {"head only": model, "C3A": ours, "LoRA": of_peft[0], "PEFT": of_peft[1]}


def step_of(model: nn.Module, sizes: dict[str, int]) -> Callable[[], None]:
    """Return a function that trains a step on random tokens."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(sizes["vocab_size"], BATCH)
    labels = torch.randint(2, BATCH[:1])
    mask = torch.ones_like(tokens)

    def step() -> None:
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_models(rounds: int, quick: bool) -> Result:
    sizes = QUICK if quick else SIZES
    result = Result()
    rows = []
    for count in track((1,) if quick else (1, 2), "a model's step", transient=True):
        models = adapted_models(sizes)
        steps: Contenders = {name: step_of(model, sizes) for name, model in models.items()}
        # Compiled code is for one number of threads.
        with threads(count), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compiler.reset()
            for name in ("C3A", "LoRA"):
                compiled = torch.compile(copy.deepcopy(models[name]), backend=compiler(quick))
                steps[f"{name}, compiled"] = step_of(compiled, sizes)
            times = measure(steps, rounds)
        many = f"{count} thread{'s' * (count > 1)}"
        for above, below, limit in (
            ("C3A", "LoRA", 0.85),
            ("C3A, compiled", "LoRA, compiled", 0.95),
            ("C3A, compiled", "C3A", 0.95),
        ):
            ratio = times.ratio(above, below).value
            result.marks.append(Mark(f"step, {many}: {above} / {below}", ratio, limit))
        rows += [
            [name, str(count), str(times.ratio(name, "LoRA")), str(times.ratio(name, "head only"))]
            for name in steps
        ]
        result.raw.append({"threads": count, "seconds": times.medians()})
    layers, hidden = sizes["num_hidden_layers"], sizes["hidden_size"]
    title = f"training step, {layers} layers, {hidden} wide, {BATCH[0]} x {BATCH[1]} tokens"
    result.grids.append(Grid(title, ["step", "threads", "of LoRA's", "of the head's alone"], rows))
    return result
