"""``c3a convert``: write the adapter that is nearest to a LoRA, or to a fine-tuned checkpoint."""

import argparse
from pathlib import Path

from .options import block_size

_SHOWN = 3


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "convert",
        help="write the adapter that is nearest to a LoRA, or to a fine-tuned checkpoint",
        description="Write the adapter that is nearest to a LoRA adapter or, with --base, to what "
        "fine-tuning has added to a model: a start for training.",
    )
    add = parser.add_argument
    add("source", type=Path, help="a LoRA adapter's folder, or a fine-tuned checkpoint")
    add("output", type=Path, help="the folder to write")
    add(
        "--block-size",
        type=block_size,
        required=True,
        help="a number that divides all sides, or auto",
    )
    add("--rank", type=int, default=8, help="for --block-size auto (default: 8)")
    add("--base", type=Path, help="the checkpoint that the source was fine-tuned from")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="with --base: ends of names of the linear layers to take",
    )
    add(
        "--modules-to-save",
        nargs="+",
        metavar="NAME",
        help="with --base: ends of names of modules that go along whole, such as a head",
    )
    add(
        "--fan-in-fan-out",
        action="store_true",
        help="with --base: weights are (in, out), as GPT-2's",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the adapter and print how far each layer is from what it stands for."""
    from .. import convert
    from .inspect import in_order, print_table, shortened
    from .progress import tracker

    track = tracker("converting")
    if options.base is None:
        for name in ("target_modules", "modules_to_save", "fan_in_fan_out"):
            if getattr(options, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is for checkpoints, with --base; a LoRA adapter "
                    "says it itself"
                )
        found = convert.from_lora(
            options.source, options.output, options.block_size, rank=options.rank, track=track
        )
    else:
        if not options.target_modules:
            raise ValueError("expected --target-modules with --base: which layers are linear")
        found = convert.from_checkpoints(
            options.base,
            options.source,
            options.output,
            options.block_size,
            target_modules=options.target_modules,
            modules_to_save=options.modules_to_save or (),
            fan_in_fan_out=options.fan_in_fan_out,
            rank=options.rank,
            track=track,
        )
    rows = [
        (name, *map(str, layer[:3]), f"{layer.error:.4f}")
        for name, layer in sorted(found.layers.items(), key=lambda item: in_order(item[0]))
    ]
    print_table(("layer", "in", "out", "block", "error"), rows)
    if found.left_out:
        names = [f"{name!r}"[1:-1] for name in found.left_out[:_SHOWN]]
        more = ", ..." if len(found.left_out) > _SHOWN else ""
        print(
            f"{len(found.left_out)} more tensors differ from the base's and are left out: "
            f"{', '.join(shortened(names, 60))}{more}"
        )
    print(f"relative error in all {found.error:.4f}; written to {options.output}")
