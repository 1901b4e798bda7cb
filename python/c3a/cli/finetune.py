"""``c3a finetune``: fine-tune a sequence classifier and say how well it did."""

import argparse
import json
import time
from pathlib import Path

from .options import block_size

_TOO_MUCH = 2**31
_METHODS = ("c3a", "lora", "bitfit", "head", "full")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a sequence classifier and report its accuracy",
        description="Fine-tune a sequence classifier of transformers. By default the packaged "
        "MiniLM-L6 on the packaged Rotten Tomatoes sentences: no hub is needed.",
    )
    add = parser.add_argument
    add("--model", help="a local folder or a hub's name (default: the packaged MiniLM-L6)")
    add("--data", type=Path, help="a CSV, TSV or JSON-lines file (default: Rotten Tomatoes)")
    add("--text-column", default="text", help="the texts' column (default: %(default)s)")
    add("--label-column", default="label", help="the classes' column (default: %(default)s)")
    add(
        "--method",
        choices=_METHODS,
        default="c3a",
        help="what to train beside the head (default: %(default)s)",
    )
    add(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="ends of names, or one regular expression for whole names (default: all-linear)",
    )
    add(
        "--block-size",
        type=block_size,
        default="auto",
        help="of C3A (default: auto, the common divisor nearest to sqrt(in * out) / rank)",
    )
    add(
        "--rank",
        type=int,
        default=8,
        help="of LoRA, and for --block-size auto (default: %(default)s)",
    )
    add("--lr", type=float, help="learning rate of the adapter (default: by method)")
    add("--head-lr", type=float, help="learning rate of the head (default: by method)")
    add("--epochs", type=float, default=3.0, help="passes over the data (default: %(default)s)")
    add("--steps", type=int, help="stop after this many steps instead of --epochs")
    add("--batch-size", type=int, default=32, help="texts in a step (default: %(default)s)")
    add(
        "--max-length",
        type=int,
        default=64,
        help="tokens a text is cut to (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of splits, order and weights (default: %(default)s)")
    add("--output", type=Path, help="a new folder, or that of an earlier run (default: not saved)")
    add("--compile", action="store_true", help="train under torch.compile")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, test, print the table and write the output folder, whole or not at all."""
    from rich.console import Console

    from ..files import check_free, write_folder
    from . import data, models, training
    from .failures import WRITING, working_on

    for name in ("rank", "batch_size", "max_length", "epochs", "steps", "lr", "head_lr"):
        value = getattr(options, name)
        if value is not None and not 0 < value < _TOO_MUCH:
            raise ValueError(f"expected 0 < --{name.replace('_', '-')} < 2**31, got {value}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"expected 0 <= --seed < 2**32, got {options.seed}")
    if options.method == "head" and options.lr is not None:
        raise ValueError("--lr is for adapters; --method head takes --head-lr")
    if options.output:
        check_free(options.output, marker="metrics.json")
    training.quiet_libraries(options.seed)
    console = Console(markup=False)
    if options.data:
        examples = data.read(options.data, options.text_column, options.label_column)
    else:
        examples = data.rotten_tomatoes()
    splits = data.split(examples, options.seed)
    sizes = tuple(map(len, splits))
    source = options.model or models.packaged_minilm()
    console.print(
        f"{options.method} on {source}\n{sizes[0]} sentences to train on, {sizes[1]} to "
        f"validate, {sizes[2]} to test; {len(examples.names)} classes"
    )

    model, tokenizer, head = models.load_classifier(source, examples.names)
    train, validation, test = (
        training.encode(part, model, tokenizer, options.max_length) for part in splits
    )
    targets = _targets(options.target_modules)
    adapted = models.adapt(model, options.method, head, targets, options.block_size, options.rank)
    lr, head_lr = models.LEARNING_RATES[options.method]
    lr = lr if options.lr is None else options.lr
    head_lr = head_lr if options.head_lr is None else options.head_lr
    result = training.train(
        adapted,
        tokenizer,
        (train, validation, test),
        head=head,
        lr=lr,
        head_lr=head_lr,
        epochs=options.epochs,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        compile=options.compile,
    )
    console.print(training.table(options.method, result))
    if options.output:
        metrics = {
            "method": options.method,
            "model": source,
            "data": str(options.data or "rotten_tomatoes"),
            "labels": examples.names,
            "lr": lr,
            "head_lr": head_lr,
            "seed": options.seed,
            "date": time.strftime("%Y-%m-%d"),
            **result.metrics(),
        }

        def write(folder: Path) -> None:
            with working_on(options.output, WRITING):
                models.save(adapted, options.method, folder)
                training.draw_curve(result, options.method, folder / "curve.png")
                text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
                (folder / "metrics.json").write_text(text, encoding="utf-8")

        write_folder(options.output, write)
        console.print(f"written to {options.output}")


def _targets(names: list[str]) -> str | list[str]:
    if len(names) == 1 and (names[0] == "all-linear" or set(names[0]) & set("*+?|()[]\\^$")):
        return names[0]
    return names
