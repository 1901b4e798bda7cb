"""The operators in standard ONNX, for ``torch.onnx.export``.

The transform is a product with a matrix of cosines and sines, and tokens come last, so that all
moves are of rows. Why not ONNX's DFT: DESIGN.md, "Exported".
"""

import math
from collections.abc import Callable
from typing import Any

from ._library import OPS as _OPS

_Value = Any  # of onnx_ir, which is an extra


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what ``torch.onnx.export`` takes as ``custom_translation_table``.

    For ``block_circ_conv`` and ``block_circ_conv_add`` (an exported ``C3ALinear`` is a linear layer
    and this one, and so is ``block_circ_conv_linear``) and ``block_circ_conv_many``: MatMul,
    Reshape, Transpose, Gather and the like, any leading sizes. Sums run in float32 at least. The
    kernel stays as it is in the file; what is computed of it alone, a runtime computes when it
    loads the model. Not translated, which is an error that names them: operators with prepared
    kernels, whose layout is a device's own, those that write in place, and the gradients'.

    Raises:
        ImportError: onnxscript is missing.

    >>> import c3a.onnx, torch
    >>> layer = c3a.C3ALinear(torch.nn.Linear(64, 32), block_size=16)
    >>> program = torch.onnx.export(
    ...     layer.eval(),
    ...     (torch.randn(2, 64),),
    ...     dynamic_shapes=({0: "batch"},),
    ...     custom_translation_table=c3a.onnx.translations(),
    ...     verbose=False,
    ... )
    >>> program.save("layer.onnx")
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"c3a.onnx: torch.onnx.export needs onnxscript ({error}); pip install 'c3a[onnx]'"
        ) from error
    return {
        _OPS.block_circ_conv.default: _block_circ_conv,
        _OPS.block_circ_conv_add.default: _block_circ_conv_add,
        _OPS.block_circ_conv_many.default: _block_circ_conv_many,
    }


def _opset() -> Any:
    """Return ONNX's operators; a call adds one to the graph that is being exported."""
    from onnxscript import opset18

    return opset18


def _block_circ_conv(x: _Value, w: _Value, scale: float = 1.0) -> _Value:
    return _cast(_convolution(x, w, scale), x.dtype)


def _block_circ_conv_add(base: _Value, x: _Value, w: _Value, scale: float = 1.0) -> _Value:
    op = _opset()
    delta = _convolution(x, w, scale)
    return _cast(op.Add(_cast(base, delta.dtype), delta), base.dtype)


def _block_circ_conv_many(x: _Value, w: _Value, index: _Value, scale: float = 1.0) -> _Value:
    return _cast(_convolution(x, w, scale, index), x.dtype)


def _convolution(x: _Value, w: _Value, scale: float, index: _Value | None = None) -> _Value:
    """Return ``scale * block_circ_conv(x, w)`` in the dtype of its sums.

    With an index, ``w`` is a stack of kernels for the rows of ``x``.
    """
    import onnx_ir as ir

    op = _opset()
    if w.shape is None or not w.shape.is_static():
        expected = "(m, n, b)" if index is None else "(adapters, m, n, b)"
        raise ValueError(f"c3a.onnx: expected a kernel of static shape {expected}, got {w.shape}")
    m, n, b = w.shape.numpy()[-3:]
    dtype = ir.DataType.DOUBLE if ir.DataType.DOUBLE in (x.dtype, w.dtype) else ir.DataType.FLOAT
    w = op.Mul(_cast(w, dtype), _constant(scale, dtype))
    bins = b // 2 + 1
    multiplications = 2 * bins * b * (m + n) + 4 * bins * m * n  # by bins, of a token
    if index is None and multiplications >= m * n * b * b:
        y = _dense_product(_cast(x, dtype), w, m, n, b)
    else:  # a row's dense matrix may not fit into memory, its spectra do
        y = _product_of_bins(_cast(x, dtype), w, index, dtype, m, n, b)
    y = _reshaped(y, op.Shape(x, end=-1), m * b)
    y.dtype = dtype
    return y


def _dense_product(x: _Value, w: _Value, m: int, n: int, b: int) -> _Value:
    op = _opset()
    # Row u of the periodic kernel in rows of 2b - 1 starts at w[-u % b].
    rows = _reshaped(op.Tile(w, [1, 1, 2 * b - 1]), m, n, b, 2 * b - 1)
    matrix = op.Transpose(op.Slice(rows, [0], [b], [3]), perm=[1, 3, 0, 2])  # [j, t, i, u]
    return op.MatMul(_reshaped(x, -1, n * b), _reshaped(matrix, n * b, m * b))


def _product_of_bins(
    x: _Value, w: _Value, index: _Value | None, dtype: Any, m: int, n: int, b: int
) -> _Value:
    """Return the product of a stack of kernels, chosen by row; without an index, of one kernel."""
    op = _opset()
    bins = b // 2 + 1
    # Real and imaginary part of each bin, for each position: (2 * bins, b).
    turn = 2 * math.pi / b
    transform = _constant(
        [
            [part(turn * (k * t % b)) for t in range(b)]
            for k in range(bins)
            for part in (math.cos, _minus_sin)
        ],
        dtype,
    )
    # What the inverse of a real transform counts twice: all bins but the real ones.
    weights = [(1 if 2 * k % b == 0 else 2) / b for k in range(bins) for _ in range(2)]
    inverse = op.Mul(op.Transpose(transform, perm=[1, 0]), _constant([weights], dtype))

    w_hat = _reshaped(op.MatMul(w, op.Transpose(transform, perm=[1, 0])), -1, m, n, bins, 2)
    # The kernel's conjugate times a number, as a real matrix: re, im; -im, re.
    w_hat = op.MatMul(w_hat, _constant([[1, 0, 0, 1], [0, 1, -1, 0]], dtype))
    w_hat = op.Transpose(_reshaped(w_hat, -1, m, n, bins, 2, 2), perm=[0, 3, 4, 1, 5, 2])
    w_hat = _reshaped(w_hat, -1, bins, 2 * m, 2 * n)

    rows: Any = 1
    tokens: Any = -1
    if index is not None:  # with sizes of its own, since -1 would be unknown where there is no row
        w_hat = op.Gather(w_hat, index, axis=0)
        rows = op.Shape(x, start=0, end=1)
        inner = op.Concat(op.Shape(x, start=1, end=-1), op.Constant(value_ints=[1]), axis=0)
        tokens = op.ReduceProd(inner, keepdims=1)
    x = op.Transpose(_reshaped(x, rows, tokens, n * b), perm=[0, 2, 1])
    x_hat = op.MatMul(transform, _reshaped(x, rows, n, b, tokens))
    x_hat = op.Transpose(_reshaped(x_hat, rows, n, bins, 2, tokens), perm=[0, 2, 3, 1, 4])
    y_hat = op.MatMul(w_hat, _reshaped(x_hat, rows, bins, 2 * n, tokens))
    y_hat = op.Transpose(_reshaped(y_hat, rows, bins, 2, m, tokens), perm=[0, 3, 1, 2, 4])
    y = op.MatMul(inverse, _reshaped(y_hat, rows, m, 2 * bins, tokens))
    y = op.Transpose(_reshaped(y, rows, m * b, tokens), perm=[0, 2, 1])
    if index is None:
        return y
    has_none = op.Less(op.Reshape(index, [-1, 1, 1]), op.Constant(value_ints=[0]))
    return op.Where(has_none, _constant(0.0, dtype), y)


def _reshaped(value: _Value, *sizes: Any) -> _Value:
    """Reshape to sizes that are numbers, or values of one dimension that hold some."""
    op = _opset()
    if all(isinstance(size, int) for size in sizes):
        return op.Reshape(value, list(sizes))
    parts = [op.Constant(value_ints=[s]) if isinstance(s, int) else s for s in sizes]
    return op.Reshape(value, op.Concat(*parts, axis=0), allowzero=1)


def _minus_sin(angle: float) -> float:
    return -math.sin(angle)


def _constant(value: Any, dtype: Any) -> _Value:
    import onnx_ir as ir

    return _opset().Constant(value=ir.tensor(value, dtype=dtype))


def _cast(value: _Value, dtype: Any) -> _Value:
    if value.dtype == dtype:
        return value
    cast = _opset().Cast(value, to=dtype)
    cast.dtype = dtype
    return cast
