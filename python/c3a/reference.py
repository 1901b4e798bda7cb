"""The dense definition of the operator. Merging uses it, and the tests compare against it."""

import torch
from torch import Tensor

from .shapes import SUPPORTED_DTYPES
from .sizes import check_block_size, kernel_shape

_MOST_NUMBERS = 2**22  # of a matrix that are looked at together


def circulant(w: Tensor) -> Tensor:
    """Return the dense matrix of a block-circulant kernel.

    Args:
        w: kernel of shape ``(m, n, b)``, any dtype.

    Returns:
        ``D`` of shape ``(m*b, n*b)`` in ``w``'s dtype, with
        ``D[i*b + u, j*b + t] = w[i, j, (t - u) % b]``, so that
        ``block_circ_conv(x, w) == x @ D.T``. Differentiable in ``w``.

    Raises:
        ValueError: ``w`` has not 3 dimensions.

    Source: C3A (arXiv:2407.19342), sections 3.2 and 3.4: the first row of each block is its kernel,
    and each row equals the one above shifted right by one.

    >>> import c3a, torch
    >>> c3a.circulant(torch.tensor([[[1, 2, 3]]]))
    tensor([[1, 2, 3],
            [3, 1, 2],
            [2, 3, 1]])
    """
    if w.dim() != 3:
        raise ValueError(f"c3a.circulant: expected w of shape (m, n, b), got {tuple(w.shape)}")
    m, n, b = w.shape
    position = torch.arange(b, device=w.device)
    index = (position[None, :] - position[:, None]) % b  # [u, t] -> t - u
    rows = w.unsqueeze(1).expand(m, b, n, b)
    return rows.gather(-1, index[None, :, None, :].expand(m, b, n, b)).reshape(m * b, n * b)


def nearest_kernel(delta: Tensor, block_size: int, *, pad: bool = False) -> tuple[Tensor, Tensor]:
    """Return the kernel whose block-circulant matrix is nearest to a matrix, and how near.

    Each number of the kernel is the mean of the matrix along one wrapped diagonal of one block,
    which is the nearest in the Frobenius norm: the inverse of ``circulant`` where there is one. A
    layer adds ``scale * circulant(c3a_kernel)``, so its kernel for ``delta`` is ``kernel / scale``.

    Args:
        delta: matrices of shape ``(..., out, in)``, any floating-point dtype; not changed.
        block_size: ``b``, divides ``out`` and ``in``.
        pad: allow any block size; the kernel then is the nearest on the matrix that it covers.

    Returns:
        ``(kernel, error)``: kernels of shape ``(..., m, n, b)`` in ``delta``'s dtype, float32 at
        least, and ``norm(delta - circulant(kernel)) / norm(delta)`` of shape ``(...)``; of zeros 0.

    Raises:
        ValueError: another shape or dtype, or a block size that does not fit.

    >>> import c3a, torch
    >>> w = torch.randn(2, 3, 4)
    >>> kernel, error = c3a.nearest_kernel(c3a.circulant(w), 4)
    >>> torch.allclose(kernel, w), float(error) < 1e-6
    (True, True)
    >>> kernel, error = c3a.nearest_kernel(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), 2)
    >>> kernel
    tensor([[[2., 3.]]])
    """
    who = "c3a.nearest_kernel"
    if delta.dim() < 2 or 0 in delta.shape[-2:]:
        raise ValueError(
            f"{who}: expected delta of shape (..., out, in), of at least 1 each, got "
            f"{tuple(delta.shape)}"
        )
    if delta.dtype not in SUPPORTED_DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        got = str(delta.dtype).removeprefix("torch.")
        raise ValueError(f"{who}: expected delta in one of {dtypes}, got {got}")
    rows, columns = delta.shape[-2:]
    try:
        check_block_size(block_size, columns, rows, pad)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    m, n, b = kernel_shape(columns, rows, int(block_size))
    blocks = torch.nn.functional.pad(delta, (0, n * b - columns, 0, m * b - rows))
    blocks = blocks.unflatten(-1, (n, b)).unflatten(-3, (m, b)).flatten(0, -4)
    in_rows, in_columns = (
        torch.arange(count * b, device=delta.device).view(count, b) < features
        for count, features in ((m, rows), (n, columns))
    )
    in_rows = in_rows[:, :, None, None].repeat(blocks.shape[0] // m, 1, 1, 1)
    in_columns = _wrapped(in_columns.expand(b, n, b))
    at_once = max(1, _MOST_NUMBERS // (b * n * b))
    kernels, left, whole = [], [], []
    for part, some in zip(blocks.split(at_once), in_rows.split(at_once), strict=True):
        along, there = _wrapped(part.double()), some & in_columns
        mean = along.sum(1) / there.sum(1).clamp(min=1)
        kernels.append(mean)
        left.append(((along - mean.unsqueeze(1)) * there).square().sum((1, 2, 3)))
        whole.append(along.square().sum((1, 2, 3)))
    stack = delta.shape[:-2]
    rest, norm = (torch.cat(parts).reshape(*stack, m).sum(-1) for parts in (left, whole))
    dtype = torch.promote_types(delta.dtype, torch.float32)
    share = (rest / norm.where(norm != 0, 1)).sqrt()
    return torch.cat(kernels).reshape(*stack, m, n, b).to(dtype), share.to(dtype)


def _wrapped(blocks: Tensor) -> Tensor:
    """Return ``[..., u, j, s]``, which is ``blocks[..., u, j, (u + s) % b]``."""
    twice = torch.cat([blocks, blocks], -1)
    *stack, row, column, _ = twice.stride()
    return twice.as_strided(blocks.shape, (*stack, row + 1, column, 1))


def singular_values(w: Tensor) -> Tensor:
    """Return the ``min(m, n) * b`` singular values of ``circulant(w)``, descending, in float64.

    The unitary DFT block-diagonalises the matrix: they are the singular values of the ``b`` complex
    matrices of shape ``(m, n)`` that the spectra of the blocks form, one per frequency bin.
    """
    bins = torch.fft.fft(w.double()).permute(2, 0, 1)
    sigma: Tensor = torch.linalg.svdvals(bins)
    return sigma.flatten().sort(descending=True).values


def rank(w: Tensor) -> int:
    """Return the exact rank of ``circulant(w)``, up to float64 rounding.

    For one block it is the number of non-zero DFT bins of the kernel, conjugates counted:
    ``b - deg gcd(f(z), z^b - 1)`` with ``f`` the kernel's polynomial (paper, section 3.2; Ingleton
    1956). For many blocks it is the sum of the ranks of the bins' matrices.
    """
    m, n, b = w.shape
    sigma = singular_values(w)
    threshold = max(m, n) * b * torch.finfo(torch.float64).eps * sigma[0]
    return int((sigma > threshold).sum())
