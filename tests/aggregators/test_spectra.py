"""The largest singular directions, against a full decomposition."""

from __future__ import annotations

import pytest
import torch

from fedmerge.aggregators.spectra import leading


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (5, 5)])
@pytest.mark.parametrize("most", [1, 3, 4, None])
def test_they_are_those_of_a_full_decomposition(shape, most):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = leading(matrix, most)
    whole = torch.linalg.svdvals(matrix)
    assert torch.allclose(values, whole[:most], rtol=1e-10)
    # Signs of vectors are arbitrary, what they span together is not.
    assert torch.allclose(left.T @ matrix @ right, torch.diag(values), atol=1e-10)
    assert torch.allclose(left.T @ left, torch.eye(len(values), dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("most", [1, 2, 9])
def test_directions_without_length_are_left_out(most):
    matrix = torch.outer(torch.arange(8.0), torch.ones(6))
    left, values, right = leading(matrix, most)
    assert (left.shape, len(values), right.shape) == ((8, 1), 1, (6, 1))
