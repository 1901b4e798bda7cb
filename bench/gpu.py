"""The operator on a GPU: by each of its paths, beside the time that memory alone takes."""

import argparse
import json
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from c3a.cuda import set_path
from operators import SHAPES, Case
from timing import measure

# The CPU's layers at 4096 tokens, and two larger ones.
CUDA_SHAPES = [(n_in, n_out, b, 4096, rank) for n_in, n_out, b, _, rank in SHAPES]
CUDA_SHAPES += [(4096, 11008, 256, 4096, 16), (8192, 8192, 256, 4096, 16)]


def by_path(path: str, function: Callable[[], object]) -> Callable[[], object]:
    def run():
        set_path(path)
        function()
        set_path("auto")

    return run


def copy_bandwidth(rounds: int) -> float:
    """Return bytes per second, read and written, of a large copy on the GPU."""
    a = torch.empty(2**28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    seconds = measure({"copy": lambda: b.copy_(a)}, rounds, "cuda")["copy"]
    return 2 * a.numel() * a.element_size() / seconds


def bench_cuda(rounds: int, tokens: int | None, bandwidth: float) -> list[dict]:
    """Forward, and forward and backward, of every shape in float32 and bfloat16."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in track(CUDA_SHAPES, str(dtype)[6:], transient=True):
            n_in, n_out, b, usual, rank = shape
            case = Case(n_in, n_out, b, tokens or usual, rank, dtype, "cuda")
            case.validate()
            # PEFT's transforms have no bfloat16.
            peers = ("PEFT", "LoRA", "base") if dtype == torch.float32 else ("LoRA", "base")
            both_bytes, _ = case.bytes_and_flops()
            for what, moved, kind in (
                ("forward", case.forward_bytes(), case.forward),
                ("f+b", both_bytes, case.both),
            ):
                ours = kind("C3A")["C3A"]
                contenders = {
                    "C3A": ours,
                    "by fused": by_path("fused", ours),
                    "by cuFFT": by_path("cufft", ours),
                    **kind(*peers),
                }
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                ours()
                torch.cuda.synchronize()
                results.append(
                    {
                        "what": what,
                        "dtype": str(dtype)[6:],
                        "shape": case.shape,
                        "seconds": measure(contenders, rounds, "cuda").medians(),
                        "floor": moved / bandwidth,
                        "peak bytes": torch.cuda.max_memory_allocated() - before,
                    }
                )
    return results


def cuda_table(results: list[dict]) -> Table:
    table = Table(title="microseconds; floor: what must be moved, at a copy's bandwidth")
    contenders = ("C3A", "by fused", "by cuFFT", "PEFT", "LoRA", "base")
    for column in ("", "dtype", "in x out", "block", "T", *contenders, "floor"):
        table.add_column(column, justify="right")
    for column in ("C3A / floor", "C3A / LoRA", "peak MB"):
        table.add_column(column, justify="right")
    for result in results:
        n_in, n_out, b, tokens, rank = result["shape"]
        seconds = result["seconds"]
        times = [f"{1e6 * seconds[name]:.0f}" if name in seconds else "-" for name in contenders]
        times[contenders.index("LoRA")] += f" (r={rank})"
        table.add_row(
            result["what"],
            result["dtype"],
            f"{n_in} x {n_out}",
            str(b),
            str(tokens),
            *times,
            f"{1e6 * result['floor']:.0f}",
            f"{seconds['C3A'] / result['floor']:.1f}",
            f"{seconds['C3A'] / seconds['LoRA']:.2f}",
            f"{result['peak bytes'] / 1e6:.0f}",
        )
    return table


def main(options: argparse.Namespace) -> None:
    device = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth(options.rounds)
    machine = f"{device.name}, a copy moves {bandwidth / 1e9:.0f} GB/s"
    console = Console(width=160)
    console.print(f"{machine}, torch {torch.__version__}, medians of {options.rounds}")
    results = bench_cuda(options.rounds, options.tokens, bandwidth)
    console.print(cuda_table(results))
    if options.json:
        figures = {"machine": machine, "torch": torch.__version__, "results": results}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
