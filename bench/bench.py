"""Times and weighs C3A against the PEFT library's C3A, a LoRA and the frozen layer.

Every contender is checked before it is timed. Rounds are interleaved, in an order drawn anew for
every round; medians are printed, with the ratios that count on a noisy machine. "f+b" is forward
and backward, with gradients for the input and the adapter, and for the base layer for its input.

    python bench/bench.py                        the five shapes, then everything else in the README
    python bench/bench.py --json out.json --plot bench/speed.png
    python bench/bench.py --device cuda          on a GPU: five shapes and two larger ones, with the
                                                 time that memory alone takes beside each
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import c3a
from c3a._library import cpu_level
from c3a.cuda import set_path
from c3a.memory import peak_allocated, saved_for_backward

# (in, out, block size, tokens, LoRA rank): the shapes at which peers were measured.
SHAPES = [
    (768, 768, 128, 2048, 8),
    (768, 768, 768, 2048, 8),
    (1024, 1024, 128, 2048, 8),
    (4096, 4096, 128, 512, 32),
    (4096, 4096, 256, 512, 16),
]
LARGE = SHAPES[-1]
# On a GPU: the same layers at 4096 tokens, and two larger ones.
CUDA_SHAPES = [(n_in, n_out, b, 4096, rank) for n_in, n_out, b, _, rank in SHAPES]
CUDA_SHAPES += [(4096, 11008, 256, 4096, 16), (8192, 8192, 256, 4096, 16)]
BLOCK_SIZES = [2**e for e in range(4, 13)]
TOKENS = [2**e for e in range(14)]

Contenders = dict[str, Callable[[], object]]


class _NoBase(nn.Module):
    """A base layer that computes nothing."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Case:
    """One shape's tensors, and a function for every contender."""

    def __init__(self, n_in, n_out, b, tokens, rank, dtype=torch.float32, device="cpu"):
        self.shape = (n_in, n_out, b, tokens, rank)

        def normal(*sizes):
            return torch.randn(*sizes, dtype=dtype, device=device)

        self.x = normal(tokens, n_in).requires_grad_()
        self.g = normal(tokens, n_out)
        self.w = normal(n_out // b, n_in // b, b).requires_grad_()
        self.down = normal(rank, n_in).requires_grad_()
        self.up = normal(n_out, rank).requires_grad_()
        self.base = nn.Linear(n_in, n_out, bias=False, dtype=dtype, device=device)
        self.base.requires_grad_(False)

    def validate(self) -> None:
        x, w = self.x.double(), self.w.double()
        y, matrix = c3a.block_circ_conv(self.x, self.w), c3a.circulant(w)
        dx, dw = torch.autograd.grad(y, (self.x, self.w), self.g)
        expected = x @ matrix.T
        gradients = torch.autograd.grad(expected, (x, w), self.g.double())
        limit = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[self.x.dtype]
        for got, exact in ((y, expected), (dx, gradients[0]), (dw, gradients[1])):
            error = ((got.double() - exact).norm() / exact.norm()).item()
            assert error < limit, f"relative error {error:.1e} at {self.shape}"

    def _lora(self) -> Tensor:
        return self.x @ self.down.T @ self.up.T

    @staticmethod
    def _without_graph(function: Callable[[], object]) -> Callable[[], object]:
        def run():
            with torch.no_grad():
                return function()

        return run

    def forward(self, *names: str) -> Contenders:
        every = {
            "C3A": lambda: c3a.block_circ_conv(self.x, self.w),
            "PEFT": lambda: BlockCircularConvolution.apply(self.x, self.w),
            "LoRA": self._lora,
            "base": lambda: self.base(self.x),
        }
        return {name: self._without_graph(every[name]) for name in names or every}

    def both(self, *names: str) -> Contenders:
        def with_gradients(function, inputs):
            return lambda: torch.autograd.grad(function(), inputs, self.g)

        every = {
            "C3A": (lambda: c3a.block_circ_conv(self.x, self.w), (self.x, self.w)),
            "PEFT": (lambda: BlockCircularConvolution.apply(self.x, self.w), (self.x, self.w)),
            "LoRA": (self._lora, (self.x, self.down, self.up)),
            "base": (lambda: self.base(self.x), (self.x,)),
        }
        return {name: with_gradients(*every[name]) for name in names or every}

    def one_token(self) -> Contenders:
        """Inference with a prepared kernel: the operator, and a layer whose base costs nothing."""
        n_in, n_out, b, _, _ = self.shape
        w_hat = c3a.prepare(self.w.detach())
        layer = c3a.C3ALinear(_NoBase(n_in, n_out), b).eval()
        with torch.no_grad():
            layer.c3a_kernel.copy_(self.w)
        return {
            **self.forward("LoRA"),
            "prepared": self._without_graph(lambda: c3a.block_circ_conv_prepared(self.x, w_hat, b)),
            "layer": self._without_graph(lambda: layer(self.x)),
        }

    def forward_bytes(self) -> int:
        """What the adapter's share of a forward must move: read x, read and write y."""
        n_in, n_out, _, tokens, _ = self.shape
        return tokens * (n_in + 2 * n_out) * self.x.element_size()

    def bytes_and_flops(self) -> tuple[float, float]:
        """What forward and backward must move and compute (DESIGN.md, "Cost")."""
        n_in, n_out, b, tokens, _ = self.shape
        sides = 3 * n_in + 2 * n_out
        transforms, products = 2.5 * sides * math.log2(b), 12 * n_in * n_out / b
        return tokens * sides * self.x.element_size(), tokens * (transforms + products)


def elapsed(function: Callable[[], object], device: str, repeat: int = 10) -> float:
    """Return the seconds of one call; on a GPU the mean of some, which hides their launches."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeat):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeat


def measure(contenders: Contenders, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Return the median seconds of each contender."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    calls = list(contenders.items())
    for _, function in calls:
        function()
    for _ in range(rounds):
        random.shuffle(calls)
        for name, function in calls:
            seconds[name].append(elapsed(function, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_short(contenders: Contenders, rounds: int, repeat: int = 200) -> dict[str, float]:
    """Likewise for calls of microseconds: ``repeat`` of each at a time."""

    def repeated(function):
        def run():
            for _ in range(repeat):
                function()

        return run

    runs = {name: repeated(function) for name, function in contenders.items()}
    return {name: value / repeat for name, value in measure(runs, rounds).items()}


def geometric_mean(values) -> float:
    return statistics.geometric_mean(list(values))


def bench_shapes(rounds: int) -> list[dict]:
    results = []
    for shape in track(SHAPES, "five shapes", transient=True):
        case = Case(*shape)
        case.validate()
        seconds = measure(case.both(), rounds)
        moved, flops = case.bytes_and_flops()
        results.append(
            {
                "shape": shape,
                "seconds": seconds,
                "GB/s": moved / seconds["C3A"] / 1e9,
                "GFLOP/s": flops / seconds["C3A"] / 1e9,
                "PEFT / C3A": seconds["PEFT"] / seconds["C3A"],
                "C3A / LoRA": seconds["C3A"] / seconds["LoRA"],
            }
        )
    return results


def shapes_table(results: list[dict]) -> Table:
    table = Table(title="forward + backward, float32, milliseconds")
    names = list(results[0]["seconds"])
    for column in ("in x out", "block", "T", *names, "GB/s", "GFLOP/s", "PEFT / C3A", "C3A / LoRA"):
        table.add_column(column, justify="right")
    for result in results:
        n_in, n_out, b, tokens, rank = result["shape"]
        times = [f"{1e3 * result['seconds'][name]:.1f}" for name in names]
        times[names.index("LoRA")] += f" (r={rank})"
        table.add_row(
            f"{n_in} x {n_out}",
            str(b),
            str(tokens),
            *times,
            f"{result['GB/s']:.0f}",
            f"{result['GFLOP/s']:.0f}",
            f"{result['PEFT / C3A']:.1f}",
            f"{result['C3A / LoRA']:.2f}",
        )
    means = [geometric_mean(r[key] for r in results) for key in ("PEFT / C3A", "C3A / LoRA")]
    empty = [""] * (len(names) + 4)
    table.add_row("geometric mean", *empty, f"{means[0]:.1f}", f"{means[1]:.2f}")
    return table


def bench_marks(rounds: int) -> list[tuple[str, float, str]]:
    """Return (what, value, unit or kind) of the single figures."""
    marks = []
    seconds = measure(Case(*LARGE).forward("C3A", "base", "LoRA"), rounds)
    name = "4096 x 4096, block 256"
    of_base = seconds["C3A"] / seconds["base"]
    marks.append((f"forward, {name}, T=512: C3A / base layer", of_base, "percent"))
    for shape in SHAPES[:2]:
        case = Case(*shape)
        threads = torch.get_num_threads()
        both = case.both("C3A")["C3A"]

        def on(count, both=both):
            def run():
                torch.set_num_threads(count)
                both()

            return run

        seconds = measure({"one": on(1), "two": on(2)}, 2 * rounds)
        torch.set_num_threads(threads)
        what = f"f+b, 768 x 768, block {shape[2]}, T=2048: one thread / two"
        marks.append((what, seconds["one"] / seconds["two"], "ratio"))
    for shape in SHAPES:
        wide, narrow = Case(*shape), Case(*shape, dtype=torch.bfloat16)
        narrow.validate()
        seconds = measure(
            {"float32": wide.both("C3A")["C3A"], "bfloat16": narrow.both("C3A")["C3A"]}, 2 * rounds
        )
        what = f"f+b, {shape[0]} x {shape[1]}, block {shape[2]}: bfloat16 / float32"
        marks.append((what, seconds["bfloat16"] / seconds["float32"], "ratio"))
    one = Case(*LARGE[:3], 1, LARGE[4])
    seconds = measure_short(one.one_token(), rounds)
    for what in ("prepared", "layer"):
        label = f"forward, {name}, one token, {what}"
        marks.append((f"{label}: C3A", 1e6 * seconds[what], "us"))
        marks.append((f"{label}: C3A / LoRA r=16", seconds[what] / seconds["LoRA"], "ratio"))
    return marks


def bench_levels(rounds: int) -> list[tuple[str, float, str]]:
    """Compare instruction-set levels, a process each, in turns."""
    best = cpu_level()
    levels = ["x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2"]
    if best not in levels[:-1]:
        return []
    if best == levels[0]:  # float32 is the next one's
        best = levels[1]
    below = levels[levels.index(best) + 1]
    times: dict[str, list[list[float]]] = {best: [], below: []}
    for _ in track(range(3), "instruction sets", transient=True):
        for level, runs in times.items():
            command = [sys.executable, __file__, "--only-c3a", "--rounds", str(rounds)]
            environment = {**os.environ, "C3A_CPU_LEVEL": level}
            run = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            runs.append(json.loads(run.stdout))
    marks = []
    for i, shape in enumerate(SHAPES):
        ratio = min(run[i] for run in times[below]) / min(run[i] for run in times[best])
        what = f"f+b, {shape[0]} x {shape[1]}, block {shape[2]}: {below} / {best}"
        marks.append((what, ratio, "ratio"))
    return marks


def bench_memory() -> list[tuple[str, float, str]]:
    marks = []
    for dtype in (torch.float32, torch.bfloat16):
        base = nn.Linear(768, 768, dtype=dtype).requires_grad_(False)
        x = torch.randn(2048, 768, dtype=dtype, requires_grad=True)
        for name, layer in (("the base layer", base), ("C3ALinear", c3a.C3ALinear(base, 128))):
            with saved_for_backward(layer) as saved:
                layer(x)
            extra = saved.total - x.numel() * x.element_size() * (name != "the base layer")
            what = f"saved for the backward by {name}, 768 x 768, T=2048, {str(dtype)[6:]}"
            marks.append((what + (", beside its input" if "C3A" in name else ""), extra, "bytes"))
    # rdFFT's case: one training step of one adapted layer, without the frozen weight.
    base = nn.Linear(4096, 4096).requires_grad_(False)
    lora = nn.Sequential(nn.Linear(4096, 64, bias=False), nn.Linear(64, 4096, bias=False))
    kernel = nn.Parameter(torch.zeros(8, 8, 512))
    layer = c3a.C3ALinear(base, 512)
    contenders = {
        "C3A": (layer, [layer.c3a_kernel]),
        "PEFT's C3A": (
            lambda x: base(x) + BlockCircularConvolution.apply(x, kernel) / 4096,
            [kernel],
        ),
        "LoRA r=64": (lambda x: base(x) + lora(x), list(lora.parameters())),
    }
    for name, (forward, parameters) in contenders.items():
        optimizer = torch.optim.SGD(parameters, lr=0.1)

        def step(forward=forward, optimizer=optimizer):
            x = torch.randn(256, 4096).requires_grad_()
            forward(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        what = f"peak of a training step, 4096 x 4096, block 512, batch 256: {name}"
        marks.append((what, peak_allocated(step) / 1e6, "MB"))
    return marks


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
                        "seconds": measure(contenders, rounds, "cuda"),
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


def marks_table(marks: list[tuple[str, float, str]]) -> Table:
    table = Table(title="single figures")
    table.add_column("what")
    table.add_column("value", justify="right")
    digits = {
        "percent": "{:.1%}",
        "ratio": "{:.2f}",
        "us": "{:.1f} us",
        "bytes": "{:.0f} bytes",
        "MB": "{:.1f} MB",
    }
    for what, value, unit in marks:
        table.add_row(what, digits[unit].format(value))
    return table


def bench_sweeps(rounds: int) -> dict[str, list[dict]]:
    """Measure f+b over block sizes, and over numbers of tokens."""

    def point(n, b, tokens, rank):
        # as many parameters as the adapter has, which is what one would compare it with
        case = Case(n, n, b, tokens, rank)
        both = case.both("C3A", "PEFT", "LoRA")
        few = tokens * n < 2**18
        seconds = measure_short(both, rounds, 10) if few else measure(both, rounds)
        return {"in": n, "block size": b, "tokens": tokens, "rank": rank, "seconds": seconds}

    def equal_rank(n, b):
        return max(1, n // (2 * b))

    blocks = [point(4096, b, 512, equal_rank(4096, b)) for b in track(BLOCK_SIZES, "block sizes")]
    tokens = [point(1024, 128, t, 8) for t in track(TOKENS, "tokens")]
    return {"block sizes": blocks, "tokens": tokens}


def plot(sweeps: dict[str, list[dict]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    labels = [
        ("block sizes", "block size", "4096 x 4096, T = 512, LoRA of as many parameters (r >= 1)"),
        ("tokens", "tokens", "1024 x 1024, block size 128, LoRA r=8"),
    ]
    for ax, (sweep, column, subtitle) in zip(axes, labels, strict=True):
        points = sweeps[sweep]
        at = [p[column] for p in points]
        for peer, color in (("PEFT", "tab:red"), ("LoRA", "tab:blue")):
            ratios = [p["seconds"]["C3A"] / p["seconds"][peer] for p in points]
            ax.plot(at, ratios, "o-", color=color, label=f"time / {peer}'s")
        ax.axhline(1, color="gray", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel=column)
        ax.set_title(subtitle, fontsize=10)
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("C3A's time, relative")
    axes[0].legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main_cuda(options: argparse.Namespace) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, help="on a GPU: tokens of every shape, for a try")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="sweep block sizes and tokens, and draw that")
    parser.add_argument("--shapes-only", action="store_true", help="the five shapes alone")
    parser.add_argument("--only-c3a", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(options.threads)
    if options.only_c3a:
        cases = [Case(*shape) for shape in SHAPES]
        times = [measure(case.both("C3A"), options.rounds)["C3A"] for case in cases]
        print(json.dumps(times))
        return
    if options.device == "cuda":
        return main_cuda(options)
    machine = f"{platform.machine()}, {cpu_level()}, {options.threads} thread(s)"
    title = f"{machine}, torch {torch.__version__}, medians of {options.rounds}"
    console = Console(width=130)
    console.print(title)
    figures = {
        "machine": machine,
        "torch": torch.__version__,
        "shapes": bench_shapes(options.rounds),
    }
    console.print(shapes_table(figures["shapes"]))
    if not options.shapes_only:
        marks = bench_marks(options.rounds) + bench_levels(options.rounds) + bench_memory()
        console.print(marks_table(marks))
        figures["marks"] = marks
    if options.plot:
        figures["sweeps"] = bench_sweeps(options.rounds)
        plot(figures["sweeps"], f"{machine}, torch {torch.__version__}", options.plot)
        console.print(f"drawn: {options.plot}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
