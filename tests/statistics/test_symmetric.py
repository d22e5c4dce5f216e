"""Second moments are symmetric to the last bit, so that half of a matrix is all of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge.statistics import FisherKfac, Gram
from fedmerge.statistics.head import HeadGradient, HeadSums
from fedmerge.statistics.sending.compression import decode, encode


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 9, 3, groups=3)
        self.lstm, self.fc = nn.LSTM(9, 7, batch_first=True), nn.Linear(7, 10)

    def forward(self, x):
        features = self.grouped(self.conv(x).relu()).flatten(2).transpose(1, 2)
        return self.fc(self.lstm(features)[0][:, -1])


def batches(sizes=(17, 5)):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 1, 9, 9, generator=generator), torch.randint(0, 10, (n,), generator=generator)) for n in sizes
    ]


@pytest.mark.parametrize(
    "statistic", [Gram(), FisherKfac(), FisherKfac(estimator="empirical"), HeadSums(), HeadGradient()]
)
def test_measured_factors_are_symmetric_and_lose_nothing_packed(statistic):
    torch.manual_seed(0)
    value = statistic.measure(Grouped(), batches(), None)
    square = {n: t for n, t in value.items() if t.ndim > 1 and t.shape[-1] == t.shape[-2] and not n.endswith(".diag")}
    assert square
    for name, tensor in square.items():
        assert torch.equal(tensor, tensor.transpose(-1, -2)), name
    sent, error = encode(value, "none", 0)
    assert error == 0
    assert all(torch.equal(tensor, value[name]) for name, tensor in decode(sent).items())
    assert sum(t.nbytes for t in sent.values()) < sum(t.nbytes for t in value.values())


def test_a_matrix_that_is_symmetric_to_rounding_only_travels_whole():
    matrix = torch.eye(3)
    matrix[0, 1] = 1e-7
    sent, error = encode({"A": matrix}, "none", 0)
    assert error == 0
    assert torch.equal(decode(sent)["A"], matrix)
