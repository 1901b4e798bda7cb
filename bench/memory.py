"""Bytes: what layers save for the backward, and the peaks of layers and of training steps."""

import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from torch import nn

import c3a
import layers
import models
from c3a.memory import peak_allocated, saved_for_backward
from report import Figure, Grid, Mark, Result
from timing import Run


def bench_memory(run: Run) -> Result:
    result = Result(grids=[_of_layers(run.quick)], figures=_saved())
    rdfft, mark = _rdfft_step()
    result.figures += rdfft
    result.marks.append(mark)
    sizes = models.QUICK if run.quick else models.SIZES
    for name, model in models.adapted_models(sizes).items():
        step = models.step_of(model, sizes)
        step()  # the optimizer's state
        what = f"peak of the encoder's step: {name}"
        result.figures.append(Figure(what, peak_allocated(step) / 1e6, "MB"))
    return result


def _of_layers(quick: bool) -> Grid:
    rows = []
    for shape in [layers.QUICK] if quick else [layers.SHAPES[0], layers.SHAPES[-1]]:
        for mode in layers.MODES:
            case = layers.Case(*shape, mode)
            peaks = {}
            for name, call in case.both("base", "C3A", "LoRA", "PEFT").items():
                call()
                peaks[name] = peak_allocated(call)
            ratios = [peaks[name] / peaks["base"] for name in peaks if name != "base"]
            rows.append([layers.shape_name(shape), mode, *(f"{ratio:.2f}" for ratio in ratios)])
    columns = ["features, block, T, rank", "dtype", "C3A", "LoRA", "PEFT's C3A"]
    return Grid("peak of a layer's f+b, of the frozen layer's", columns, rows)


def _saved() -> list[Figure]:
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        base = nn.Linear(768, 768, dtype=dtype).requires_grad_(False)
        x = torch.randn(2048, 768, dtype=dtype, requires_grad=True)
        for name, layer in (("the base layer", base), ("C3ALinear", c3a.C3ALinear(base, 128))):
            with saved_for_backward(layer) as saved:
                layer(x)
            extra = saved.total - x.numel() * x.element_size() * (name != "the base layer")
            what = f"saved for the backward by {name}, 768 x 768, T=2048, {str(dtype)[6:]}"
            what += ", beside its input" if "C3A" in name else ""
            figures.append(Figure(what, extra, "bytes"))
    return figures


def _rdfft_step() -> tuple[list[Figure], Mark]:
    """rdFFT's case: one training step of one adapted layer, without the frozen weight."""
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
    case = "4096 x 4096, block 512, batch 256"
    figures = []
    for name, (forward, parameters) in contenders.items():
        optimizer = torch.optim.SGD(parameters, lr=0.1)

        def peak(keep: bool, forward=forward, optimizer=optimizer) -> float:
            def step():
                x = torch.randn(256, 4096).requires_grad_()
                y = forward(x)
                total = y.sum()
                if not keep:
                    del y
                total.backward()
                optimizer.step()
                optimizer.zero_grad()

            step()
            return peak_allocated(step) / 1e6

        figures.append(Figure(f"peak of a training step, {case}: {name}", peak(False), "MB"))
        kept = f"peak of a training step that keeps its output, {case}: {name}"
        figures.append(Figure(kept, peak(True), "MB"))
        if name == "C3A":
            mark = Mark(kept, figures[-1].value, 17.0, unit=" MB")
    return figures, mark
