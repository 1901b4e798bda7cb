"""Times C3A's forward and backward against the PEFT library's C3A, a LoRA and the frozen layer.

Every contender is checked before it is timed. Timings are interleaved, one round of each after
another; medians are printed, with the ratios that count on a noisy machine. Gradients are taken for
the input and the adapter, and for the base layer for its input alone.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from rich.console import Console
from rich.table import Table
from torch import nn

import c3a

# (in, out, block size, tokens, LoRA rank): the shapes at which peers were measured.
SHAPES = [
    (768, 768, 128, 2048, 8),
    (768, 768, 768, 2048, 8),
    (1024, 1024, 128, 2048, 8),
    (4096, 4096, 128, 512, 32),
    (4096, 4096, 256, 512, 16),
]


def contenders(n_in: int, n_out: int, b: int, tokens: int, rank: int) -> dict:
    """Return a function for each contender that runs one forward and backward."""
    x = torch.randn(tokens, n_in, requires_grad=True)
    g = torch.randn(tokens, n_out)
    w = torch.randn(n_out // b, n_in // b, b, requires_grad=True)
    down = torch.randn(rank, n_in, requires_grad=True)
    up = torch.randn(n_out, rank, requires_grad=True)
    base = nn.Linear(n_in, n_out).requires_grad_(False)

    def run(forward, inputs):
        return lambda: torch.autograd.grad(forward(), inputs, g)

    def lora():
        return x @ down.T @ up.T

    y = c3a.block_circ_conv(x, w)
    matrix = c3a.circulant(w)
    torch.testing.assert_close(y, x @ matrix.T, rtol=1e-3, atol=1e-3 * n_in**0.5)
    torch.testing.assert_close(y, BlockCircularConvolution.apply(x, w), rtol=1e-3, atol=1e-1)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    expected = torch.autograd.grad(x @ matrix.T, (x, w), g)
    torch.testing.assert_close(dx, expected[0], rtol=1e-3, atol=1e-3 * n_out**0.5)
    torch.testing.assert_close(dw, expected[1], rtol=1e-3, atol=1e-2 * tokens**0.5)
    return {
        "c3a": run(lambda: c3a.block_circ_conv(x, w), (x, w)),
        "PEFT C3A": run(lambda: BlockCircularConvolution.apply(x, w), (x, w)),
        "LoRA": run(lora, (x, down, up)),
        "base layer": run(lambda: base(x), (x,)),
    }


def measure(functions: dict, rounds: int) -> dict[str, float]:
    """Return the median seconds of each function over interleaved rounds."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    title = f"forward + backward, float32, {options.threads} thread(s), {machine}"
    table = Table(title=f"{title}, torch {torch.__version__}; medians of {options.rounds}")
    for column in ("in x out", "block", "tokens", "c3a", "PEFT C3A", "LoRA", "base layer"):
        table.add_column(column, justify="right")
    table.add_column("PEFT / c3a", justify="right")
    table.add_column("c3a / LoRA", justify="right")
    results = []
    for n_in, n_out, b, tokens, rank in SHAPES:
        seconds = measure(contenders(n_in, n_out, b, tokens, rank), options.rounds)
        results.append({"shape": [n_in, n_out, b, tokens, rank], "seconds": seconds})
        table.add_row(
            f"{n_in} x {n_out}",
            str(b),
            str(tokens),
            *(f"{1e3 * value:.1f} ms" for value in seconds.values()),
            f"{seconds['PEFT C3A'] / seconds['c3a']:.1f}",
            f"{seconds['c3a'] / seconds['LoRA']:.1f}",
        )
    Console(width=120).print(table)
    if options.json:
        facts = {"machine": machine, "torch": torch.__version__, "threads": options.threads}
        options.json.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
