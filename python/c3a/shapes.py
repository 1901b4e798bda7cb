"""Shape, dtype and device rules of the operators, for fake tensors.

cpp/problem.h states the same for real ones, in the same words.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _private

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PREPARED_ROOM = 32


def prepared_length(m: int, n: int, b: int, device: torch.device) -> int:
    """Return how many numbers a block takes in a prepared kernel on a device."""
    room = -(-_PREPARED_ROOM // (m * n))
    return 2 * (b // 2 + 1) + (room + room % 2 if device.type == "cpu" else 0)


def sums_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def widened(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor in a dtype in which the result is not rounded below ``dtype`` on the way."""
    return t.to(torch.promote_types(t.dtype, dtype))


def _check(op: str, holds: bool, message: Callable[[], str]) -> None:
    torch._check(holds, lambda: f"c3a.{op}: {message()}")


def _text(sizes: Sequence[int]) -> str:
    texts = [str(size) for size in sizes]
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def argument_check(op: _private.Overload) -> Callable[[Sequence[Any]], None]:
    """Return the check of an operator's arguments for what does not reach C++ as it is.

    It refuses None, tensors that are not dense, dtypes that the stable ABI has no number for, and
    expanded tensors where they are written.
    """
    name = op.name().partition("::")[2]
    arguments = list(enumerate(_private.schema(op).arguments))
    tensors = [
        (place, a.name, str(a.type).startswith("Optional"))
        for place, a in arguments
        if str(a.type) in ("Tensor", "Optional[Tensor]")
    ]
    dtypes = [place for place, a in arguments if a.name == "dtype"]
    written = [(place, a.name) for place, a in arguments if a.alias_info and a.alias_info.is_write]

    def check(args: Sequence[Any]) -> None:
        for place, argument, is_optional in tensors:
            t = args[place] if place < len(args) else None
            if t is None:
                if is_optional:
                    continue
                raise RuntimeError(f"c3a.{name}: expected {argument} to be a tensor, got None")
            if t.is_nested:
                raise RuntimeError(
                    f"c3a.{name}: expected {argument} to be a dense tensor (torch.strided), got a "
                    "nested tensor; pass its values(), of shape (tokens, features)"
                )
            if t.layout != torch.strided:
                _check_dense(name, argument, t)
        for place in dtypes:
            if place < len(args) and args[place] is not None:
                _check_supported(name, "dtype", args[place])
        for place, argument in written:
            _check_writable(name, args[place], argument)

    return check


def _check_supported(op: str, what: str, dtype: torch.dtype) -> None:
    expected = "float64, float32, bfloat16 or float16"
    supported = dtype in SUPPORTED_DTYPES
    _check(op, supported, lambda: f"expected {what} to be {expected}, got {_name(dtype)}")


def _check_numbers(op: str, name: str, t: Tensor) -> None:
    _check_dense(op, name, t)
    _check_supported(op, name, t.dtype)


def _check_dense(op: str, name: str, t: Tensor) -> None:
    dense = f"expected {name} to be a dense tensor (torch.strided)"
    _check(op, t.layout == torch.strided, lambda: f"{dense}, got {t.layout}")


def _check_same_device(op: str, a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    rule = f"{a_name} and {b_name} on one device"
    _check(op, a.device == b.device, lambda: f"expected {rule}, got {a.device} and {b.device}")


def _check_tokens(op: str, name: str, t: Tensor) -> None:
    _check(op, t.dim() >= 1, lambda: f"expected {name} to have at least 1 dimension, got shape ()")


def _check_kernel(op: str, w: Tensor) -> None:
    _check_numbers(op, "w", w)
    right = w.dim() == 3 and all(size >= 1 for size in w.shape)
    expected = "a kernel w of shape (m, n, b) with m, n, b >= 1"
    _check(op, right, lambda: f"expected {expected}, got {_text(w.shape)}")


def _check_same_leading(op: str, g: Tensor, x: Tensor) -> None:
    same = g.dim() == x.dim() and all(
        p == q for p, q in zip(g.shape[:-1], x.shape[:-1], strict=True)
    )
    rule = "grad_output and x to have the same leading dimensions"
    _check(op, same, lambda: f"expected {rule}, got {_text(g.shape)} and {_text(x.shape)}")


def _check_base(op: str, base: Tensor, x: Tensor, features: int, name: str = "base") -> None:
    _check_numbers(op, name, base)
    _check_same_device(op, name, base, "x", x)
    sizes = (*x.shape[:-1], features)
    same = base.dim() == len(sizes) and all(p == q for p, q in zip(base.shape, sizes, strict=True))
    _check(op, same, lambda: f"expected {name} of shape {_text(sizes)}, got {_text(base.shape)}")


def _check_writable(op: str, base: Tensor, name: str = "base") -> None:
    apart = all(size < 2 or step for size, step in zip(base.shape, base.stride(), strict=True))
    _check(
        op,
        apart,
        lambda: (
            f"expected a {name} that is not expanded, got strides {_text(base.stride())} for shape "
            f"{_text(base.shape)}; call {name}.contiguous() first"
        ),
    )


def _check_stack(op: str, w: Tensor) -> None:
    _check_numbers(op, "w", w)
    right = w.dim() == 4 and all(size >= 1 for size in w.shape)
    expected = "kernels w of shape (adapters, m, n, b), each >= 1"
    _check(op, right, lambda: f"expected {expected}, got {_text(w.shape)}")


def _check_rows(op: str, name: str, t: Tensor) -> None:
    expected = f"{name} of shape (rows, ..., features)"
    _check(op, t.dim() >= 2, lambda: f"expected {expected}, got {_text(t.shape)}")


def _check_index(op: str, name: str, a: Tensor, index: Tensor) -> None:
    """Check which kernel of a stack each row takes, but for the entries, which may be unknown."""
    _check_dense(op, "index", index)
    is_int64 = index.dtype == torch.int64
    _check(op, is_int64, lambda: f"expected index to be int64, got {_name(index.dtype)}")
    if index.device.type != "cpu":
        _check_same_device(op, "index", index, name, a)
    right = index.dim() == 1 and index.shape[0] == a.shape[0]
    expected = f"index of shape ({a.shape[0]},), an entry for each row of {name}"
    _check(op, right, lambda: f"expected {expected}, got {_text(index.shape)}")


def _check_operands(
    op: str, name: str, a: Tensor, w: Tensor, blocks: str, index: Tensor | None = None
) -> None:
    """Check one tensor of activations with a kernel, or with a stack of them and an index.

    ``blocks`` is ``"n"`` or ``"m"``.
    """
    _check_numbers(op, name, a)
    if index is None:
        _check_kernel(op, w)
    else:
        _check_stack(op, w)
    _check_same_device(op, name, a, "w", w)
    if index is None:
        _check_tokens(op, name, a)
    else:
        _check_rows(op, name, a)
    features = w.shape["mn".index(blocks) - 3] * w.shape[-1]
    kernel = "a kernel" if index is None else "kernels"
    _check(
        op,
        a.shape[-1] == features,
        lambda: (
            f"expected {name}.size(-1) == {blocks} * b = {features} for {kernel} of shape "
            f"{_text(w.shape)}, got {a.shape[-1]}"
        ),
    )
    if index is not None:
        _check_index(op, name, a, index)


def _check_prepared(op: str, name: str, w_hat: Tensor, b: int, stack: bool) -> None:
    _check_numbers(op, name, w_hat)
    _check(
        op,
        w_hat.dtype in (torch.float32, torch.float64),
        lambda: (
            f"expected {name} in float32 or float64, as c3a.prepare makes it, got "
            f"{_name(w_hat.dtype)}"
        ),
    )
    blocks = w_hat.dim() == (4 if stack else 3) and all(size >= 1 for size in w_hat.shape[:-1])
    expected = f"a prepared kernel {name} of shape (m, n, numbers)"
    if stack:
        expected = f"prepared kernels {name} of shape (adapters, m, n, numbers)"
    _check(op, blocks, lambda: f"expected {expected}, got {_text(w_hat.shape)}")
    length = prepared_length(w_hat.shape[-3], w_hat.shape[-2], b, w_hat.device)
    _check(
        op,
        w_hat.shape[-1] == length,
        lambda: (
            f"expected {name}.size(-1) == {length}, as c3a.prepare makes it for block_size = {b} "
            f"on this device, got {w_hat.shape[-1]}"
        ),
    )


def _check_product(
    op: str,
    x: Tensor,
    w_hat: Tensor,
    b: int,
    w_hat_transposed: Tensor | None,
    index: Tensor | None = None,
) -> int:
    """Check activations and a prepared kernel, or a stack of them; return the result's features."""
    _check_numbers(op, "x", x)
    stack = index is not None
    if stack:
        _check_rows(op, "x", x)
    else:
        _check_tokens(op, "x", x)
    features = x.shape[-1]
    rule = "1 <= block_size <= x.size(-1)"
    right = b >= 1 and (b == 1 or b <= features)
    _check(op, right, lambda: f"expected {rule} = {features}, got {b}")
    _check_prepared(op, "w_hat", w_hat, b, stack)
    _check_same_device(op, "x", x, "w_hat", w_hat)
    *adapters, m, n, _ = w_hat.shape
    kernel = "prepared kernels" if stack else "a prepared kernel"
    _check(
        op,
        x.shape[-1] == n * b,
        lambda: (
            f"expected x.size(-1) == n * block_size = {n * b} for {kernel} of shape "
            f"{_text(w_hat.shape)}, got {x.shape[-1]}"
        ),
    )
    _check_wide_enough(op, "x", x, w_hat)
    if w_hat_transposed is not None:
        t = w_hat_transposed
        _check_prepared(op, "w_hat_transposed", t, b, stack)
        _check_same_device(op, "w_hat", w_hat, "w_hat_transposed", t)
        sizes = (*adapters, n, m)
        mirrored = all(p == q for p, q in zip(t.shape[:-1], sizes, strict=True))
        rule = f"w_hat_transposed of shape (n, m, numbers) with n = {n} and m = {m}"
        if stack:
            rule = (
                "w_hat_transposed of shape (adapters, n, m, numbers) with adapters = "
                f"{adapters[0]}, n = {n} and m = {m}"
            )
        _check(op, mirrored, lambda: f"expected {rule}, got {_text(t.shape)}")
        rule = "w_hat and w_hat_transposed of one dtype"
        got = f"{_name(w_hat.dtype)} and {_name(t.dtype)}"
        _check(op, t.dtype == w_hat.dtype, lambda: f"expected {rule}, got {got}")
    if index is not None:
        _check_index(op, "x", x, index)
    return m * b


def _check_multiple(op: str, name: str, features: int, b: int) -> None:
    rule = f"{name}.size(-1) to be a positive multiple of block_size = {b}"
    right = features >= b and features % b == 0
    _check(op, right, lambda: f"expected {rule}, got {features}")


def _check_wide_enough(op: str, name: str, a: Tensor, w_hat: Tensor) -> None:
    wide = a.dtype != torch.float64 or w_hat.dtype == torch.float64
    rule = f"expected w_hat in float64, as {name} is: c3a.prepare(w, torch.float64)"
    _check(op, wide, lambda: rule)


# What each operator returns for fake tensors.


def forward(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    _check_operands("block_circ_conv", "x", x, w, "n")
    return x.new_empty((*x.shape[:-1], w.shape[0] * w.shape[2]))


def add(base: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    op = "block_circ_conv_add"
    _check_operands(op, "x", x, w, "n")
    _check_base(op, base, x, w.shape[0] * w.shape[2])
    return base.new_empty(base.shape)


def add_(base: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> None:
    op = "block_circ_conv_add_"
    _check_operands(op, "x", x, w, "n")
    _check_base(op, base, x, w.shape[0] * w.shape[2])
    _check_writable(op, base)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, scale: float = 1.0) -> Tensor:
    op = "block_circ_conv_linear"
    _check_operands(op, "x", x, w, "n")
    m, n, b = w.shape
    _check_numbers(op, "weight", weight)
    _check_same_device(op, "weight", weight, "x", x)
    right = weight.dim() == 2 and weight.shape[0] == m * b and weight.shape[1] == n * b
    rule = f"weight of shape {_text((m * b, n * b))}, as the kernel's"
    _check(op, right, lambda: f"expected {rule}, got {_text(weight.shape)}")
    if bias is not None:
        got = bias
        _check_numbers(op, "bias", bias)
        _check_same_device(op, "bias", bias, "x", x)
        right = bias.dim() == 1 and bias.shape[0] == m * b
        rule = f"bias of shape {_text((m * b,))}"
        _check(op, right, lambda: f"expected {rule}, got {_text(got.shape)}")
        rule = f"bias in {_name(weight.dtype)}, as weight is"
        same = bias.dtype == weight.dtype
        _check(op, same, lambda: f"expected {rule}, got {_name(got.dtype)}")
    return weight.new_empty((*x.shape[:-1], m * b))


def input_grad(g: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    _check_operands("block_circ_conv_input_grad", "grad_output", g, w, "m")
    return g.new_empty((*g.shape[:-1], w.shape[1] * w.shape[2]))


def kernel_grad(
    g: Tensor, x: Tensor, block_size: int, dtype: torch.dtype | None = None, scale: float = 1.0
) -> Tensor:
    return _kernel_grad("block_circ_conv_kernel_grad", g, x, block_size, dtype, None, ())


def _kernel_grad(
    op: str,
    g: Tensor,
    x: Tensor,
    block_size: int,
    dtype: torch.dtype | None,
    index: Tensor | None,
    stack: tuple[int, ...],
) -> Tensor:
    _check_numbers(op, "grad_output", g)
    _check_numbers(op, "x", x)
    _check_same_device(op, "grad_output", g, "x", x)
    _check(op, block_size >= 1, lambda: f"expected block_size >= 1, got {block_size}")
    for adapters in stack:
        _check(op, adapters >= 1, lambda: f"expected adapters >= 1, got {stack[0]}")
    if index is None:
        _check_tokens(op, "grad_output", g)
    else:
        _check_rows(op, "grad_output", g)
    _check_tokens(op, "x", x)
    _check_same_leading(op, g, x)
    for name, a in (("grad_output", g), ("x", x)):
        _check_multiple(op, name, a.shape[-1], block_size)
    if index is not None:
        _check_index(op, "x", x, index)
    dtype = dtype or g.dtype
    _check_supported(op, "dtype", dtype)
    shape = (*stack, g.shape[-1] // block_size, x.shape[-1] // block_size, block_size)
    return g.new_empty(shape, dtype=dtype)


def _check_pair(op: str, g: Tensor, x: Tensor, w: Tensor) -> None:
    _check_operands(op, "x", x, w, "n")
    _check_operands(op, "grad_output", g, w, "m")
    _check_same_device(op, "grad_output", g, "x", x)
    _check_same_leading(op, g, x)


def backward(g: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    _check_pair("block_circ_conv_backward", g, x, w)
    return x.new_empty(x.shape), w.new_empty(w.shape)


def backward_add_(dx: Tensor, g: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    op = "block_circ_conv_backward_add_"
    _check_pair(op, g, x, w)
    _check_base(op, dx, x, x.shape[-1], "grad_input")
    _check_writable(op, dx, "grad_input")
    return w.new_empty(w.shape)


def prepare(
    w: Tensor, dtype: torch.dtype | None = None, transposed: bool = False, scale: float = 1.0
) -> Tensor:
    op = "prepare"
    _check_numbers(op, "w", w)
    right = w.dim() >= 3 and all(size >= 1 for size in w.shape[-3:])
    expected = "kernels w of shape (..., m, n, b) with m, n, b >= 1"
    _check(op, right, lambda: f"expected {expected}, got {_text(w.shape)}")
    dtype = dtype or sums_dtype(w.dtype)
    narrow = dtype in (torch.float32, torch.bfloat16) and w.dtype != torch.float64
    _check(
        op,
        dtype == torch.float64 or narrow,
        lambda: (
            "expected dtype to be float32 or bfloat16, or float64 for kernels in float64 too, got "
            f"{_name(dtype)} for w in {_name(w.dtype)}"
        ),
    )
    *stack, m, n, b = w.shape
    blocks = (n, m) if transposed else (m, n)
    length = prepared_length(m, n, b, w.device)
    return w.new_empty((*stack, *blocks, length), dtype=sums_dtype(dtype))


def prepared(
    x: Tensor, w_hat: Tensor, block_size: int, w_hat_transposed: Tensor | None = None
) -> Tensor:
    features = _check_product("block_circ_conv_prepared", x, w_hat, block_size, w_hat_transposed)
    return x.new_empty((*x.shape[:-1], features))


def prepared_add(
    base: Tensor,
    x: Tensor,
    w_hat: Tensor,
    block_size: int,
    w_hat_transposed: Tensor | None = None,
) -> Tensor:
    op = "block_circ_conv_prepared_add"
    _check_base(op, base, x, _check_product(op, x, w_hat, block_size, w_hat_transposed))
    _check_wide_enough(op, "base", base, w_hat)
    return base.new_empty(base.shape)


def prepared_add_(
    base: Tensor,
    x: Tensor,
    w_hat: Tensor,
    block_size: int,
    w_hat_transposed: Tensor | None = None,
) -> None:
    op = "block_circ_conv_prepared_add_"
    _check_base(op, base, x, _check_product(op, x, w_hat, block_size, w_hat_transposed))
    _check_wide_enough(op, "base", base, w_hat)
    _check_writable(op, base)


def many(x: Tensor, w: Tensor, index: Tensor, scale: float = 1.0) -> Tensor:
    _check_operands("block_circ_conv_many", "x", x, w, "n", index)
    return x.new_empty((*x.shape[:-1], w.shape[1] * w.shape[3]))


def many_add_(base: Tensor, x: Tensor, w: Tensor, index: Tensor, scale: float = 1.0) -> None:
    op = "block_circ_conv_many_add_"
    _check_operands(op, "x", x, w, "n", index)
    _check_base(op, base, x, w.shape[1] * w.shape[3])
    _check_writable(op, base)


def many_input_grad(g: Tensor, w: Tensor, index: Tensor, scale: float = 1.0) -> Tensor:
    _check_operands("block_circ_conv_many_input_grad", "grad_output", g, w, "m", index)
    return g.new_empty((*g.shape[:-1], w.shape[2] * w.shape[3]))


def many_kernel_grad(
    g: Tensor,
    x: Tensor,
    index: Tensor,
    adapters: int,
    block_size: int,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> Tensor:
    op = "block_circ_conv_many_kernel_grad"
    return _kernel_grad(op, g, x, block_size, dtype, index, (adapters,))


def many_prepared(
    x: Tensor,
    w_hat: Tensor,
    index: Tensor,
    block_size: int,
    w_hat_transposed: Tensor | None = None,
) -> Tensor:
    op = "block_circ_conv_many_prepared"
    features = _check_product(op, x, w_hat, block_size, w_hat_transposed, index)
    return x.new_empty((*x.shape[:-1], features))


def many_prepared_add_(
    base: Tensor,
    x: Tensor,
    w_hat: Tensor,
    index: Tensor,
    block_size: int,
    w_hat_transposed: Tensor | None = None,
) -> None:
    op = "block_circ_conv_many_prepared_add_"
    _check_base(op, base, x, _check_product(op, x, w_hat, block_size, w_hat_transposed, index))
    _check_wide_enough(op, "base", base, w_hat)
    _check_writable(op, base)
