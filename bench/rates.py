"""Where learning rates begin: validation loss over rates, block sizes, widths and seeds.

Rotten Tomatoes on pretrained encoders. Adapters on every linear layer of the last layers, LoRA's
beside them; what is below is frozen, so its results are computed once for all runs. AdamW without
weight decay, 6 % warm-up, then linear to zero. Every finished run is in the JSON file, from which
the next call goes on; runs are in the order of seeds, so what is there is a whole smaller sweep.

    python bench/rates.py                                   # MiniLM, 384 wide
    python bench/rates.py --model minilm --model FOLDER     # and another encoder of transformers
    python bench/rates.py --draw                            # table and picture of what is there
"""

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

import c3a
from c3a.cli.data import rotten_tomatoes, split

BLOCKS = (16, 48, 128, 384)
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
LORA_RANK, LORA_RATES = 8, (1e-3, 3e-3, 1e-2, 3e-2)
HEAD_RATE = 5e-3
TRAINED, VALIDATED = 768, 400  # sentences
FIELDS = ("width", "method", "block_size", "rate", "seed")


class Given(nn.Module):
    """Stands where embeddings and frozen layers were, and gives their results."""

    hidden: Tensor

    def forward(self, *_: object, **__: object) -> Tensor:
        return self.hidden


class Task:
    """Sentences as an encoder's last layers take them, and those layers."""

    def __init__(self, source: str, layers: int, max_length: int) -> None:
        if source == "minilm":
            from c3a.cli.models import packaged_minilm

            source = packaged_minilm()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        below = transformers.AutoModel.from_pretrained(source, add_pooling_layer=False).eval()
        self.width = below.config.hidden_size
        self.above = copy.deepcopy(below)
        self.above.encoder.layer = self.above.encoder.layer[-layers:]
        self.above.embeddings = Given()
        below.encoder.layer = below.encoder.layer[:-layers]
        train, validation, _ = split(rotten_tomatoes(), seed=0)
        self.train, self.validation = (
            self._below(below, tokenizer, part.take(range(count)), max_length)
            for part, count in ((train, TRAINED), (validation, VALIDATED))
        )

    @torch.no_grad()
    def _below(self, below, tokenizer, examples, max_length) -> list[tuple[Tensor, int]]:
        found = []
        for text, label in zip(examples.texts, examples.labels, strict=True):
            inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
            found.append((below(**inputs).last_hidden_state[0], label))
        return found


def logits_of(model: nn.Module, given: Given, head: nn.Module, batch) -> tuple[Tensor, Tensor]:
    hidden = [rows for rows, _ in batch]
    given.hidden = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    lengths = torch.tensor([len(rows) for rows in hidden])
    mask = (torch.arange(given.hidden.shape[1]) < lengths[:, None]).long()
    ids = torch.ones_like(mask)
    last = model(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = (last * mask[..., None]).sum(1) / lengths[:, None]
    return head(pooled), torch.tensor([label for _, label in batch])


def run(task: Task, method: str, block: int, rate: float, seed: int, steps: int, size: int):
    torch.manual_seed(seed)
    model = copy.deepcopy(task.above)
    given = model.embeddings
    if method == "c3a":
        c3a.patch_model(model, "all-linear", block)
    else:
        config = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = peft.get_peft_model(model, config)
    head = nn.Linear(task.width, 2)
    adapter = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": adapter, "lr": rate}, {"params": head.parameters(), "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, math.ceil(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm + 1))
    )
    model.train()
    rows = itertools.chain.from_iterable(
        torch.randperm(len(task.train)).tolist() for _ in itertools.count()
    )
    losses = []
    for _ in range(steps):
        batch = [task.train[row] for row in itertools.islice(rows, size)]
        loss = nn.functional.cross_entropy(*logits_of(model, given, head, batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*adapter, *head.parameters()], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        # Of nearly one length, for there is little to pad then.
        ordered = sorted(task.validation, key=lambda row: len(row[0]))
        parts = [ordered[at : at + 50] for at in range(0, len(ordered), 50)]
        found = [logits_of(model, given, head, part) for part in parts]
    logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return {
        "parameters": sum(p.numel() for p in adapter),
        "train_loss": statistics.mean(losses[-max(1, steps // 5) :]),
        "validation_loss": nn.functional.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
    }


def kinds(rates, blocks):
    yield from (("c3a", block, rate) for block in blocks for rate in rates)
    yield from (("lora", LORA_RANK, rate) for rate in LORA_RATES)


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"setting": None, "runs": []}


def write(path: Path, results: dict) -> None:
    runs = ",\n".join(f"  {json.dumps(run)}" for run in results["runs"])
    fresh = path.with_suffix(".writing")
    setting = json.dumps(results["setting"])
    fresh.write_text(f'{{"setting": {setting},\n "runs": [\n{runs}\n]}}\n')
    os.replace(fresh, path)


def means(runs: list[dict]) -> dict[tuple, dict[float, tuple[float, float, int]]]:
    """Return by (width, method, block size) and rate: the mean loss, its spread, the seeds."""
    found: dict[tuple, dict] = {}
    for key in dict.fromkeys(tuple(run[field] for field in FIELDS[:4]) for run in runs):
        same = [run for run in runs if tuple(run[field] for field in FIELDS[:4]) == key]
        losses = [run["validation_loss"] for run in same]
        spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
        found.setdefault(key[:3], {})[key[3]] = (statistics.mean(losses), spread, len(losses))
    return found


def named(method: str, block: int) -> str:
    return f"C3A, block {block}" if method == "c3a" else f"LoRA, rank {block}"


def table(runs: list[dict]) -> str:
    """Return a table a method: a row for each width and block, a column for each rate."""
    found = means(runs)
    lines = []
    for method in dict.fromkeys(method for _, method, _ in found):
        of_method = {key: cells for key, cells in sorted(found.items()) if key[1] == method}
        rates = sorted({rate for cells in of_method.values() for rate in cells})
        heads = ["width", "adapter", "seeds", *(f"rate {rate:g}" for rate in rates)]
        lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for (width, _, block), cells in of_method.items():
            best = min(cells, key=lambda rate: cells[rate][0])
            counts = {seeds for _, _, seeds in cells.values()}
            seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{min(counts)}"
            row = [str(width), named(method, block), seeds]
            for rate in rates:
                mean, spread, count = cells.get(rate, (math.nan, math.nan, 0))
                shown = f"**{mean:.3f}**" if rate == best else f"{mean:.3f}" if count else ""
                row.append(f"{shown} ± {spread:.3f}" if count > 1 else shown)
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = means(results["runs"])
    widths = sorted({width for width, _, _ in found})
    size = (5.2 * len(widths), 4)
    figure, axes = pyplot.subplots(
        1, len(widths), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for ax, width in zip(axes[0], widths, strict=True):
        for (of, method, block), cells in sorted(found.items()):
            if of != width:
                continue
            rates = sorted(cells)
            ax.errorbar(
                rates,
                [cells[rate][0] for rate in rates],
                [cells[rate][1] for rate in rates],
                fmt="o-" if method == "c3a" else "s--",
                capsize=2,
                label=named(method, block),
            )
        ax.set(xscale="log", xlabel="learning rate of the adapter", title=f"{width} features")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation loss, mean and sd of seeds")
    axes[0][-1].legend(fontsize=8)
    setting = results["setting"]
    figure.suptitle(
        f"Rotten Tomatoes, every linear layer of the last {setting['layers']} of the encoder, "
        f"{setting['steps']} steps of {setting['batch_size']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="minilm (the default) or a folder")
    parser.add_argument("--json", type=Path, default=Path("bench/rates.json"))
    parser.add_argument("--plot", type=Path, default=Path("bench/rates.png"))
    parser.add_argument("--layers", type=int, default=1, help="how many of the last are adapted")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after that")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    given = parser.parse_args()

    results = read(given.json)
    if not given.draw:
        names = ("layers", "steps", "batch_size", "max_length")
        setting = {name: getattr(given, name) for name in names}
        if results["setting"] not in (None, setting):
            parser.error(f"{given.json} holds runs of {results['setting']}, not of {setting}")
        results["setting"] = setting
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        start, done = time.monotonic(), {tuple(r[f] for f in FIELDS) for r in results["runs"]}
        tasks = [Task(model, given.layers, given.max_length) for model in given.model or ["minilm"]]
        for seed, task in itertools.product(range(given.seeds), tasks):
            for method, block, rate in kinds(given.rates, given.blocks):
                key = (task.width, method, block, rate, seed)
                if key in done or time.monotonic() - start > 60 * given.minutes:
                    continue
                began = time.process_time()
                found = run(task, method, block, rate, seed, given.steps, given.batch_size)
                found["seconds"] = round(time.process_time() - began, 2)
                results["runs"].append({**dict(zip(FIELDS, key, strict=True)), **found})
                write(given.json, results)
                print(*key, f"{found['validation_loss']:.4f} {100 * found['accuracy']:.1f} %")
    print(table(results["runs"]))
    draw(results, given.plot)


if __name__ == "__main__":
    main()
