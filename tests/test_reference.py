"""The dense definition, singular values and ranks; the docstrings' examples."""

import doctest
import importlib

import pytest
import torch

import c3a
from c3a.reference import rank, singular_values
from cases import SHAPES, operands


@pytest.mark.parametrize("shape", SHAPES[:10], ids=str)
def test_circulant_is_the_definition_entry_by_entry(shape):
    _, w, _ = operands(*shape)
    m, n, b = w.shape
    matrix = c3a.circulant(w)
    assert matrix.shape == (m * b, n * b)
    assert matrix.is_contiguous()
    for i in range(m):
        for j in range(n):
            for u in range(b):
                for t in range(b):
                    assert matrix[i * b + u, j * b + t] == w[i, j, (t - u) % b]


def test_circulant_names_a_wrong_shape():
    with pytest.raises(ValueError, match=r"expected w of shape \(m, n, b\), got \(3, 4\)"):
        c3a.circulant(torch.ones(3, 4))


def test_circulant_is_differentiable():
    w = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(c3a.circulant, w)


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 8), (3, 2, 6)])
def test_singular_values_are_those_of_the_dense_matrix(shape):
    w = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(singular_values(w), torch.linalg.svdvals(c3a.circulant(w)))


def test_rank_counts_the_bins_that_are_not_zero():
    b = 12
    t = torch.arange(b, dtype=torch.float64)
    wave = torch.cos(2 * torch.pi * 3 * t / b)  # bins 3 and 9
    for w, expected in (
        (torch.zeros(b), 0),
        (torch.ones(b), 1),
        (wave, 2),
        (wave + 1, 3),
        (torch.eye(b)[0], b),
    ):
        assert rank(w.view(1, 1, b)) == expected
    assert rank(wave.expand(2, 3, b)) == 2
    assert rank(wave.float().view(1, 1, b).double()) == torch.linalg.matrix_rank(
        c3a.circulant(wave.float().view(1, 1, b).double())
    )


@pytest.mark.parametrize("module", ["names", "memory"])
def test_examples_in_docstrings_are_true(module):
    module = importlib.import_module(f"c3a.{module}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
