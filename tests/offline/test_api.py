"""fedmerge.merge at the hands of a person."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import BadUpdate, InvalidOption, UnknownName
from tests.federation import tiny_model


def models(count=3):
    found = []
    for i in range(count):
        model = tiny_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(i)
        found.append(model)
    return found


def test_weights_are_relative_and_equal_by_default():
    plain = fedmerge.merge(models())
    heavy = fedmerge.merge(models(), weights=[0.5, 0.25, 0.25])
    start = tiny_model()[0].bias
    torch.testing.assert_close(plain[0].bias, start + 1)
    torch.testing.assert_close(heavy[0].bias, start + 0.75)


def test_the_result_is_a_new_module_like_the_first():
    given = models()
    given[0].eval()
    given[0][0].weight.requires_grad_(False)
    merged = fedmerge.merge(given)
    assert merged is not given[0]
    assert not merged.training
    assert not merged[0].weight.requires_grad
    assert merged[0].weight.data_ptr() != given[0][0].weight.data_ptr()


@pytest.mark.parametrize(
    "statistics",
    [
        [{"local_steps": 4, "momentum": 0.9}, {"local_steps": 8, "momentum": 0.9}],
        [{"local_steps": {"local_steps": 4, "momentum": 0.9}}, {"local_steps": {"local_steps": 8, "momentum": 0.9}}],
        [
            {"local_steps": torch.tensor(4), "momentum": torch.tensor(0.9)},
            {"local_steps": np.int64(8), "momentum": 0.9},
        ],
    ],
)
def test_statistics_may_be_written_flat_or_nested(statistics):
    a, b = models(2)
    merged = fedmerge.merge([a, b], "fednova", base=tiny_model(), statistics=statistics)

    def norm(tau):
        return (tau - 0.9 * (1 - 0.9**tau) / 0.1) / 0.1

    moved = (norm(4) + norm(8)) / 2 * 0.5 * (0 / norm(4) + 1 / norm(8))
    torch.testing.assert_close(merged[0].bias, tiny_model()[0].bias + moved)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"method": "fedvag"}, UnknownName, "fedavg"),
        ({"method": "fedavg", "alpha": 1}, UnknownName, "option of fedavg 'alpha'"),
        ({"weights": [1, 2]}, InvalidOption, "weights has 2 entries for 3 models"),
        ({"weights": [1, 2, 0]}, BadUpdate, "client 2"),
        ({"weights": [1, -2, 1]}, BadUpdate, "client 1"),
        ({"method": "fedatt"}, InvalidOption, "base="),
        ({"method": "fednova", "base": tiny_model()}, BadUpdate, "local_steps"),
        (
            {"method": "fednova", "base": tiny_model(), "statistics": [{"local_steps": 0}] * 3},
            BadUpdate,
            "statistics[0]",
        ),
        ({"method": "fednova", "base": tiny_model(), "statistics": [{}]}, InvalidOption, "statistics has 1"),
        ({"method": "fedavg", "base": nn.Linear(2, 2)}, BadUpdate, "missing"),
    ],
)
def test_mistakes_are_named(arguments, kind, words):
    with pytest.raises(kind) as caught:
        fedmerge.merge(models(), **arguments)
    assert words in str(caught.value)


def test_no_models():
    with pytest.raises(InvalidOption, match="no model"):
        fedmerge.merge([])


def test_the_odd_model_out_is_blamed_wherever_it_stands():
    odd = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    for place in range(3):
        given = models(2)
        given.insert(place, odd)
        with pytest.raises(BadUpdate, match=rf"client {place}.*\[7, 4\], the model has \[6, 4\]"):
            fedmerge.merge(given)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight
            nn.init.constant_(self.a.weight, value)

    merged = fedmerge.merge([Tied(1.0), Tied(3.0)])
    assert merged.a.weight is merged.b.weight
    assert torch.equal(merged.a.weight, torch.full((2, 2), 2.0))


def test_fedma_retrains_a_model_with_two_hidden_layers():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)]
    base = nn.Sequential(*layers)
    models = [copy.deepcopy(base) for _ in range(2)]
    clients = [[(torch.randn(12, 6), torch.arange(12) % 3)] for _ in models]
    merged = fedmerge.merge(models, "fedma", clients=clients)
    assert merged(torch.zeros(1, 6)).shape == (1, 3)
    assert not torch.equal(merged[4].weight[:, :4], base[4].weight)
