"""The dense definition of the operator. Merging uses it, and the tests compare against it."""

import torch
from torch import Tensor


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
