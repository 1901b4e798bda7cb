"""The operators as functions, with their documentation."""

import torch
from torch import Tensor

from . import operators  # noqa: F401  (their rules, without which they have no gradients)
from ._library import OPS as _OPS
from .autograd import typed_errors


@typed_errors
def block_circ_conv(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply every token by a block-circulant matrix.

    Equivalent to ``scale * x @ c3a.circulant(w).T``, by real FFTs in ``O(b log b)`` a block:
    ``y_i = sum_j C(w_ij) x_j`` with ``C(w)[u, t] = w[(t - u) % b]``.

    Args:
        x: activations of shape ``(..., n*b)``: float64, float32, bfloat16 or float16.
        w: kernel of shape ``(m, n, b)``, any of these dtypes, on the same device.
        scale: factor of the result, applied before it is rounded to ``x``'s dtype.

    Returns:
        ``y`` of shape ``(..., m*b)``, contiguous, in ``x``'s dtype. Sums run in float32 (float64 if
        an operand is float64) and are rounded once.

    Raises:
        RuntimeError: a shape, dtype or device breaks a rule; the message names rule and values.

    Differentiable any number of times in both arguments, in reverse and forward mode; works under
    ``torch.vmap``, ``torch.compile`` and autocast (inputs are taken as they are, and the result has
    autocast's dtype). Saves ``x`` only if ``w`` needs a gradient, ``w`` only if ``x`` does.

    Source: C3A (arXiv:2407.19342), sections 3.2 to 3.4. The input gradient is the transpose, where
    the paper's section 3.3 has it wrong.

    >>> import c3a, torch
    >>> w = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> c3a.block_circ_conv(torch.tensor([1.0, 0.0, 0.0]), w)
    tensor([1., 3., 2.])
    """
    y: Tensor = _OPS.block_circ_conv(x, w, scale)
    return y


@typed_errors
def block_circ_conv_add(base: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``base + block_circ_conv(x, w, scale)`` in one pass over the activations.

    Equivalent to ``base + scale * x @ c3a.circulant(w).T``: what an adapted layer computes, without
    a temporary for the adapter's own output.

    Args:
        base: shape ``(..., m*b)`` with ``x``'s leading sizes; any of the dtypes.
        x, w, scale: as for ``block_circ_conv``.

    Returns:
        A new contiguous tensor of ``base``'s shape and dtype. The sum runs in float32 (float64 if
        an operand is float64) and is rounded once.

    Raises:
        RuntimeError: as for ``block_circ_conv``, and for a ``base`` of another shape.

    Differentiable like ``block_circ_conv``, and in ``base``; saves the same. The in-place variant
    ``torch.ops.c3a.block_circ_conv_add_`` writes into ``base``.

    Source: C3A (arXiv:2407.19342), equation of the adapted layer in section 3.2.

    >>> import c3a, torch
    >>> w = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> c3a.block_circ_conv_add(torch.ones(3), torch.tensor([1.0, 0.0, 0.0]), w)
    tensor([2., 4., 3.])
    """
    y: Tensor = _OPS.block_circ_conv_add(base, x, w, scale)
    return y


@typed_errors
def prepare(
    w: Tensor,
    dtype: torch.dtype | None = None,
    *,
    transposed: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Transform kernels once, for many calls of ``block_circ_conv_prepared``.

    Args:
        w: a kernel ``(m, n, b)`` or a stack of kernels ``(..., m, n, b)``, any of the dtypes.
        dtype: float64, which float64 activations need, float32, or bfloat16, which rounds spectra
            on CPUs that multiply bfloat16, and is float32 elsewhere. Default float64 if ``w`` is
            float64, else float32.
        transposed: prepare the transposed matrix, by which the input gradient is computed.
        scale: factor of all results.

    Returns:
        ``w_hat`` of shape ``(..., m, n, numbers)``, or ``(..., n, m, numbers)`` if ``transposed``,
        with about ``b`` numbers a block. ``w_hat[k]`` is what kernel ``k`` alone gives. What is in
        it is the device's affair: use it in this process, on a device of this type, and prepare
        anew whenever ``w`` changes. It takes no gradient.

    Raises:
        RuntimeError: a shape or dtype breaks a rule, or ``w`` requires a gradient (prepare
            ``w.detach()``); the message names rule and values.

    >>> import c3a, torch
    >>> w = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> c3a.block_circ_conv_prepared(torch.tensor([1.0, 0.0, 0.0]), c3a.prepare(w), 3)
    tensor([1., 3., 2.])
    """
    w_hat: Tensor = _OPS.prepare(w, dtype, transposed, scale)
    return w_hat


@typed_errors
def block_circ_conv_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, scale: float = 1.0
) -> Tensor:
    """Return a linear layer of ``x`` plus ``block_circ_conv(x, w, scale)``, for a frozen layer.

    Equivalent to ``F.linear(x, weight, bias) + scale * x @ c3a.circulant(w).T``, as one node of the
    graph: the convolution is added onto the layer's result in place, and in the backward its share
    of the input's gradient onto the layer's. A compiler sees both, and keeps them in place.

    Args:
        x: activations of shape ``(..., n*b)``; the layer computes in ``weight``'s dtype.
        weight: shape ``(m*b, n*b)``.
        bias: shape ``(m*b,)``, in ``weight``'s dtype, or None.
        w, scale: as for ``block_circ_conv``.

    Returns:
        A tensor of shape ``(..., m*b)`` in ``weight``'s dtype.

    Raises:
        RuntimeError: as for ``block_circ_conv``, and for a ``weight`` or ``bias`` of another shape,
            dtype or device.

    Differentiable any number of times in every operand; where ``weight`` or ``bias`` require
    gradients, by two nodes. Under autocast the layer computes in autocast's dtype. Saves ``x`` if
    ``w`` needs a gradient, ``w`` and ``weight`` if ``x`` does.

    Source: C3A (arXiv:2407.19342), equation of the adapted layer in section 3.2.

    >>> import c3a, torch
    >>> w = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> weight, bias = torch.eye(3), torch.ones(3)
    >>> c3a.block_circ_conv_linear(torch.tensor([1.0, 0.0, 0.0]), weight, bias, w)
    tensor([3., 4., 3.])
    """
    y: Tensor = _OPS.block_circ_conv_linear(x, weight, bias, w, scale)
    return y


@typed_errors
def block_circ_conv_prepared(
    x: Tensor, w_hat: Tensor, block_size: int, w_hat_transposed: Tensor | None = None
) -> Tensor:
    """``block_circ_conv`` with a prepared kernel: for inference, and for kernels that are frozen.

    Equivalent to ``scale * x @ c3a.circulant(w).T`` for ``w_hat = c3a.prepare(w, scale=scale)``,
    with the same bits as ``block_circ_conv(x, w, scale)`` on the CPU (for bfloat16 activations,
    with ``c3a.prepare(w, torch.bfloat16)``; spectra in float32 err less). With
    ``c3a.prepare(w, transposed=True)`` in its place it is the input gradient,
    ``g @ c3a.circulant(w)``.

    Args:
        x: activations of shape ``(..., n*b)``; float64 only if ``w_hat`` is.
        w_hat: ``c3a.prepare(w)``, on the same device.
        block_size: ``b``.
        w_hat_transposed: ``c3a.prepare(w, transposed=True)``, if ``x`` requires a gradient.

    Returns:
        ``y`` of shape ``(..., m*b)``, contiguous, in ``x``'s dtype.

    Raises:
        RuntimeError: a rule is broken, ``w_hat`` was not made by ``prepare`` or is a part of what
            it made, the two are not of one ``w`` and ``scale`` (the CPU sees this by what is in
            them, other devices see shapes only), or ``x`` requires a gradient and
            ``w_hat_transposed`` is missing.

    Differentiable any number of times in ``x``, in reverse and forward mode.

    >>> import c3a, torch
    >>> w = torch.randn(2, 3, 8)
    >>> w_hat, w_hat_t = c3a.prepare(w), c3a.prepare(w, transposed=True)
    >>> x = torch.randn(5, 24, requires_grad=True)
    >>> y = c3a.block_circ_conv_prepared(x, w_hat, 8, w_hat_t)
    >>> torch.equal(y, c3a.block_circ_conv(x, w))
    True
    >>> (dx,) = torch.autograd.grad(y.sum(), x)
    """
    y: Tensor = _OPS.block_circ_conv_prepared(x, w_hat, block_size, w_hat_transposed)
    return y


@typed_errors
def block_circ_conv_prepared_add(
    base: Tensor,
    x: Tensor,
    w_hat: Tensor,
    block_size: int,
    w_hat_transposed: Tensor | None = None,
) -> Tensor:
    """Return ``base + block_circ_conv_prepared(x, ...)`` in one pass over the activations.

    Args:
        base: shape ``(..., m*b)`` with ``x``'s leading sizes; float64 only if ``w_hat`` is.
        x, w_hat, block_size, w_hat_transposed: as for ``block_circ_conv_prepared``.

    Returns:
        A new contiguous tensor of ``base``'s shape and dtype. The in-place variant
        ``torch.ops.c3a.block_circ_conv_prepared_add_`` writes into ``base``.

    Raises:
        RuntimeError: as for ``block_circ_conv_prepared``, and for a ``base`` of another shape.

    >>> import c3a, torch
    >>> w_hat = c3a.prepare(torch.tensor([[[1.0, 2.0, 3.0]]]))
    >>> x = torch.tensor([1.0, 0.0, 0.0])
    >>> c3a.block_circ_conv_prepared_add(torch.ones(3), x, w_hat, 3)
    tensor([2., 4., 3.])
    """
    y: Tensor = _OPS.block_circ_conv_prepared_add(base, x, w_hat, block_size, w_hat_transposed)
    return y


@typed_errors
def block_circ_conv_many(x: Tensor, w: Tensor, index: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply every row by a block-circulant matrix of its own choice: many adapters in one batch.

    Equivalent to ``y[r] = block_circ_conv(x[r], w[index[r]], scale)``, with the same bits on the
    CPU, and zeros where ``index[r]`` is -1.

    Args:
        x: activations of shape ``(rows, ..., n*b)``: sequences, or single tokens ``(rows, n*b)``.
        w: a stack of kernels, ``(adapters, m, n, b)``, on the same device. Only those that are
            chosen are transformed.
        index: int64, of shape ``(rows,)``, on ``x``'s device or the CPU: the kernel of each row, -1
            for none. Neighbouring rows with one kernel are computed together.
        scale: factor of the result.

    Returns:
        ``y`` of shape ``(rows, ..., m*b)``, contiguous, in ``x``'s dtype; dtypes of sums are as in
        ``block_circ_conv``.

    Raises:
        RuntimeError: a shape, dtype or device breaks a rule, or an index on the CPU is out of
            range. An index on a GPU is not waited for: there an entry that is too large is torch's
            own device-side assertion, and every negative one is none.

    Differentiable any number of times in ``x`` and ``w``, in reverse and forward mode, like
    ``block_circ_conv``; kernels that no row chooses get zeros. Works under ``torch.vmap``,
    ``torch.compile`` and autocast. ``torch.ops.c3a.block_circ_conv_many_add_(base, x, w, index,
    scale)`` adds the result onto ``base`` in place; rows without a kernel stay as they are.

    On a GPU it is composed of torch's operators, in temporaries of a kernel's spectra for each row,
    64 MiB at a time; it has not run on one yet.

    >>> import c3a, torch
    >>> w = torch.tensor([[[[1.0, 2.0, 3.0]]], [[[10.0, 20.0, 30.0]]]])
    >>> x = torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3)
    >>> c3a.block_circ_conv_many(x, w, torch.tensor([1, -1, 0]))
    tensor([[10., 30., 20.],
            [ 0.,  0.,  0.],
            [ 1.,  3.,  2.]])
    """
    y: Tensor = _OPS.block_circ_conv_many(x, w, index, scale)
    return y


@typed_errors
def block_circ_conv_many_prepared(
    x: Tensor,
    w_hat: Tensor,
    index: Tensor,
    block_size: int,
    w_hat_transposed: Tensor | None = None,
) -> Tensor:
    """``block_circ_conv_many`` with prepared kernels: for serving, and for frozen adapters.

    Equivalent to ``y[r] = block_circ_conv_prepared(x[r], w_hat[index[r]], block_size)``, and zeros
    where ``index[r]`` is -1.

    Args:
        x, index: as for ``block_circ_conv_many``; ``x`` in float64 only if ``w_hat`` is.
        w_hat: ``c3a.prepare`` of a stack of kernels, ``(adapters, m, n, numbers)``, or prepared
            kernels stacked: those that are chosen of one dtype, the others may hold anything.
        block_size: ``b``.
        w_hat_transposed: the same, prepared with ``transposed=True``, if ``x`` requires a gradient.

    Returns:
        ``y`` of shape ``(rows, ..., m*b)``, contiguous, in ``x``'s dtype.

    Raises:
        RuntimeError: as for ``block_circ_conv_prepared`` and ``block_circ_conv_many``.

    Differentiable any number of times in ``x``. ``torch.ops.c3a.block_circ_conv_many_prepared_add_
    (base, x, w_hat, index, block_size)`` adds the result onto ``base`` in place.

    >>> import c3a, torch
    >>> w_hat = c3a.prepare(torch.tensor([[[[1.0, 2.0, 3.0]]], [[[10.0, 20.0, 30.0]]]]))
    >>> x = torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3)
    >>> c3a.block_circ_conv_many_prepared(x, w_hat, torch.tensor([1, -1, 0]), 3)
    tensor([[10., 30., 20.],
            [ 0.,  0.,  0.],
            [ 1.,  3.,  2.]])
    """
    y: Tensor = _OPS.block_circ_conv_many_prepared(x, w_hat, index, block_size, w_hat_transposed)
    return y
