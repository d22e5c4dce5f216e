"""Neuron alignment beside NumPy, where it differs from re-basin on activations, and its laws."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import fedmerge
from fedmerge.aggregators.neuron_alignment import cross_correlation, nearness
from fedmerge.errors import InvalidOption
from fedmerge.matching.listening import Moments
from fedmerge.permutations import trace
from tests.permutations.zoo_of_models import MODELS, difference, free_perms, permuted


def _mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def _said(model, x):
    return np.tanh(x @ model[0].weight.detach().numpy().T + model[0].bias.detach().numpy())


def _merged_by_numpy(a, b, order):
    return {
        "0.weight": (a[0].weight + b[0].weight[order]) / 2,
        "0.bias": (a[0].bias + b[0].bias[order]) / 2,
        "2.weight": (a[2].weight + b[2].weight[:, order]) / 2,
        "2.bias": (a[2].bias + b[2].bias) / 2,
    }


@pytest.mark.parametrize("cost", ["correlation", "distance"])
def test_as_numpy_has_it(cost):
    a, b, x = _mlp(0), _mlp(1), np.random.default_rng(0).normal(size=(50, 3))
    one, other = _said(a, x), _said(b, x)
    if cost == "correlation":
        products = (one - one.mean(0)).T @ (other - other.mean(0)) / 50
        costs = 1.01 - products / np.outer(one.std(0) + 0.3, other.std(0) + 0.3)
    else:
        costs = np.square(one[:, :, None] - other[:, None]).mean(0)
    order = linear_sum_assignment(costs)[1]
    options = {"epsilon": 0.3} if cost == "correlation" else {}
    merged = fedmerge.merge([a, b], "neuron_alignment", data=[torch.from_numpy(x)], cost=cost, **options).state_dict()
    for name, tensor in _merged_by_numpy(a, b, torch.from_numpy(order)).items():
        torch.testing.assert_close(merged[name], tensor.detach())


def _moments(one, other):
    one, other = (torch.tensor(x, dtype=torch.float64) for x in (one, other))
    sums = one.sum(0), other.sum(0), one.square().sum(0), other.square().sum(0), one.T @ other
    return Moments(float(len(one)), *sums)


def test_golden_numbers():
    heard = _moments([[0.0, 1.0], [2.0, 1.0]], [[0.0], [4.0]])
    # Deviations 1 and 2, covariance 2; the second neuron never changes.
    torch.testing.assert_close(cross_correlation(heard, 0.5).ravel(), torch.tensor([2 / (1.5 * 2.5), 0.0]).double())
    # Squared distances, summed: 0 + 4, and 1 + 9.
    torch.testing.assert_close(nearness(heard).ravel(), torch.tensor([0.6, 0.0]).double())


def test_neurons_that_hardly_change_count_little_unlike_in_rebasin():
    """The third pair of a cyclic match would bring more, were it not that its neurons hardly change."""
    quiet = 1e-3
    base = np.random.default_rng(1).normal(size=(4000, 3))
    u, v, w = (base - base.mean(0)).T
    one = np.stack([quiet * u, v], 1)
    other = np.stack([0.8 * u + 0.6 * v, quiet * w], 1)
    # Straight: corr(u, .8u+.6v) + corr(v, w) = 0.8; crossed: corr(u, w) + corr(v, .8u+.6v) = 0.6.
    heard = _moments(one, other)
    orders = [linear_sum_assignment(-s)[1].tolist() for s in (heard.correlation(), cross_correlation(heard, 1.0))]
    assert orders == [[0, 1], [1, 0]]


@pytest.mark.parametrize("cost", ["correlation", "distance"])
@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_planted_orders_are_found(name, cost):
    model, batch = MODELS[name].make(1)
    x = torch.randn((200, *batch.shape[1:]), generator=torch.Generator().manual_seed(5))
    spec = trace(model, batch)
    others = [permuted(model, spec, free_perms(spec, seed)) for seed in (1, 2)]
    merged = fedmerge.merge([model, *others], "neuron_alignment", data=[x], cost=cost)
    assert difference(model, merged, batch) < 1e-4


@pytest.mark.parametrize("options", [{"cost": "cosine"}, {"epsilon": -1.0}, {"examples": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        fedmerge.merge([_mlp(0), _mlp(1)], "neuron_alignment", data=[torch.randn(4, 3)], **options)
