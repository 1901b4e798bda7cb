"""FLOPs of the operators for ``torch.utils.flop_counter``, in the terms of DESIGN.md, "Cost".

A real transform of length b counts ``2.5 b log2(b)``, a complex multiplication and addition 8, a
real one 2.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ._private import Overload

_COUNTER = "torch.utils.flop_counter"

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


# Importing the counter takes longer than importing this package, for it imports triton; but when a
# counter is made, it takes the formulas that there are. They are registered as it is imported.

Formulas = Mapping[Overload, Callable[..., int]]


def register(formulas: Formulas) -> None:
    """Give torch's counter the formulas: now if it is imported, and whenever it will be."""
    sys.meta_path.insert(0, _Finder(formulas))
    if _COUNTER in sys.modules:
        _give(formulas, import_module(_COUNTER))  # waits for another thread that imports it


def _give(formulas: Formulas, counter: ModuleType) -> None:
    for op, formula in formulas.items():
        counter.register_flop_formula(op.overloadpacket)(formula)


class _Finder:
    """Finds the counter as the finders after this one do, with a loader that registers."""

    def __init__(self, formulas: Formulas) -> None:
        self._formulas = formulas

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._formulas)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Another loader, which the module has afterwards, then the formulas."""

    def __init__(self, loader: Any, formulas: Formulas) -> None:
        self._loader, self._formulas = loader, formulas

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        module.__loader__ = spec.loader = self._loader
        self._loader.exec_module(module)
        _give(self._formulas, module)
