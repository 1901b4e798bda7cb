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
import c3a.peft
from report import Grid, Mark, Result
from timing import Contenders, Run, threads

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
ACCELERATED = "PEFT accelerated"


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
    accelerated = copy.deepcopy(of_peft[1])
    c3a.peft.accelerate(accelerated)
    models = {"head only": model, "C3A": ours, "LoRA": of_peft[0], "PEFT": of_peft[1]}
    return {**models, ACCELERATED: accelerated}


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


def bench_models(run: Run) -> Result:
    """Eager steps of every adapter, and without one."""

    def steps(sizes: dict[str, int]) -> Contenders:
        return {name: step_of(model, sizes) for name, model in adapted_models(sizes).items()}

    marks = [("C3A", "LoRA", 0.85), (ACCELERATED, "LoRA", 0.9), (ACCELERATED, "PEFT", 0.6)]
    return _bench(run, "eager", steps, marks)


def bench_compiled(run: Run) -> Result:
    """Compiled steps, with our eager one."""

    def steps(sizes: dict[str, int]) -> Contenders:
        models = adapted_models(sizes)
        torch.compiler.reset()
        compiled = {
            f"{name}, compiled": torch.compile(copy.deepcopy(models[name]), backend=run.backend)
            for name in ("C3A", "LoRA")
        }
        contenders = {"C3A": models["C3A"], **compiled}
        return {name: step_of(model, sizes) for name, model in contenders.items()}

    ours = "C3A, compiled"
    return _bench(run, "compiled", steps, [(ours, "LoRA, compiled", 0.95), (ours, "C3A", 0.95)])


def _bench(
    run: Run,
    how: str,
    steps_at: Callable[[dict[str, int]], Contenders],
    marks: list[tuple[str, str, float]],
) -> Result:
    sizes = QUICK if run.quick else SIZES
    result = Result()
    rows = []
    counts = run.threads[:1] if run.quick else run.threads
    for count in track(counts, f"a model's step, {how}", transient=True):
        # Compiled code is for one number of threads; the compiler warns of its own lines.
        with threads(count), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times = run.measure(steps_at(sizes))
        many = f"{count} thread{'s' * (count > 1)}"
        for above, below, limit in marks:
            ratio = times.ratio(above, below).value
            result.marks.append(Mark(f"step, {many}: {above} / {below}", ratio, limit))
        rows += [
            [f"C3A / {name}", str(count), str(times.ratio("C3A", name))]
            for name in times.rounds
            if name != "C3A"
        ]
        result.raw.append({"threads": count, "seconds": times.medians()})
    layers, hidden = sizes["num_hidden_layers"], sizes["hidden_size"]
    title = f"training step, {layers} layers, {hidden} wide, {BATCH[0]} x {BATCH[1]} tokens, {how}"
    result.grids.append(Grid(title, ["time of a step", "threads", "ratio"], rows))
    return result
