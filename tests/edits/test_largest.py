"""The k-th largest of numbers in pieces, against sorting."""

from __future__ import annotations

import pytest
import torch

from fedmerge.edits import delta
from fedmerge.edits.largest import kth_largest
from fedmerge.edits.trim import keep_largest


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


def test_tensors_of_two_precisions_are_compared_by_their_numbers():
    delta = {"single": torch.tensor([3.0, 1.0]), "double": torch.tensor([2.0, 4.0], dtype=torch.float64)}
    kept = keep_largest(delta, 0.5)
    assert kept["single"].tolist() == [3.0, 0.0]
    assert kept["double"].tolist() == [0.0, 4.0]


def test_equal_numbers_stay_in_the_order_of_tensors_and_places():
    delta = {"a": torch.tensor([[1.0, -1.0], [0.5, 2.0]]).T, "b": torch.tensor([1.0, 1.0])}
    kept = keep_largest(delta, 0.5)
    assert kept["a"].tolist() == [[1.0, 0.0], [-1.0, 2.0]]
    assert kept["b"].tolist() == [0.0, 0.0]


def test_equal_numbers_are_counted_on_from_piece_to_piece(monkeypatch):
    monkeypatch.setattr(delta, "PIECE", 2)
    kept = keep_largest({"a": torch.tensor([1.0, 5.0, -1.0, 1.0, 1.0])}, 0.6)
    assert kept["a"].tolist() == [1.0, 5.0, -1.0, 0.0, 0.0]
