"""Times and weighs C3A against the PEFT library's C3A and LoRA and the frozen layer alone.

    python bench/bench.py                     every part, about half an hour on two idle cores
    python bench/bench.py --only layers       one part, or some
    python bench/bench.py --quick             does every part run? tiny shapes, half a minute
    python bench/bench.py --plot bench --markdown build/bench.md --json build/bench.json
    python bench/bench.py --device cuda       on a GPU: the operator at five shapes and two larger,
                                              with the time that memory alone takes beside each

Results are checked before they are timed. Rounds are interleaved: each times every contender once,
in an order drawn anew, and ratios are medians of rounds' ratios with the middle 80 % that resampled
rounds give. Marks hold on an idle machine; a mark that is not met changes no exit status.

parts, and their minutes:
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

import gpu
import report
from layers import bench_layers, bench_small, bench_sweep
from levels import bench_levels
from many import bench_many
from memory import bench_memory
from models import bench_compiled, bench_models
from operators import bench_shapes, bench_sweeps, bench_threads
from timing import Run


class Part(NamedTuple):
    run: Callable[[Run], report.Result]
    minutes: float
    what: str


PARTS = {
    "layers": Part(bench_layers, 2, "time over base, C3A / LoRA, five shapes, dtypes, threads"),
    "small": Part(bench_small, 0.2, "a layer of 384 features, T from 1 to 800"),
    "models": Part(bench_models, 1, "a six-layer encoder's training step"),
    "compiled": Part(bench_compiled, 4, "the encoder's step, compiled"),
    "memory": Part(bench_memory, 0.5, "bytes saved, peaks of layers and of steps"),
    "threads": Part(bench_threads, 0.2, "the operator, one thread against two"),
    "many": Part(bench_many, 0.5, "64 adapters in one batch, gradients of each sample"),
    "levels": Part(bench_levels, 0.5, "the operator, x86-64-v3 against v4"),
    "operator": Part(bench_shapes, 0.7, "the operator against its peers"),
    "sizes": Part(bench_sweeps, 1.5, "the operator over block sizes and tokens"),
    "sweep": Part(bench_sweep, 15, "a layer over tokens, in every dtype and mode"),
}
# A picture, what draws it, and the parts without which it is not drawn.
PICTURES = {
    "layers.png": ("draw_layers", ("layers",)),
    "operator.png": ("draw_operator", ("sizes",)),
}


def main(arguments: list[str] | None = None) -> int:
    parts = "\n".join(
        f"    {name:<10}{part.minutes:<5g}{part.what}" for name, part in PARTS.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__ + parts, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes and two rounds, for a try"
    )
    parser.add_argument(
        "--own-time",
        action="store_true",
        help="one thread alone, in its own time, for a machine where other programs run",
    )
    parser.add_argument("--json", type=Path, help="write seconds, figures and marks there")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw what was measured there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, help="on a GPU: tokens of every shape, for a try")
    options = parser.parse_args(arguments)
    files = [path.parent for path in (options.json, options.markdown) if path]
    for folder in [*files, *([options.plot] if options.plot else [])]:
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    if options.device == "cuda":
        gpu.main(options)
        return 0
    run = Run(
        rounds=2 if options.quick else options.rounds,
        quick=options.quick,
        threads=(1,) if options.own_time else (1, 2),
        own_time=options.own_time,
    )
    machine = report.machine()
    console = Console(width=150)
    clock = ", the thread's own time" if run.own_time else ""
    title = f"{machine}, {run.rounds} interleaved rounds{clock}"
    console.print(title, highlight=False)
    results: dict[str, report.Result] = {}
    for name in options.only:
        start = time.monotonic()
        results[name] = PARTS[name].run(run)
        report.show(console, name, results[name])
        console.print(f"{name} took {time.monotonic() - start:.0f} s\n", highlight=False)
    marks = [mark for result in results.values() for mark in result.marks]
    missed = [mark for mark in marks if not mark.met]
    said = " (they say nothing at these sizes)" if options.quick else ""
    console.print(f"{len(marks) - len(missed)} of {len(marks)} marks met{said}", highlight=False)
    if missed and not options.quick:
        console.print(report.marks_grid(missed).rich())
    if options.markdown:
        report.write_markdown(options.markdown, title, results)
    if options.json:
        report.write_json(options.json, title, results)
    if options.plot:
        import picture

        for file, (draw, needs) in PICTURES.items():
            if all(need in results for need in needs):
                getattr(picture, draw)(results, machine, options.plot / file)
                console.print(f"drawn: {options.plot / file}")
    return 0


if __name__ == "__main__":
    main()
