"""``c3a merge``: write a model folder with an adapter merged into its weights."""

import argparse
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "merge", help="write a model folder with an adapter merged into its weights"
    )
    parser.add_argument("adapter", type=Path, help="a folder that save_adapter or PEFT wrote")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument(
        "--model", help="the base model, a folder or a hub's name (default: the adapter's own)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Load the base model and the adapter, merge, and write model and tokenizer."""
    import transformers

    import c3a

    from ..files import check_free, write_folder
    from . import models
    from .failures import WRITING, working_on

    check_free(options.output)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer, source = models.load_base(options.adapter, options.model)
    c3a.load_adapter(model, options.adapter)
    layers = len(c3a.summary(model).layers)
    c3a.unpatch_model(model, merge=True)

    def write(folder: Path) -> None:
        with working_on(options.output, WRITING):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    write_folder(options.output, write)
    print(f"{layers} layers of {source} merged; written to {options.output}")
