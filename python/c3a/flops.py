"""FLOPs of the operators for ``torch.utils.flop_counter``, in the terms of DESIGN.md, "Cost".

A real transform of length b counts ``2.5 b log2(b)``, a complex multiplication and addition 8, a
real one 2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from ._private import Overload
from .imports import on_import

Shape = Sequence[int]
Kernel = tuple[int, int, int]  # m, n, and b or what a prepared block takes


def _transforms(numbers: int, b: int) -> float:
    return 2.5 * numbers * math.log2(b)


def _product(tokens: int, m: int, n: int, b: int) -> int:
    """Count one product of all bins, of which one or, for an even b, two are real."""
    real = 2 - b % 2
    return tokens * m * n * (8 * ((b - real) // 2) + 2 * real)


def _convolution(x_shape: Shape, m: int, n: int, b: int, kernel: bool) -> int:
    tokens = math.prod(x_shape[:-1])
    numbers = tokens * (m + n) * b + (m * n * b if kernel else 0)
    return round(_transforms(numbers, b)) + _product(tokens, m, n, b)


def forward(x_shape: Shape, w_shape: Kernel, *_: object, **__: object) -> int:
    return _convolution(x_shape, *w_shape, kernel=True)


def add(base_shape: Shape, x_shape: Shape, w_shape: Kernel, *_: object, **__: object) -> int:
    return forward(x_shape, w_shape) + math.prod(base_shape)


def linear(
    x_shape: Shape,
    weight_shape: Shape,
    bias_shape: Shape | None,
    w_shape: Kernel,
    *_: object,
    **__: object,
) -> int:
    tokens = math.prod(x_shape[:-1])
    y_shape = (tokens, weight_shape[0])
    return 2 * tokens * math.prod(weight_shape) + add(y_shape, x_shape, w_shape)


def input_grad(g_shape: Shape, w_shape: Kernel, *_: object, **__: object) -> int:
    return _convolution(g_shape, *w_shape, kernel=True)


def kernel_grad(g_shape: Shape, x_shape: Shape, b: int, *_: object, **__: object) -> int:
    tokens, m, n = math.prod(x_shape[:-1]), g_shape[-1] // b, x_shape[-1] // b
    return round(_transforms((tokens * (m + n) + m * n) * b, b)) + _product(tokens, m, n, b)


def backward(g_shape: Shape, x_shape: Shape, w_shape: Kernel, *_: object, **__: object) -> int:
    b = w_shape[-1]
    shared = round(_transforms(math.prod(g_shape), b))
    return input_grad(g_shape, w_shape) + kernel_grad(g_shape, x_shape, b) - shared


def backward_add_(
    dx_shape: Shape, g_shape: Shape, x_shape: Shape, w_shape: Kernel, *_: object, **__: object
) -> int:
    return backward(g_shape, x_shape, w_shape) + math.prod(dx_shape)


def prepare(w_shape: Shape, *_: object, **__: object) -> int:
    return round(_transforms(math.prod(w_shape), w_shape[-1]))


def prepared(x_shape: Shape, w_hat_shape: Kernel, b: int, *_: object, **__: object) -> int:
    return _convolution(x_shape, *w_hat_shape[:2], b, kernel=False)


def prepared_add(
    base_shape: Shape, x_shape: Shape, w_hat_shape: Kernel, b: int, *_: object, **__: object
) -> int:
    return prepared(x_shape, w_hat_shape, b) + math.prod(base_shape)


# A stack's: the entries of the index are unknown here, so rows without a kernel count, and no more
# kernels are transformed than there are rows.


def many(x_shape: Shape, w_shape: Shape, index_shape: Shape, *_: object, **__: object) -> int:
    adapters, m, n, b = w_shape
    kernels = min(adapters, index_shape[0]) * m * n * b
    return round(_transforms(kernels, b)) + _convolution(x_shape, m, n, b, kernel=False)


def many_add_(
    base_shape: Shape, x_shape: Shape, w_shape: Shape, index_shape: Shape, *_: object, **__: object
) -> int:
    return many(x_shape, w_shape, index_shape) + math.prod(base_shape)


def many_kernel_grad(
    g_shape: Shape,
    x_shape: Shape,
    index_shape: Shape,
    adapters: int,
    b: int,
    *_: object,
    **__: object,
) -> int:
    tokens, m, n = math.prod(x_shape[:-1]), g_shape[-1] // b, x_shape[-1] // b
    numbers = tokens * (m + n) * b + min(adapters, index_shape[0]) * m * n * b
    return round(_transforms(numbers, b)) + _product(tokens, m, n, b)


def many_prepared(
    x_shape: Shape, w_hat_shape: Shape, index_shape: Shape, b: int, *_: object, **__: object
) -> int:
    return _convolution(x_shape, w_hat_shape[1], w_hat_shape[2], b, kernel=False)


def many_prepared_add_(
    base_shape: Shape,
    x_shape: Shape,
    w_hat_shape: Shape,
    index_shape: Shape,
    b: int,
    *_: object,
    **__: object,
) -> int:
    return many_prepared(x_shape, w_hat_shape, index_shape, b) + math.prod(base_shape)


# When a counter is made, it takes the formulas that there are: they are registered as the counters'
# module is imported, which takes longer than importing this package, for it imports triton.

Formulas = Mapping[Overload, Callable[..., int]]


def register(formulas: Formulas) -> None:
    """Give torch's counter the formulas."""

    def give(counter: ModuleType) -> None:
        for op, formula in formulas.items():
            counter.register_flop_formula(op.overloadpacket)(formula)

    on_import("torch.utils.flop_counter", give)
