"""``c3a export-lora``: write an adapter's nearest LoRA, for servers that know only that."""

import argparse
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export-lora",
        help="write the LoRA adapter that is nearest to an adapter",
        description="Write the LoRA adapter that is nearest to an adapter, for servers that know "
        "only LoRA. The energy is the squared norm of what is added to a weight.",
    )
    add = parser.add_argument
    add("adapter", type=Path, help="a folder that save_adapter or PEFT wrote")
    add("output", type=Path, help="the folder to write")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="of every layer")
    size.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="choose each layer's smallest rank that keeps this share of its energy, such as 0.99",
    )
    add(
        "--at-least",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="refuse a --rank that keeps less of the energy in all (default: 0.9)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the adapter and print what of each layer is kept."""
    from .. import lora
    from .inspect import in_order, print_table
    from .progress import tracker

    found = lora.export(
        options.adapter,
        options.output,
        rank=options.rank,
        energy=options.energy,
        at_least=options.at_least,
        track=tracker("decomposing"),
    )
    rows = [
        (
            name,
            str(layer.in_features),
            str(layer.out_features),
            str(layer.rank),
            _kept(layer.energy),
        )
        for name, layer in sorted(found.layers.items(), key=lambda item: in_order(item[0]))
    ]
    print_table(("layer", "in", "out", "rank", "energy"), rows)
    print(f"{_kept(found.energy)} of the energy kept in all; written to {options.output}")


def _kept(share: float) -> str:
    """Return a share, rounded down: what is not all is not shown as all."""
    return f"{int(1e4 * share) / 1e2:.2f} %"
