"""The operator alone against the PEFT library's C3A, a bare LoRA product and the frozen layer.

"f+b" is forward and backward, with gradients for the input and the adapter; the frozen layer has
one for its input alone.
"""

import math
from collections.abc import Callable

import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from rich.progress import track
from torch import Tensor, nn

import c3a
from report import Figure, Grid, Mark, Result
from timing import Contenders, Run, geometric_mean, threads

# (in, out, block size, tokens, LoRA rank): the shapes at which peers were measured.
SHAPES = [
    (768, 768, 128, 2048, 8),
    (768, 768, 768, 2048, 8),
    (1024, 1024, 128, 2048, 8),
    (4096, 4096, 128, 512, 32),
    (4096, 4096, 256, 512, 16),
]
LARGE = SHAPES[-1]
QUICK = (96, 96, 24, 32, 4)
BLOCK_SIZES = [2**e for e in range(4, 13)]
TOKENS = [2**e for e in range(14)]


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


def shape_name(shape: tuple[int, ...]) -> str:
    n_in, n_out, b = shape[:3]
    return f"{n_in} x {n_out}, block {b}"


def bench_shapes(run: Run) -> Result:
    """Forward and backward at the peers' shapes, then forward, bfloat16 and one token."""
    shapes = [QUICK] if run.quick else SHAPES
    columns = ["in x out, block, T, rank", "PEFT / C3A", "C3A / LoRA", "C3A / frozen layer"]
    ratios: list[list[float]] = []
    rows, raw = [], []
    for shape in track(shapes, "operator", transient=True):
        case = Case(*shape)
        case.validate()
        times = run.measure(case.both())
        moved, flops = case.bytes_and_flops()
        pairs = [("PEFT", "C3A"), ("C3A", "LoRA"), ("C3A", "base")]
        of_shape = [times.ratio(*pair) for pair in pairs]
        ratios.append([ratio.value for ratio in of_shape])
        rate = [moved / times["C3A"] / 1e9, flops / times["C3A"] / 1e9]
        n_in, n_out, b, tokens, rank = shape
        name = f"{n_in} x {n_out}, {b}, {tokens}, {rank}"
        rows.append([name, *map(str, of_shape), *(f"{value:.0f}" for value in rate)])
        raw.append({"shape": shape, "seconds": times.medians(), "GB/s and GFLOP/s": rate})
    means = [f"{geometric_mean(values):.2f}" for values in zip(*ratios, strict=True)]
    rows.append(["geometric mean", *means, "", ""])
    title = "forward + backward, float32, one thread"
    grid = Grid(title, [*columns, "GB/s", "GFLOP/s"], rows)
    return Result([grid], figures=_figures(run, shapes), raw=raw)


def _figures(run: Run, shapes: list[tuple[int, ...]]) -> list[Figure]:
    large = shapes[-1]
    name = shape_name(large)
    times = run.measure(Case(*large).forward("C3A", "base", "LoRA"))
    what = f"forward, {name}, T={large[3]}: C3A / frozen layer"
    figures = [Figure(what, times.ratio("C3A", "base").value, "percent")]
    for shape in shapes:
        wide, narrow = Case(*shape), Case(*shape, dtype=torch.bfloat16)
        narrow.validate()
        times = run.measure(
            {"float32": wide.both("C3A")["C3A"], "bfloat16": narrow.both("C3A")["C3A"]}
        )
        what = f"f+b, {shape_name(shape)}: bfloat16 / float32"
        figures.append(Figure(what, times.ratio("bfloat16", "float32").value, "ratio"))
    one = Case(*large[:3], 1, large[4])
    times = run.measure(one.one_token())
    for what in ("prepared", "layer"):
        label = f"forward, {name}, one token, {what}: C3A / LoRA r={large[4]}"
        figures.append(Figure(label, times.ratio(what, "LoRA").value, "ratio"))
    return figures


def bench_threads(run: Run) -> Result:
    """One thread's f+b against two threads', in the same rounds; nothing without two."""
    if 2 not in run.threads:
        return Result()
    large = [(*LARGE[:3], tokens, LARGE[4]) for tokens in (128, 256, 512)]
    result = Result()
    for shape in track([QUICK] if run.quick else [*SHAPES[:2], *large], "threads", transient=True):
        both = Case(*shape).both("C3A")["C3A"]

        def on(count: int, both: Callable[[], object] = both) -> Callable[[], None]:
            def call() -> None:
                torch.set_num_threads(count)
                both()

            return call

        with threads(1):
            times = run.measure({"one": on(1), "two": on(2)}, 2)
        ratio = times.ratio("one", "two").value
        what = f"f+b, {shape_name(shape)}, T={shape[3]}: one thread / two"
        if shape in large or run.quick:
            result.marks.append(Mark(what, ratio, 1.6, at_least=True))
        else:
            result.figures.append(Figure(what, ratio, "ratio"))
        result.raw.append({"shape": shape, "seconds": times.medians()})
    return result


def bench_sweeps(run: Run) -> Result:
    """f+b over block sizes, and over numbers of tokens."""

    def point(sweep: str, at: int, n: int, b: int, tokens: int, rank: int) -> dict:
        times = run.measure(Case(n, n, b, tokens, rank).both("C3A", "PEFT", "LoRA"))
        return {"sweep": sweep, "at": at, "rank": rank, "seconds": times.medians()}

    # as many parameters as the adapter has, which is what one would compare it with
    blocks = [(b, 4096, b, 512, max(1, 4096 // (2 * b))) for b in BLOCK_SIZES]
    tokens = [(t, 1024, 128, t, 8) for t in TOKENS]
    if run.quick:
        blocks, tokens = [(24, 96, 24, 8, 2)], [(8, 96, 24, 8, 2)]
    result = Result()
    points = [("block size", *p) for p in blocks] + [("tokens", *p) for p in tokens]
    for arguments in track(points, "sweeps", transient=True):
        result.raw.append(point(*arguments))
    return result
