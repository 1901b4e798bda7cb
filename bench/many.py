"""64 adapters in one batch, a row each: against one adapter, and against a loop over adapters.

The loop calls the prepared sum in place on views of rows that are already in order, so a loop that
has to find and copy its rows takes longer. And gradients of each sample (vmap) against the batch's.
"""

import torch
from rich.progress import track
from torch.func import grad, vmap

import c3a
from report import Figure, Grid, Mark, Result
from timing import Contenders, Run

OPS = torch.ops.c3a
ADAPTERS = 64
SHAPES = [(768, 128), (4096, 256)]  # features, block size
TOKENS = [1, 16, 64]  # of a row
MOST = 1.5  # times one adapter


class Case:
    def __init__(self, features: int, b: int, tokens: int, adapters: int = ADAPTERS):
        blocks = features // b
        self.b, self.adapters = b, adapters
        self.w = torch.randn(adapters, blocks, blocks, b)
        self.x = torch.randn(adapters, tokens, features)
        self.base = torch.zeros_like(self.x)
        self.w_hat = c3a.prepare(self.w)
        self.index = torch.arange(adapters)

    def validate(self) -> None:
        y = c3a.block_circ_conv_many_prepared(self.x, self.w_hat, self.index, self.b)
        for row, x, w in zip(y, self.x, self.w, strict=True):
            assert torch.equal(row, c3a.block_circ_conv(x, w))

    def _loop(self) -> None:
        for k in range(self.adapters):
            OPS.block_circ_conv_prepared_add_(self.base[k], self.x[k], self.w_hat[k], self.b)

    def _loop_as_they_are(self) -> None:
        for k in range(self.adapters):
            OPS.block_circ_conv_add_(self.base[k], self.x[k], self.w[k])

    def serving(self) -> Contenders:
        one = self.w_hat[0].contiguous()
        prepared_add_ = OPS.block_circ_conv_many_prepared_add_
        return {
            "many": lambda: prepared_add_(self.base, self.x, self.w_hat, self.index, self.b),
            "one": lambda: OPS.block_circ_conv_prepared_add_(self.base, self.x, one, self.b),
            "loop": self._loop,
            "as they are": lambda: OPS.block_circ_conv_many_add_(
                self.base, self.x, self.w, self.index
            ),
            "loop as they are": self._loop_as_they_are,
        }

    def gradients(self) -> Contenders:
        w, g = self.w[0].clone().requires_grad_(), torch.randn_like(self.x)

        def loss(w, x, g):
            return (c3a.block_circ_conv(x, w) * g).sum()

        of_samples = vmap(grad(loss), (None, 0, 0))
        return {
            "samples": lambda: of_samples(w.detach(), self.x, g),
            "batch": lambda: torch.autograd.grad(loss(w, self.x, g), w),
        }


def bench_many(run: Run) -> Result:
    shapes = [(96, 24)] if run.quick else SHAPES
    adapters = 4 if run.quick else ADAPTERS
    cases = [(features, b, t) for features, b in shapes for t in TOKENS]
    rows, marks, figures, raw = [], [], [], []
    for features, b, tokens in track(cases, "many adapters", transient=True):
        case = Case(features, b, tokens, adapters)
        case.validate()
        with torch.inference_mode():
            times = run.measure(case.serving())
        pairs = [("many", "one"), ("loop", "many"), ("loop as they are", "as they are")]
        ratios = [times.ratio(*pair) for pair in pairs]
        name = f"{features} x {features}, block {b}, {adapters} rows of T={tokens}"
        rows.append([name, f"{times['many'] * 1e3:.2f} ms", *map(str, ratios)])
        raw.append({"shape": (features, b, tokens), "seconds": times.medians()})
        if tokens > 1:
            marks.append(Mark(f"{name}: many adapters / one", ratios[0].value, MOST))
        elif features == shapes[0][0]:
            marks.append(Mark(f"{name}: loop / many", ratios[1].value, 5, at_least=True))
        of_gradients = run.measure(case.gradients())
        what = f"{name}: kernel gradients of each sample / the batch's"
        ratio = of_gradients.ratio("samples", "batch").value
        raw.append({"gradients": (features, b, tokens), "seconds": of_gradients.medians()})
        if tokens > 1:
            marks.append(Mark(what, ratio, MOST))
        else:
            figures.append(Figure(what, ratio, "ratio"))
    columns = ["in x out, block, rows", "many", "many / one", "loop / many", "the same, unprepared"]
    grid = Grid("many adapters in one batch, prepared, float32, one thread", columns, rows)
    return Result([grid], marks=marks, figures=figures, raw=raw)
