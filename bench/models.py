"""A training step of a six-layer encoder, every linear layer adapted, eager and compiled.

Random weights at MiniLM's sizes, float32; a step is forward, backward and AdamW. Block sizes by
"auto", LoRA of rank 8; the classifier is trained beside them. Dropout is 0.1 in the eager part, and
0 where compiled steps are compared: Inductor draws a CPU's random numbers one by one, which would
take longer than what adapters do.
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
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEAD = "classifier"
# Small, and below every layer: a backward goes through the whole of a model without adapters too.
LOWEST = "bert.embeddings.LayerNorm"
RANK = 8
ACCELERATED = "PEFT accelerated"


def adapted_models(sizes: dict[str, float]) -> dict[str, nn.Module]:
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


def step_of(model: nn.Module, sizes: dict[str, float]) -> Callable[[], None]:
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

    def steps(sizes: dict[str, float]) -> Contenders:
        return {name: step_of(model, sizes) for name, model in adapted_models(sizes).items()}

    pairs = [("C3A", name) for name in ("head only", "LoRA", "PEFT", ACCELERATED)]
    marks = [("C3A", "LoRA", 0.85), (ACCELERATED, "LoRA", 0.9), (ACCELERATED, "PEFT", 0.6)]
    return _bench(run, "eager", steps, pairs, marks)


def bench_compiled(run: Run) -> Result:
    """Compiled and eager steps of both, and of the model without adapters."""

    def steps(sizes: dict[str, float]) -> Contenders:
        models = adapted_models({**sizes, **NO_DROPOUT})
        models["no adapter"] = models.pop("head only")
        models["no adapter"].get_submodule(LOWEST).requires_grad_(True)
        torch.compiler.reset()
        eager = {name: models[name] for name in ("C3A", "LoRA", "no adapter")}
        compiled = {
            f"{name}, compiled": torch.compile(copy.deepcopy(model), backend=run.backend)
            for name, model in eager.items()
        }
        contenders = {**eager, **compiled}
        return {name: step_of(model, sizes) for name, model in contenders.items()}

    ours = "C3A, compiled"
    pairs = [("C3A", "LoRA"), (ours, "LoRA, compiled"), (ours, "no adapter, compiled")]
    pairs += [(f"{name}, compiled", name) for name in ("C3A", "LoRA", "no adapter")]
    marks = [(ours, "LoRA, compiled", 0.95), (ours, "C3A", 0.95)]
    return _bench(run, "compiled, without dropout", steps, pairs, marks)


def _bench(
    run: Run,
    how: str,
    steps_at: Callable[[dict[str, int]], Contenders],
    pairs: list[tuple[str, str]],
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
        rows += [[f"{a} / {b}", str(count), str(times.ratio(a, b))] for a, b in pairs]
        result.raw.append({"threads": count, "seconds": times.medians()})
    layers, hidden = sizes["num_hidden_layers"], sizes["hidden_size"]
    title = f"training step, {layers} layers, {hidden} wide, {BATCH[0]} x {BATCH[1]} tokens, {how}"
    result.grids.append(Grid(title, ["time of a step", "threads", "ratio"], rows))
    return result
