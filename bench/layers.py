"""A whole adapted layer: C3ALinear against the PEFT library's LoRA and C3A layers.

Each is over the same frozen ``nn.Linear``. "f+b" is forward and backward, with gradients for the
input and the adapter; "over base" takes off the frozen layer's own f+b of the same round. LoRA's
factors have the base's dtype, which is LoRA's fastest; in bfloat16 "LoRA, float32" has what
``peft.get_peft_model`` makes by default.
"""

import warnings
from collections.abc import Callable
from itertools import product

import peft
import torch
from rich.progress import track
from torch import Tensor, nn

import c3a
from report import Grid, Mark, Result
from timing import Contenders, Ratio, Run, Times, geometric_mean, threads

# (features, block size, tokens, LoRA rank)
SHAPES = [
    (768, 128, 2048, 8),
    (768, 768, 2048, 8),
    (1024, 128, 2048, 8),
    (4096, 128, 512, 32),
    (4096, 256, 512, 16),
]
SMALL = [(384, 48, tokens, 8) for tokens in (1, 16, 128, 800)]
SWEPT = [(768, 128, tokens, 8) for tokens in (1, 16, 128, 512, 2048, 8192)]
QUICK = (48, 12, 16, 4)
MODES = ("float32", "bfloat16", "autocast")
# of the geometric mean, and of each shape: C3A's time over base relative to LoRA's
LIMITS = {"float32": (0.4, 0.7), "bfloat16": (0.9, 1.2)}


class Case:
    """One shape's layers over one frozen layer. ``mode``: dtype of base and input, or autocast."""

    def __init__(self, features: int, block: int, tokens: int, rank: int, mode: str = "float32"):
        self.shape, self.mode = (features, block, tokens, rank), mode
        self.dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        base = nn.Linear(features, features, dtype=self.dtype).requires_grad_(False)

        def of_peft(config: peft.PeftConfig) -> nn.Module:
            # The layer that PEFT makes of a base, in the base's dtype.
            return peft.inject_adapter_in_model(config, nn.Sequential(base))[0]

        lora = peft.LoraConfig(r=rank, target_modules=["0"])
        self.layers = {
            "base": base,
            "C3A": c3a.C3ALinear(base, block),
            "LoRA": of_peft(lora),
            "PEFT": of_peft(peft.C3AConfig(block_size=block, target_modules=["0"])),
        }
        if mode == "bfloat16":
            self.layers["LoRA, float32"] = of_peft(lora)
            for name, part in self.layers["LoRA, float32"].named_parameters():
                if "lora_" in name:
                    part.data = part.data.float()
        for layer in self.layers.values():
            for parameter in self._trained(layer):
                # About as much as the base gives.
                factor = features if parameter.ndim == 3 else 4
                nn.init.normal_(parameter, std=factor / features**0.5)
        self.x = torch.randn(tokens, features, dtype=self.dtype, requires_grad=True)
        self.calls = dict(self.layers)

    @staticmethod
    def _trained(layer: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def compile(self, backend: str) -> None:
        torch.compiler.reset()
        self.calls = {
            name: torch.compile(layer, backend=backend) for name, layer in self.layers.items()
        }

    def _forward(self, call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mode == "autocast"):
            return call(self.x)

    def validate(self) -> None:
        """Compare some tokens' results and input gradients with those of the dense weights."""
        some = slice(None, None, max(1, len(self.x) // 32))
        x = self.x.detach()[some].float()
        limit = 2e-5 if self.mode == "float32" else 2e-2
        base = self.layers["base"]
        for name, layer in self.layers.items():
            weight, bias = base.weight.float(), base.bias.float()
            if name == "C3A":
                weight = weight + layer.delta_weight()
            elif name == "PEFT":
                kernel = layer.c3a_kernel["default"].float()
                weight = weight + c3a.circulant(kernel) / base.in_features
            elif name != "base":
                weight = weight + layer.get_delta_weight("default").float()
            y = self._forward(layer)
            g = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, self.x, g)
            pairs = [(y[some], x @ weight.T + bias), (dx[some], g[some].float() @ weight)]
            # PEFT's input gradient is another one (README.md).
            for got, expected in pairs[:1] if name == "PEFT" else pairs:
                error = ((got.float() - expected).norm() / expected.norm()).item()
                assert error < limit, f"{name}: relative error {error:.1e} at {self.shape}"

    def both(self, *names: str) -> Contenders:
        """Forward and backward of each layer, with gradients for input and adapter."""

        def run_of(name: str) -> Callable[[], object]:
            call, inputs = self.calls[name], [self.x, *self._trained(self.layers[name])]
            g = torch.randn_like(self._forward(call))
            return lambda: torch.autograd.grad(self._forward(call), inputs, g)

        return {name: run_of(name) for name in names or self.calls}


def shape_name(shape: tuple[int, ...]) -> str:
    features, block, tokens, rank = shape
    return f"{features}, {block}, {tokens}, {rank}"


def _raw(part: str, case: Case, count: int, mode: str, times: Times) -> dict:
    return {
        "part": part,
        "shape": case.shape,
        "mode": mode,
        "threads": count,
        "seconds": times.medians(),
        "C3A / LoRA over base": times.ratio_over("base", "C3A", "LoRA"),
        "C3A / LoRA": times.ratio("C3A", "LoRA"),
    }


def bench_layers(run: Run) -> Result:
    """Time over base at the peers' shapes, float32 and bfloat16, one thread and two."""
    shapes = [QUICK] if run.quick else SHAPES
    result = Result()
    over_base: dict[tuple[str, int], list[Ratio]] = {}
    over_peft: dict[str, list[Ratio]] = {}
    other_lora: list[Ratio] = []
    for mode, shape in track(list(product(LIMITS, shapes)), "layers", transient=True):
        case = Case(*shape, mode)
        case.validate()
        for count in run.threads:
            with threads(count):
                # What is over a base of long calls is less than what those vary by.
                times = run.measure(case.both(), 2 if shape[0] >= 4096 else 1)
            over_base.setdefault((mode, count), []).append(times.ratio_over("base", "C3A", "LoRA"))
            if count == 1:
                over_peft.setdefault(mode, []).append(times.ratio_over("base", "PEFT", "C3A"))
                if "LoRA, float32" in case.layers:
                    other = times.ratio_over("base", "C3A", "LoRA, float32")
                    other_lora.append(other)
            result.raw.append(_raw("layers", case, count, mode, times))
    columns = {
        f"{mode}, {'one thread' if count == 1 else 'two threads'}": ratios
        for (mode, count), ratios in over_base.items()
    }
    columns["bfloat16, one thread, LoRA's factors in float32"] = other_lora
    title = "time over base of f+b, C3A / LoRA"
    result.grids.append(_of_shapes(title, shapes, columns))
    columns = {f"{mode}, one thread": ratios for mode, ratios in over_peft.items()}
    result.grids.append(_of_shapes("time over base of f+b, PEFT's C3A / C3A", shapes, columns))
    for (mode, count), ratios in over_base.items():
        mean, each = LIMITS[mode]
        values = [ratio.value for ratio in ratios]
        what = f"over base, {mode}, {count} thread{'s' * (count > 1)}, C3A / LoRA"
        result.marks.append(Mark(f"{what}: geometric mean", geometric_mean(values), mean))
        result.marks += [
            Mark(f"{what}: {shape_name(shape)}", value, each)
            for shape, value in zip(shapes, values, strict=True)
        ]
    return result


def _of_shapes(title: str, shapes: list[tuple], columns: dict[str, list[Ratio]]) -> Grid:
    rows = [
        [shape_name(shape), *map(str, ratios)]
        for shape, *ratios in zip(shapes, *columns.values(), strict=True)
    ]
    means = [geometric_mean(ratio.value for ratio in ratios) for ratios in columns.values()]
    rows.append(["geometric mean", *(f"{mean:.2f}" for mean in means)])
    return Grid(title, ["features, block, T, rank", *columns], rows)


def bench_small(run: Run) -> Result:
    """The whole time of a small layer, base and all."""
    result = Result()
    for shape in track([QUICK] if run.quick else SMALL, "small layers", transient=True):
        case = Case(*shape)
        case.validate()
        with threads(1):
            times = run.measure(case.both("C3A", "LoRA", "base"), 2)
        what = f"f+b, float32, one thread, {shape_name(shape)}: C3A / LoRA"
        result.marks.append(Mark(what, times.ratio("C3A", "LoRA").value, 1.0))
        result.raw.append(_raw("small", case, 1, "float32", times))
    return result


def bench_sweep(run: Run) -> Result:
    """One layer over tokens, in every dtype, eager and compiled, one thread and two."""
    shapes = [QUICK] if run.quick else SWEPT
    result = Result()
    rows = []
    modes, counts = (MODES[:1], run.threads[:1]) if run.quick else (MODES, run.threads)
    cases = list(product(("eager", "compiled"), modes, counts, shapes))
    for how, mode, count, shape in track(cases, "a layer over tokens", transient=True):
        case = Case(*shape, mode)
        case.validate()
        # Compiled code is for one number of threads.
        with threads(count), warnings.catch_warnings():
            if how == "compiled":
                warnings.simplefilter("ignore")
                case.compile(run.backend)
            # The compiler has no code for PEFT's complex numbers.
            names = ("base", "C3A", "LoRA") + (("PEFT",) if how == "eager" else ())
            times = run.measure(case.both(*names))
        result.raw.append({**_raw("sweep", case, count, mode, times), "how": how})
        peft_ratio = times.ratio_over("base", "PEFT", "C3A") if "PEFT" in names else "-"
        rows.append(
            [
                f"{mode}, {how}",
                str(count),
                str(shape[2]),
                str(times.ratio_over("base", "C3A", "LoRA")),
                str(times.ratio("C3A", "LoRA")),
                str(times.ratio("C3A", "base")),
                str(peft_ratio),
            ]
        )
    features, block, _, rank = shapes[0]
    columns = ["dtype", "threads", "T", "C3A / LoRA over base", "C3A / LoRA", "C3A / base"]
    columns.append("PEFT's C3A / C3A over base")
    title = f"f+b, {features} features, block {block}, LoRA r={rank}"
    result.grids.append(Grid(title, columns, rows))
    return result
