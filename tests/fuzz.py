"""Random operands for every operator, compared with the dense definition in float64.

    python tests/fuzz.py [--seconds 60] [--seed 0] [--device cpu] [--case N]

A case is drawn from the seed and its own number alone. A failure prints the command that repeats
just that case; the exit status is 1 if there was one.

Every operand has a unit, a power of two, and results are compared relative to theirs: large and
subnormal numbers need no tolerances of their own. A result is judged block by block: its own norm
bounds its rounding, the norm of the terms that were summed the errors of sums and transforms.
"""

import math
import os
import random
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import c3a
import fuzzing
from cases import DTYPES, TOLERANCE, rounds_spectra, tolerance

OPS = torch.ops.c3a
MODES = {  # in which operands are made, and operators called
    "grad mode": (nullcontext, torch.enable_grad),
    "no_grad": (nullcontext, torch.no_grad),
    "inference mode": (nullcontext, torch.inference_mode),
    "tensors of inference mode": (torch.inference_mode, torch.inference_mode),
}
# Exponents of units, such that sums do not overflow.
UNITS = {
    torch.float64: {"large": (50, 150), "small": (-150, -50), "subnormal": (-1050, -1022)},
    torch.float32: {"large": (10, 30), "small": (-40, -10), "subnormal": (-144, -126)},
    torch.bfloat16: {"large": (10, 30), "small": (-40, -10), "subnormal": (-131, -126)},
    torch.float16: {"large": (8, 12), "small": (-13, -5), "subnormal": (-21, -14)},
}
DENSE_NUMBERS = 2_500_000  # of a dense matrix, and
DENSE_PRODUCTS = 100_000_000  # of its product with all tokens


class Wrong(Exception):
    """What a case found."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


# The operators and their definition, on dicts of float64 tensors


def of_rows(dense: Callable) -> Callable:
    """With an index, let a kernel's rows be its tokens; rows that choose none are zeros."""

    def definition(t: dict) -> Tensor:
        if t["index"] is None:
            return dense(t)
        rows = [torch.nonzero(t["index"] == k).flatten() for k in range(len(t["w"]))]
        tokens = {name: t[name] for name in ("x", "grad_output") if name in t}
        parts = [
            dense({**t, "w": w, **{name: a[chosen] for name, a in tokens.items()}})
            for w, chosen in zip(t["w"], rows, strict=True)
        ]
        found = parts[0].new_zeros(len(t["index"]), *parts[0].shape[1:])
        for chosen, part in zip(rows, parts, strict=True):
            found = found.index_copy(0, chosen, part)
        return found

    return definition


@of_rows
def product(t: dict) -> Tensor:
    matrix = c3a.circulant(t["w"])
    return t["scale"] * t["x"] @ (matrix if t["transposed"] else matrix.mT)


def total(t: dict) -> Tensor:
    return t["base"] + product(t)


def on_linear(t: dict) -> Tensor:
    y = t["x"] @ t["weight"].mT
    return (y + t["bias"] if "bias" in t else y) + product(t)


@of_rows
def input_grad(t: dict) -> Tensor:
    return t["scale"] * t["grad_output"] @ c3a.circulant(t["w"])


def kernel_grad(t: dict) -> Tensor:
    w = torch.zeros(t["kernel_shape"], dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(product({**t, "w": w}), w, t["grad_output"], create_graph=True)[0]


def both_grads(t: dict) -> tuple[Tensor, Tensor]:
    return input_grad(t), kernel_grad(t)


def input_grad_added(t: dict) -> tuple[Tensor, Tensor]:
    return t["grad_input"] + input_grad(t), kernel_grad(t)


SUMS_OF_TOKENS = (kernel_grad, both_grads, input_grad_added)


@dataclass(frozen=True)
class Operator:
    """Operands are named as in the schema, in its order; a prepared kernel goes by its w."""

    name: str
    operands: tuple[str, ...]
    dense: Callable
    dtypes_of: tuple[str, ...]  # for each result, the argument that it has the dtype of,
    factors: tuple[tuple[str, ...], ...]  # and what is multiplied in it

    @property
    def in_place(self) -> bool:
        return self.name.endswith("_")

    @property
    def base(self) -> str | None:
        """Return the operand that the first result is added onto."""
        return self.operands[0] if self.operands[0] in ("base", "grad_input") else None

    @property
    def prepared(self) -> bool:
        return "prepared" in self.name

    @property
    def many(self) -> bool:
        """Return whether there is a stack of kernels, and an index of rows."""
        return "many" in self.name


XW, GW, GX = ("x", "w"), ("grad_output", "w"), ("grad_output", "x")
LINEAR = ("x", "weight", "bias", "w")  # the bias may be left out
OPERATORS = (
    Operator("block_circ_conv", XW, product, ("x",), (XW,)),
    Operator("block_circ_conv_add", ("base", *XW), total, ("base",), (XW,)),
    Operator("block_circ_conv_add_", ("base", *XW), total, ("base",), (XW,)),
    Operator("block_circ_conv_input_grad", GW, input_grad, ("grad_output",), (GW,)),
    Operator("block_circ_conv_kernel_grad", GX, kernel_grad, ("dtype",), (GX,)),
    Operator("block_circ_conv_backward", (*GX, "w"), both_grads, XW, (GW, GX)),
    Operator(
        "block_circ_conv_backward_add_",
        ("grad_input", *GX, "w"),
        input_grad_added,
        ("grad_input", "w"),
        (GW, GX),
    ),
    Operator("block_circ_conv_prepared", XW, product, ("x",), (XW,)),
    Operator("block_circ_conv_prepared_add", ("base", *XW), total, ("base",), (XW,)),
    Operator("block_circ_conv_prepared_add_", ("base", *XW), total, ("base",), (XW,)),
    Operator("block_circ_conv_linear", LINEAR, on_linear, ("weight",), (XW,)),
    Operator("block_circ_conv_many", XW, product, ("x",), (XW,)),
    Operator("block_circ_conv_many_add_", ("base", *XW), total, ("base",), (XW,)),
    Operator("block_circ_conv_many_input_grad", GW, input_grad, ("grad_output",), (GW,)),
    Operator("block_circ_conv_many_kernel_grad", GX, kernel_grad, ("dtype",), (GX,)),
    Operator("block_circ_conv_many_prepared", XW, product, ("x",), (XW,)),
    Operator("block_circ_conv_many_prepared_add_", ("base", *XW), total, ("base",), (XW,)),
)


@dataclass
class Call:
    """An operator, its operands and its other arguments, as drawn."""

    operator: Operator
    kernel_shape: tuple[int, ...]  # (m, n, b), or of a stack (adapters, m, n, b)
    transposed: bool  # of a prepared kernel
    scale: float
    scale_unit: int
    operands: dict[str, Tensor]
    units: dict[str, int]
    arguments: dict  # of the operator, by name
    prepared_for: torch.dtype | None = None
    index: Tensor | None = None  # on the CPU

    @property
    def factor(self) -> float:
        return self.scale * 2.0**self.scale_unit

    @property
    def result_dtypes(self) -> list[torch.dtype]:
        dtypes = {name: t.dtype for name, t in self.operands.items()}
        dtypes["dtype"] = self.arguments.get("dtype") or next(iter(dtypes.values()))
        return [dtypes[name] for name in self.operator.dtypes_of]

    @property
    def result_units(self) -> list[int]:
        factors = self.operator.factors
        return [self.scale_unit + sum(self.units[name] for name in names) for names in factors]

    @property
    def sums(self) -> torch.dtype:
        tensors = [*self.operands.values(), *self.arguments.values()]
        dtypes = {t.dtype for t in tensors if isinstance(t, Tensor)} | {*self.result_dtypes}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    @property
    def sums_in_a_graph(self) -> bool:
        """Return whether it is a product and a sum, each rounded, where a gradient is wanted."""
        many = self.operator.many and self.operator.dense is total
        return many or self.operator.dense is input_grad_added

    @property
    def own_bits(self) -> bool:
        """Return whether the CPU's own kernels compute all of it."""
        return self.has_kernels and self.operator.dense is not on_linear

    @property
    def rounds(self) -> bool:
        """Return whether spectra are rounded to bfloat16."""
        if not self.has_kernels or self.sums == torch.float64:
            return False
        if self.operator.prepared:
            return rounds_spectra("cpu", self.prepared_for)
        return rounds_spectra("cpu", *(t.dtype for name, t in self.operands.items() if name != "w"))

    @property
    def repeats(self) -> int:
        """Return how often a token comes again: sums of tokens repeat its errors as often."""
        layouts = [zip(t.shape, t.stride(), strict=True) for t in self.operands.values()]
        return max(math.prod(size for size, step in one if step == 0) for one in layouts)

    @property
    def on_cpu(self) -> bool:
        """Return whether the CPU's back end computes it."""
        return next(iter(self.operands.values())).is_cpu and "C3A_EMULATED" not in os.environ

    @property
    def has_kernels(self) -> bool:
        """Return whether the CPU's own kernels do."""
        b = self.kernel_shape[-1]
        for prime in (2, 3, 5, 7, 11, 13):
            while b % prime == 0:
                b //= prime
        return self.on_cpu and b == 1 and os.environ.get("C3A_CPU_LEVEL") != "aten"

    def run(self, **changes) -> tuple[Tensor, ...]:
        """Call the operator; return its results, or the base that it wrote."""
        result = getattr(OPS, self.operator.name)(**{**self.arguments, **changes})
        results = result if isinstance(result, tuple) else (result,)
        if self.operator.in_place:
            results = (self.arguments[self.operator.base], *(t for t in results if t is not None))
        expect(len(results) == len(self.result_units), f"there are {len(results)} results")
        return results

    def definition(self, operands: dict, scale: float, leaves, chosen: int, h: Tensor) -> dict:
        operands = {name: t.detach().requires_grad_(name in leaves) for name, t in operands.items()}
        facts = {"transposed": self.transposed, "kernel_shape": self.kernel_shape, "scale": scale}
        facts["index"] = self.index
        results = self.operator.dense({**facts, **operands})
        results = results if isinstance(results, tuple) else (results,)
        leaves = {name: operands[name] for name in leaves}
        return results_and_gradients(results, leaves, chosen, h)


def results_and_gradients(results: tuple, leaves: dict, chosen: int, h: Tensor) -> dict:
    """Return results by number, and by name the gradients that ``h``, the chosen one's, gives."""
    found = {**dict(enumerate(results)), **dict.fromkeys(leaves)}
    if results[chosen].requires_grad:
        grads = torch.autograd.grad(results[chosen], [*leaves.values()], h, allow_unused=True)
        found.update(zip(leaves, grads, strict=True))
    return found


# Drawing


class Draw:
    """The random choices of one case, and in words what they came to."""

    def __init__(self, seed: int, number: int, device: str) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))
        self.device = torch.device(device)
        self.facts: list[str] = []

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, *options):
        return self.random.choice(options)

    def note(self, fact: str) -> None:
        self.facts.append(fact)

    def shape(self) -> tuple[tuple[int, ...], int, int, int]:
        """Return (leading sizes, m, n, b)."""
        randint = self.random.randint
        b = self.choice(
            *(1, randint(1, 16), randint(1, 16), randint(1, 400), randint(1, 1536)),
            2 ** randint(1, 9),
            self.choice(3, 5, 7, 11, 13) * self.choice(1, 3, 5, 7, 8, 11, 16),
            self.choice(17, 19, 23, 31, 97, 101, 251, 331),
            self.choice(17, 19, 23, 29) * randint(2, 12),
        )
        most = DENSE_NUMBERS // b**2
        m = min(round(40 ** self.random.random()), most)
        n = min(round(40 ** self.random.random()), most // m)
        m, n = self.choice((m, n), (n, m))
        most = min(200, DENSE_PRODUCTS // (m * n * b * b))
        tokens = self.choice(0, 1, randint(1, min(20, most)), randint(1, most), most)
        leading = () if tokens == 1 and self.chance(0.5) else (tokens,)
        for _ in range(self.choice(0, 0, 1, 2) if leading else 0):
            outer = self.choice(1, 2, 3, leading[0])
            if outer and (outer <= leading[0] or tokens == 0):
                leading = (outer, leading[0] // outer, *leading[1:])
        return leading, m, n, b

    def unit(self, dtype: torch.dtype, *excluded: str) -> int:
        """Return an exponent for a dtype."""
        kinds = [kind for kind in ("usual", "usual", *UNITS[dtype]) if kind not in excluded]
        return self.random.randint(*UNITS[dtype].get(self.choice(*kinds), (0, 0)))

    def values(self, sizes: tuple[int, ...], kind: str = "normal") -> Tensor:
        """Return numbers around 1 in float64."""
        normal = torch.randn(sizes, generator=self.generator, dtype=torch.float64)
        if kind == "positive":
            return normal.abs() + 0.5
        if kind == "constant":
            return torch.full_like(normal, self.random.uniform(-2, 2))
        if kind == "sparse":
            return torch.where(normal > 1.6, normal, 0.0)
        if kind == "zero":
            return torch.zeros_like(normal)
        if kind == "spread":  # over rows
            return normal * 2.0 ** torch.randint(-8, 9, (*sizes[:-1], 1), generator=self.generator)
        if kind == "not finite" and normal.numel():
            odd = self.choice(math.inf, -math.inf, math.nan)
            normal.view(-1)[self.random.randrange(normal.numel())] = odd
        return normal

    def memory(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor amid numbers that are NaN: order, steps and offset as drawn."""
        odd = self.chance(0.6)
        order = list(range(len(sizes)))
        if odd and self.chance(0.5):
            self.random.shuffle(order)
        strides, span = [1] * len(sizes), 1
        for d in reversed(order):
            strides[d] = span * (self.choice(1, 1, 1, 2, 3) if odd else 1)
            span = strides[d] * max(1, sizes[d]) + (self.choice(0, 0, 0, 1, 5) if odd else 0)
        offset = self.choice(0, 1, 2, 3, 7) if odd else 0
        self.note(f"  strides {strides}, offset {offset}")
        memory = torch.full((offset + span,), math.nan, dtype=dtype, device=self.device)
        return memory.as_strided(sizes, strides, offset)

    def laid_out(self, values: Tensor, dtype: torch.dtype, repeated=()) -> Tensor:
        """Return the values in some layout; ``repeated`` dimensions hold their first, expanded."""
        sizes, most = values.shape, torch.finfo(dtype).max
        values = torch.where(values.isinf(), values, values.clamp(-most, most))
        for d in repeated:
            values = values.narrow(d, 0, 1)
            self.note(f"  dimension {d} expanded")
        negative = self.chance(0.1)
        t = self.memory(values.shape, dtype)
        t.copy_(-values if negative else values)
        if negative:
            self.note("  a negative view")
            t = torch._neg_view(t)
        return t.expand(sizes)

    def index_laid_out(self, index: Tensor) -> Tensor:
        """Return an index on the CPU or the device, its entries apart or not."""
        step, device = self.choice(1, 1, 2, 3), self.choice("cpu", self.device)
        self.note(f"index in steps of {step}, on {device}")
        memory = torch.full((len(index), step), 2**40, dtype=torch.int64, device=device)
        memory[:, 0] = index
        return memory[:, 0]


def times_two_to(t: Tensor, exponent: int) -> Tensor:
    """Return ``t * 2**exponent`` in float64 on the CPU; no factor is out of its range."""
    half = exponent // 2
    return t.detach().resolve_neg().cpu().double() * 2.0**half * 2.0 ** (exponent - half)


def near(unit: int, dtype: torch.dtype) -> int:
    """Return the unit nearest to another one that a dtype has room for."""
    return min(max(unit, UNITS[dtype]["subnormal"][0]), UNITS[dtype]["large"][1])


def draw_call(draw: Draw) -> Call:
    operator = draw.choice(*OPERATORS)
    has_linear = operator.dense is on_linear
    leading, m, n, b = draw.shape()
    stack: tuple[int, ...] = ()
    if operator.many:
        leading = leading or (1,)
        stack = (min(draw.choice(1, 2, 3, 8), DENSE_NUMBERS // (m * n * b * b)),)
    transposed = operator.prepared and draw.chance(0.3)
    draw.note(f"{operator.name}, leading sizes {leading}, (m, n, b) {(m, n, b)}, stack {stack}")
    sizes = {"x": (*leading, n * b), "w": (*stack, *((n, m, b) if transposed else (m, n, b)))}
    sizes["base"] = sizes["grad_output"] = (*leading, m * b)
    sizes["grad_input"] = sizes["x"]
    sizes |= {"weight": (m * b, n * b), "bias": (m * b,)}
    scale, scale_unit = 1.0, 0
    if draw.chance(0.7):
        scale = draw.choice(1.0, -1.0, 0.0, draw.random.uniform(-2, 2), draw.random.uniform(-2, 2))
        scale_unit = 0 if has_linear else draw.choice(0, 0, draw.random.randint(-20, 20))
    call = Call(operator, (*stack, m, n, b), transposed, scale, scale_unit, {}, {}, {})
    draw.note(f"scale {call.factor}, prepared transposed: {transposed}")

    usual, common = draw.chance(0.4), draw.choice(*DTYPES)
    kinds = ["normal"] * 3 + ["positive", "constant", "sparse", "spread", "zero"]
    kinds += ["not finite"] * (4 if draw.chance(0.1) else 0)
    if has_linear:  # its terms are summed in the weight's dtype: none is to overflow alone
        kinds.remove("spread")
    of_weight = common if usual else draw.choice(*DTYPES)
    has_bias = draw.chance(0.7)
    for name in reversed(operator.operands):
        if name == "bias" and not has_bias:
            continue
        dtype, kind = common if usual else draw.choice(*DTYPES), draw.choice(*kinds)
        dtype = of_weight if name in ("weight", "bias") else dtype
        # One subnormal operand in float64 at most, and none where a sum has two units.
        lone = len(operator.operands) == 2 and not call.units
        excluded = ["subnormal"] if dtype == torch.float64 and not lone else []
        unit = 0 if usual or has_linear else draw.unit(dtype, *excluded)
        call.units[name] = unit
        if name == operator.base:  # about as large as what is added to it, where its dtype can be
            call.units[name] = call.result_units[0]
            unit = near(call.units[name] + draw.random.randint(-4, 4), dtype)
        draw.note(f"{name} {dtype}, {kind}, times 2**{unit}")
        written = operator.in_place and name == operator.base
        single = name not in ("x", "base", "grad_output", "grad_input") or written or 0 in leading
        repeated = [] if single else [d for d in range(len(leading)) if draw.chance(0.1)]
        values = times_two_to(draw.values(sizes[name], kind), unit)
        call.operands[name] = draw.laid_out(values, dtype, repeated)
    call.operands = {n: call.operands[n] for n in operator.operands if n in call.operands}
    if operator.many:
        call.index = draw_index(draw, leading[0], stack[0])

    if operator.in_place and 0 not in leading and draw.chance(0.3):
        overlap(draw, call)
    call.arguments = dict(call.operands)
    if operator.prepared:
        prepare(draw, call, call.arguments.pop("w"))
    else:
        call.arguments["scale"] = call.factor
    if operator.dense is kernel_grad:
        call.arguments |= {"block_size": b, "dtype": draw.choice(None, *DTYPES)}
        if stack:
            call.arguments["adapters"] = stack[0]
        draw.note(f"dtype {call.arguments['dtype']}")
    if call.index is not None:
        call.arguments["index"] = draw.index_laid_out(call.index)
    if has_linear:
        call.arguments.setdefault("bias", None)
    return call


def draw_index(draw: Draw, rows: int, adapters: int) -> Tensor:
    """Return the kernel of each row: at random, in runs, all the same, or none anywhere."""
    index = torch.randint(-1, adapters, (rows,), generator=draw.generator)
    kind = draw.choice("random", "random", "runs", "same", "none")
    if kind == "runs":
        index = index.sort(descending=draw.chance(0.5)).values
    elif kind == "same":
        index.fill_(draw.random.randrange(adapters))
    elif kind == "none":
        index.fill_(-1)
    draw.note(f"index {kind}, {index.tolist()}")
    return index


def overlap(draw: Draw, call: Call) -> None:
    """Put the base and another operand into the same memory."""
    name = "x" if call.operator.prepared else draw.choice("x", "w")
    written = call.operator.base
    base, steps = call.operands[written], draw.choice(1, 1, 2)
    length = steps * (base.numel() + call.operands[name].numel())
    memory = draw.values((length,)).to(draw.device, base.dtype)
    for moved in (written, name):
        t = call.operands[moved]
        strides = [steps * stride for stride in torch.empty(t.shape, device="meta").stride()]
        offset = draw.random.randrange(length - (t.numel() - 1) * steps)
        call.operands[moved] = memory.as_strided(t.shape, strides, offset)
        draw.note(f"{moved} at {offset} of {length} numbers, in steps of {steps}")
    call.units[name] = 0
    call.units[written] = call.result_units[0]


def prepare(draw: Draw, call: Call, w: Tensor) -> None:
    """Add the arguments that stand for w, which is prepared alone or in a stack."""
    index: tuple[int, ...] = ()
    if not call.operator.many and draw.chance(0.3):
        stack = [draw.random.randint(1, 3) for _ in range(draw.choice(1, 2))]
        index = tuple(draw.random.randrange(size) for size in stack)
        draw.note(f"kernel {index} of a stack {stack}")
        kernels = draw.memory((*stack, *w.shape), w.dtype).fill_(1)
        kernels[index] = w
        w = kernels
    dtypes = [torch.float64] if call.sums == torch.float64 else [None, *DTYPES[:3]]
    dtype, made = draw.choice(*dtypes), []
    call.prepared_for = dtype
    for transposed in (call.transposed, not call.transposed):
        w_hat = c3a.prepare(w, dtype, transposed=transposed, scale=call.factor)[index]
        if draw.chance(0.2):
            w_hat = draw.memory(w_hat.shape, w_hat.dtype).copy_(w_hat)
        if call.index is not None and draw.chance(0.3):  # what no row chooses may hold anything
            unused = [k for k in range(len(w)) if k not in call.index]
            w_hat[unused] = math.nan
        made.append(w_hat)
    draw.note(f"prepared in {made[0].dtype} for {dtype}")
    block_size = call.kernel_shape[-1]
    call.arguments |= {"w_hat": made[0], "block_size": block_size, "w_hat_transposed": made[1]}


def draw_leaves(draw: Draw, call: Call) -> dict[str, Tensor]:
    """Let some operands require a gradient; return the tensors that get it, by name."""
    operands, leaves = call.operands, {}
    apart = {t.untyped_storage().data_ptr() for t in operands.values()}
    if len(apart) < len(operands):
        return leaves
    for name, t in operands.items():
        if name not in call.arguments or draw.chance(0.4):
            continue
        if (
            name == call.operator.base and call.operator.in_place
        ):  # a leaf itself may not be written
            leaves[name] = t.detach().clone().requires_grad_()
            t.copy_(leaves[name])
        else:
            leaves[name] = t.requires_grad_()
    return leaves


# Comparing


def compare_all(draw: Draw, call: Call, results: tuple, leaves: dict) -> None:
    """Compare results, and the gradients of leaves, with the definition."""
    units = dict(enumerate(call.result_units))
    chosen = draw.random.randrange(len(results))  # the one whose gradients are compared
    y = results[chosen]
    h_unit = 0 if "weight" in call.operands else draw.unit(y.dtype, "subnormal")
    h = draw.laid_out(times_two_to(draw.values(y.shape), h_unit), y.dtype)
    units |= {name: h_unit + units[chosen] - call.units[name] for name in leaves}

    # Below the smallest normal number errors of sums are absolute: as if no number were smaller.
    smallest = math.log2(torch.finfo(call.sums).smallest_normal)
    if call.rounds:  # takes subnormal numbers for zero: a whole such number may be lost
        smallest += math.log2(4 / sums_tolerance(call))
    b, factor = call.kernel_shape[-1], abs(call.factor)
    floors = {"w": b * max(1.0, 1 / (factor or 1.0))}  # its spectra are scaled
    floors[call.operator.base] = 0.0
    exact, squares = {}, {}
    for name, t in call.operands.items():
        exact[name] = times_two_to(t, -call.units[name])
        floor = floors.get(name, 1.0) * 2.0 ** (smallest - call.units[name])
        squares[name] = exact[name] ** 2 + floor**2
    exact_h = times_two_to(h, -h_unit)
    given = exact
    exact = call.definition(given, call.scale, leaves, chosen, exact_h)
    one_term = {}  # of results that are sums of two, each rounded by itself
    if "weight" in call.operands:
        one_term = call.definition(given, 0.0, leaves, chosen, exact_h)
        one_term = {name: t for name, t in one_term.items() if name in (0, "x") and t is not None}
    elif call.sums_in_a_graph and results[0].requires_grad:
        one_term = {0: given[call.operator.base]}
    squares = call.definition(squares, call.scale**2, leaves, chosen, exact_h**2)

    for k, y in enumerate(results):
        expect(y.requires_grad == exact[k].requires_grad, "requires_grad of the result is wrong")
    dtypes = dict(enumerate(call.result_dtypes)) | {name: t.dtype for name, t in leaves.items()}
    for name, got in results_and_gradients(results, leaves, chosen, h).items():
        what = f"the gradient of {name}" if name in leaves else ("the result", "dw")[name]
        expect((got is None) == (exact[name] is None), f"{what} is None, or should be")
        if got is not None:
            expect(got.dtype == dtypes[name], f"{what} has dtype {got.dtype}, not {dtypes[name]}")
            floor = 2.0 ** (smallest - units[name]) * max(1.0, factor)
            terms = squares[name] + max(call.kernel_shape[-3:-1]) * b * floor**2
            if name in ("w", "weight", "bias") or call.operator.dense in SUMS_OF_TOKENS:
                terms = call.repeats * terms
            extra = torch.zeros_like(terms)
            if name in one_term:
                one, other = one_term[name], exact[name] - one_term[name]
                rounded_to = (got.dtype, call.operands.get("weight", got).dtype)
                coarsest = max(TOLERANCE[dtype] for dtype in rounded_to)
                extra = coarsest * (one.abs() + other.abs()).detach()
            compare(what, got, exact[name], terms.sqrt(), units[name], call, extra)


def sums_tolerance(call: Call) -> float:
    found = TOLERANCE[call.sums]
    if call.rounds:
        # A block may be one number, with the whole error of both roundings.
        found = 2 * tolerance(torch.float32, "cpu", torch.bfloat16)
    if "weight" in call.operands:  # the linear layer takes and gives what is rounded to its dtype
        found = max(found, 2 * TOLERANCE[call.operands["weight"].dtype])
    return found


def compare(
    what: str,
    got: Tensor,
    exact: Tensor,
    terms: Tensor,
    unit: int,
    call: Call,
    extra: Tensor,
) -> None:
    """Compare a result with the exact one, which like ``terms`` is relative to the unit.

    ``extra`` is what it may err by more: what has been rounded on the way.
    """
    expect(got.shape == exact.shape, f"{what} has shape {got.shape}, not {exact.shape}")
    if got.numel() == 0:
        return
    dtype, b = got.dtype, call.kernel_shape[-1]
    limits = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    most, least = times_two_to(torch.tensor(limits, dtype=torch.float64), -unit)
    got = times_two_to(got, -unit).reshape(-1, b)
    exact, terms = exact.detach().reshape(-1, b), terms.detach().reshape(-1, b)
    finite = exact.isfinite()

    def norm(t: Tensor) -> Tensor:
        return torch.where(finite, t, 0.0).norm(dim=-1, keepdim=True)

    bound = TOLERANCE[dtype] * (norm(exact) + b**0.5 * least)
    bound = bound + sums_tolerance(call) * (norm(exact) + norm(terms))
    bound = bound + norm(extra.reshape(-1, b))
    fits = finite & (exact.abs() + bound < most)
    overflows = ~finite | (exact.abs() - bound > most)
    expect(bool(got[fits].isfinite().all()), f"{what} is not finite where it should be")
    expect(not got[overflows].isfinite().any(), f"{what} is finite where it should not be")
    error = torch.where(fits, got - exact, 0.0).norm(dim=-1, keepdim=True)
    ratio = (error / bound).nan_to_num(0.0).max().item()  # both may be zero
    expect(ratio <= 1, f"{what} has {ratio:.3g} times the error that it may have")


def compare_bits(draw: Draw, call: Call, results: tuple) -> None:
    """Compare with other ways to the same bits: threads, a token alone, the kernel itself."""
    arguments, y = call.arguments, results[0]
    if call.own_bits:
        torch.set_num_threads(3 - torch.get_num_threads())
        for again, result in zip(call.run(), results, strict=True):
            expect(same_bits(again, result), "another number of threads gives other bits")
        if call.operator.dense not in SUMS_OF_TOKENS and 0 not in y.shape:
            token = tuple(draw.random.randrange(size) for size in y.shape[:-1])
            names = {"base", "x", "grad_output"} & {*arguments}
            alone = {name: arguments[name][token] for name in names}
            if call.index is not None:
                alone = {name: a.unsqueeze(0) for name, a in alone.items()}
                alone["index"] = arguments["index"][token[:1]].unsqueeze(0)
            (alone,) = call.run(**alone)
            expect(same_bits(alone.view(-1), y[token]), "a token alone has other bits")
    if call.index is not None and call.operator.dense is not kernel_grad:
        compare_rows(call, y)
    if (
        call.operator.name in ("block_circ_conv_prepared", "block_circ_conv_many_prepared")
        and call.on_cpu
        and not call.transposed
    ):
        x, w = call.operands.values()
        sums = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
        as_itself = call.rounds == (call.has_kernels and rounds_spectra("cpu", x.dtype))
        if sums == arguments["w_hat"].dtype and (as_itself or sums == torch.float64):
            if call.index is None:
                direct = OPS.block_circ_conv(x, w, call.factor)
            else:
                direct = OPS.block_circ_conv_many(x, w, call.index, call.factor)
            expect(same_bits(direct, y), "the kernel itself gives other bits")


def compare_rows(call: Call, y: Tensor) -> None:
    """Compare rows with what their kernels alone give, and those without one with zeros."""
    expect(not y[call.index < 0].any(), "a row without a kernel is not zeros")
    if not call.has_kernels:
        return
    one = getattr(OPS, call.operator.name.replace("_many", ""))
    per_kernel = ("w", "w_hat", "w_hat_transposed")
    for row, k in enumerate(call.index.tolist()):
        if k < 0:
            continue
        given = {
            name: t[k if name in per_kernel else row] if isinstance(t, Tensor) else t
            for name, t in call.arguments.items()
            if name != "index"
        }
        expect(same_bits(one(**given), y[row]), "a row has other bits than its kernel alone gives")


def same_bits(got: Tensor, expected: Tensor) -> bool:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    same = got.view(integer) == expected.view(integer)
    return bool((same | (got.isnan() & expected.isnan())).all())


class Watched:
    """The memory of tensors, seen to be what it was, but for the one that is written."""

    def __init__(self, tensors) -> None:
        self.tensors = [t for t in tensors if isinstance(t, Tensor)]
        self.before = [self.bytes_of(t).clone() for t in self.tensors]

    @staticmethod
    def bytes_of(t: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())

    @staticmethod
    def share(s: Tensor, t: Tensor) -> bool:
        return s.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()

    def check(self, written: Tensor | None = None) -> None:
        for t, before in zip(self.tensors, self.before, strict=True):
            now = self.bytes_of(t)
            if written is not None and self.share(t, written):
                layout = written.shape, written.stride(), written.storage_offset()
                old, new = (memory.view(t.dtype).as_strided(*layout) for memory in (before, now))
                old.copy_(new)
            expect(torch.equal(now, before), "memory changed that was only to be read")


# Kinds of cases: each draws one, checks it, and returns what it was


def operators(draw: Draw) -> str:
    """Call an operator as it is meant to be called."""
    mode = draw.choice(*MODES)
    make, use = MODES[mode]
    threads = draw.choice(1, 2)
    torch.set_num_threads(threads)
    with make():
        call = draw_call(draw)
    operator, arguments = call.operator, call.arguments
    leaves = draw_leaves(draw, call) if mode == "grad mode" else {}
    if operator.prepared and "x" not in leaves and draw.chance(0.5):
        del arguments["w_hat_transposed"]
    draw.note(f"{mode}, {threads} threads, gradients of {[*leaves]}")

    watched = Watched([*arguments.values(), *call.operands.values()])
    if operator.in_place:
        base = arguments[operator.base]
        version = None if base.is_inference() else base._version
        call.operands = {name: t.clone() for name, t in call.operands.items()}
        with use():
            results = call.run()
        watched.check(written=base)
        expect(version is None or base._version > version, "the write was not counted")
        if call.index is not None:
            none, before = call.index < 0, call.operands[operator.base]
            expect(same_bits(base[none], before[none]), "a row without a kernel was written")
    else:
        with use():
            results = call.run()
            compare_bits(draw, call, results)
        watched.check()
        for y in results:
            expect(y.is_contiguous(), "the result is not contiguous")
            new = y.numel() == 0 or not any(watched.share(y, t) for t in watched.tensors)
            expect(new, "the result is not new")
    compare_all(draw, call, results, leaves)
    return f"{operator.name}{', gradients' if leaves else ''}"


def refusals(draw: Draw) -> str:
    """Break a rule: the operator names it, and changes nothing."""
    mode = draw.choice(*MODES)
    make, use = MODES[mode]
    with make():
        call = draw_call(draw)
        name, arguments = call.operator.name, call.arguments
        if "w" in arguments and not call.operator.many and draw.chance(0.2):
            name, arguments = "prepare", {"w": arguments["w"], "dtype": None}
        changes = draw.choice(*violations(call, name, arguments, mode == "grad mode"))
    draw.note(f"{mode}, {name} with {changes}")
    watched = Watched(arguments.values())
    try:
        with use():
            getattr(OPS, name)(**{**arguments, **changes})
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        expect(said.startswith("c3a."), f"the message does not name the operator: {said}")
    else:
        raise Wrong(f"was taken with {changes}")
    watched.check()
    return "refusals"


def violations(call: Call, name: str, arguments: dict, grad_mode: bool) -> list[dict]:
    """Return changes of arguments, each of which breaks a rule."""
    (m, n, b), found = call.kernel_shape[-3:], []
    names = ("base", "grad_input", "x", "grad_output")
    tokens = {key: arguments[key] for key in names if key in arguments}
    kernels = {key: arguments[key] for key in ("w", "w_hat") if key in arguments}
    in_place = call.operator.in_place and name != "prepare"
    for key, t in tokens.items():
        found.append({key: t.new_ones(())})
        if b > 1 or call.operator.dense is not kernel_grad:
            found += [{key: t.new_ones(*t.shape[:-1], t.shape[-1] + more)} for more in (-1, 1)]
        if len(tokens) > 1:
            found.append({key: t.new_ones(2, *t.shape)})
    for key, t in {**tokens, **kernels}.items():
        found.append({key: torch.zeros_like(t).to_sparse()})
        found.append({key: None})
        for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e5m2):
            found.append({key: torch.zeros(t.shape, dtype=dtype, device=t.device)})
        if name != "prepare":
            found.append({key: t.to("meta")})
    for key, t in kernels.items():
        found += [{key: t[0]}, {key: t[:, :0]}]
        if name != "prepare":
            found.append({key: t.unsqueeze(0)})
        if grad_mode and (key == "w_hat" or name == "prepare"):
            found.append({key: t.clone().requires_grad_()})
    if "block_size" in arguments:
        found += [{"block_size": size} for size in (0, -b, b * max(m, n) + 1)]
    if "dtype" in arguments:
        found.append({"dtype": torch.int64})
    if name == "prepare" and arguments["w"].dtype == torch.float64:
        found += [{"dtype": dtype} for dtype in (torch.float32, torch.bfloat16)]
    if in_place and (base := arguments[call.operator.base]).numel() > 1:
        found.append({call.operator.base: base.new_ones(()).expand(base.shape)})
    if "w_hat" in kernels:
        w_hat = kernels["w_hat"]
        found += [{"w_hat": w_hat[..., 1:]}, {"w_hat": w_hat.bfloat16()}]
        chosen = call.index is None or bool((call.index >= 0).any())
        if call.on_cpu and tokens["x"].numel() and chosen:
            found.append({"w_hat": torch.zeros_like(w_hat)})
        if m != n:
            found.append({"w_hat_transposed": w_hat})
        if torch.float64 in [t.dtype for t in tokens.values()]:
            found.append({"w_hat": w_hat.float()})
        if grad_mode:
            x = tokens["x"].detach().clone().requires_grad_()
            found.append({"x": x, "w_hat_transposed": None})
    if call.index is not None:
        found += violations_of_index(call, arguments["index"])
    if "adapters" in arguments:
        found += [{"adapters": 0}, {"adapters": -1}]
    if "weight" in arguments:
        weight, bias = arguments["weight"], arguments["bias"]
        found += [{"weight": None}, {"weight": weight.to("meta")}, {"weight": weight.to_sparse()}]
        found += [{"weight": torch.cat([weight, weight], d)} for d in (0, 1)]
        found.append({"weight": weight.int()})
        if bias is not None:
            other = torch.float32 if bias.dtype != torch.float32 else torch.float64
            found += [{"bias": bias.to(other)}, {"bias": bias[1:]}, {"bias": bias.unsqueeze(0)}]
    return found


def violations_of_index(call: Call, index: Tensor) -> list[dict]:
    found: list = [None, index.int(), index.unsqueeze(0), index.to_sparse(), index.to("meta")]
    found.append(torch.cat([index, index.new_zeros(1)]))
    if len(index) and index.is_cpu:
        for entry in (-2, call.kernel_shape[0]):
            wrong = index.clone()
            wrong[-1] = entry
            found.append(wrong)
    return [{"index": wrong} for wrong in found]


KINDS = {operators: 9, refusals: 1}  # and how often each is drawn


# Running


def run_case(seed: int, number: int, device: str) -> tuple[str, str | None, Draw]:
    """Return the kind of a case, what was wrong, and how it was drawn."""
    draw = Draw(seed, number, device)
    (kind,) = draw.random.choices([*KINDS], [*KINDS.values()])
    threads = torch.get_num_threads()
    try:
        return kind(draw), None, draw
    except Wrong as error:
        return kind.__name__, str(error), draw
    except Exception:
        return kind.__name__, traceback.format_exc(), draw
    finally:
        torch.set_num_threads(threads)


def main(argv: list[str] | None = None) -> int:
    parser = fuzzing.parser(__doc__)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    seed, device = options.seed, options.device
    level = os.environ.get("C3A_CPU_LEVEL", "the best")
    print(f"seed {seed}, device {device}, CPU level {level}", flush=True)

    def one(number: int):
        kind, wrong, draw = run_case(seed, number, device)
        return kind, wrong, draw.facts

    elsewhere = "" if device == "cpu" else f" --device {device}"
    return fuzzing.run(options, f"python tests/fuzz.py{elsewhere} --seed {seed}", one)


if __name__ == "__main__":
    sys.exit(main())
