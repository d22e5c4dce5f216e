"""The k-th largest of numbers in pieces, against sorting."""

from __future__ import annotations

import pytest
import torch

from fedmerge.edits.largest import kth_largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [torch.rand, lambda n, **k: torch.randn(n, **k).exp(), torch.zeros, torch.ones])
def test_it_is_what_sorting_says(make, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        numbers = make(1000, dtype=dtype)
    numbers[::7] = 0
    ordered = numbers.sort(descending=True).values
    for k in (1, 2, 17, 500, 857, 858, 1000):
        assert kth_largest(lambda: numbers.split(300), k) == ordered[k - 1]


def test_the_largest_and_smallest_numbers_there_are():
    numbers = torch.tensor([3e38, 1e-45, 0.0, 1.0])
    assert [kth_largest(lambda: [numbers], k) for k in (1, 2, 3, 4)] == numbers[[0, 3, 1, 2]].tolist()
