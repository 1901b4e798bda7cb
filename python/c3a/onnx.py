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
    and this one): MatMul, Reshape, Transpose and the like, any leading sizes. Sums run in float32
    at least. The kernel stays as it is in the file; what is computed of it alone, a runtime
    computes when it loads the model.

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


def _convolution(x: _Value, w: _Value, scale: float) -> _Value:
    """Return ``scale * block_circ_conv(x, w)`` in the dtype of its sums."""
    import onnx_ir as ir

    op = _opset()
    if w.shape is None or not w.shape.is_static():
        raise ValueError(f"c3a.onnx: expected a kernel of static shape (m, n, b), got {w.shape}")
    m, n, b = w.shape.numpy()
    dtype = ir.DataType.DOUBLE if ir.DataType.DOUBLE in (x.dtype, w.dtype) else ir.DataType.FLOAT
    tokens = op.Reshape(_cast(x, dtype), [-1, n * b])
    bins = b // 2 + 1
    multiplications = 2 * bins * b * (m + n) + 4 * bins * m * n  # by bins, of a token
    by_bins = multiplications < m * n * b * b
    product = _product_of_bins if by_bins else _dense_product
    y = product(tokens, op.Mul(_cast(w, dtype), _constant(scale, dtype)), dtype, m, n, b)
    features = op.Constant(value_ints=[m * b])
    y = op.Reshape(y, op.Concat(op.Shape(x, end=-1), features, axis=0))
    y.dtype = dtype
    return y


def _dense_product(x: _Value, w: _Value, _dtype: Any, m: int, n: int, b: int) -> _Value:
    op = _opset()
    # Row u of the periodic kernel in rows of 2b - 1 starts at w[-u % b].
    rows = op.Reshape(op.Tile(w, [1, 1, 2 * b - 1]), [m, n, b, 2 * b - 1])
    matrix = op.Transpose(op.Slice(rows, [0], [b], [3]), perm=[1, 3, 0, 2])  # [j, t, i, u]
    return op.MatMul(x, op.Reshape(matrix, [n * b, m * b]))


def _product_of_bins(x: _Value, w: _Value, dtype: Any, m: int, n: int, b: int) -> _Value:
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

    w_hat = op.Reshape(op.MatMul(w, op.Transpose(transform, perm=[1, 0])), [m, n, bins, 2])
    # The kernel's conjugate times a number, as a real matrix: re, im; -im, re.
    w_hat = op.MatMul(w_hat, _constant([[1, 0, 0, 1], [0, 1, -1, 0]], dtype))
    w_hat = op.Transpose(op.Reshape(w_hat, [m, n, bins, 2, 2]), perm=[2, 3, 0, 4, 1])
    w_hat = op.Reshape(w_hat, [bins, 2 * m, 2 * n])

    x = op.Reshape(op.Transpose(x, perm=[1, 0]), [n, b, -1])
    x_hat = op.Reshape(op.MatMul(transform, x), [n, bins, 2, -1])
    x_hat = op.Reshape(op.Transpose(x_hat, perm=[1, 2, 0, 3]), [bins, 2 * n, -1])
    y_hat = op.Reshape(op.MatMul(w_hat, x_hat), [bins, 2, m, -1])
    y_hat = op.Reshape(op.Transpose(y_hat, perm=[2, 0, 1, 3]), [m, 2 * bins, -1])
    y = op.Reshape(op.MatMul(inverse, y_hat), [m * b, -1])
    return op.Transpose(y, perm=[1, 0])


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
