"""What methods say of layers that nobody measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedmerge


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


def models(count=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [Gated() for _ in range(count)]


def loaders(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        [(torch.randn(8, 3, 3, generator=generator), torch.randint(0, 3, (8,), generator=generator))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("method", ["regmean", "mats", "fedlpa", "maecho"])
def test_layers_without_curvature_are_averaged_and_named(method, caplog):
    clients = models()
    merged = fedmerge.merge(clients, method, clients=loaders())
    assert "gru.weight_ih_l0, gru.weight_hh_l0: averaged" in caplog.text
    assert "out.weight" not in caplog.text
    mean = torch.stack([m.gru.weight_hh_l0.detach() for m in clients]).mean(0)
    torch.testing.assert_close(merged.gru.weight_hh_l0.detach(), mean)
    assert not torch.allclose(merged.out.weight, torch.stack([m.out.weight.detach() for m in clients]).mean(0))


@pytest.mark.parametrize("method", ["fedfisher", "fisher", "gradient_matching"])
def test_methods_with_a_diagonal_need_no_such_layers(method, caplog):
    clients = models()
    merged = fedmerge.merge(clients, method, clients=loaders(), base=models(4)[3])
    assert "averaged" not in caplog.text
    mean = torch.stack([m.gru.weight_hh_l0.detach() for m in clients]).mean(0)
    assert not torch.allclose(merged.gru.weight_hh_l0, mean)


def test_a_client_without_some_class_and_one_with_a_single_example():
    generator = torch.Generator().manual_seed(2)
    first = [(torch.randn(8, 3, 3, generator=generator), torch.zeros(8, dtype=torch.long))]
    last = [(torch.randn(1, 3, 3, generator=generator), torch.tensor([2]))]
    for method in ("fedfisher", "regmean", "mats", "fedlpa", "maecho", "fisher"):
        merged = fedmerge.merge(models(2), method, clients=[first, last], weights=[8, 1])
        assert all(torch.isfinite(p).all() for p in merged.parameters())
