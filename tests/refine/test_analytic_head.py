"""One exact head: ridge regression on pooled data, the same however the data are divided."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

import fedmerge
from fedmerge.aggregators.afl import Afl
from fedmerge.errors import InvalidOption


def net():
    torch.manual_seed(1)
    made = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    made[0].requires_grad_(False)
    return made


def data(n=90):
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(3, (n,), generator=generator)
    return torch.randn(n, 4, generator=generator).double() + 2 * torch.eye(4).double()[y], y


X, Y = data()
DIVISIONS = {
    "by chance": torch.arange(90).split((30, 30, 30)),
    "by class": torch.argsort(Y).split((50, 39, 1)),
    "one holds nearly all": torch.arange(90).flip(0).split((88, 1, 1)),
    "two": torch.arange(90).split((7, 83)),
}


def merged(parts, **options):
    """Of clients whose heads have been trained apart."""
    models = [net() for _ in parts]
    with torch.no_grad():
        for i, model in enumerate(models):
            model[2].weight.add_(i)
    clients = [[(X[part], Y[part])] for part in parts]
    return fedmerge.merge(models, "afl", weights=[len(p) for p in parts], clients=clients, **options)


@pytest.mark.parametrize("division", DIVISIONS)
def test_it_is_one_ridge_regression_on_pooled_data_however_they_are_divided(division):
    found = merged(DIVISIONS[division], ridge=0.01)
    features = torch.cat([net()[:2](X), torch.ones(90, 1)], 1).detach().numpy()
    strength = 0.01 * (features**2).mean(0).mean() * 90
    wanted = Ridge(alpha=strength, fit_intercept=False).fit(features, np.eye(3)[Y.numpy()]).coef_
    np.testing.assert_allclose(found[2].weight.detach().numpy(), wanted[:, :-1], atol=1e-9)
    np.testing.assert_allclose(found[2].bias.detach().numpy(), wanted[:, -1], atol=1e-9)


def test_the_scale_changes_no_decision():
    one, other = merged(DIVISIONS["two"]), merged(DIVISIONS["two"], scale=16.0)
    torch.testing.assert_close(other(X), 16 * one(X))


def test_layers_below_are_averaged():
    models = [net().requires_grad_(True) for _ in range(2)]
    with torch.no_grad():
        models[1][0].weight.add_(1)
    found = fedmerge.merge(models, "afl", weights=[1, 3], clients=[[(X, Y)]] * 2)
    torch.testing.assert_close(found[0].weight, models[0][0].weight + 0.75)


def test_it_stands_behind_other_merges_and_takes_all_examples_there_too():
    """A median has its mean as an alternative start: neither keeps examples back."""
    models = [copy.deepcopy(net()) for _ in range(3)]
    parts = DIVISIONS["by chance"]
    clients = [[(X[part], Y[part])] for part in parts]
    found = fedmerge.merge(models, "median+analytic_head(ridge=0.01)", clients=clients)
    torch.testing.assert_close(found[2].weight, merged(parts, ridge=0.01)[2].weight)


def test_without_clients_and_with_ridges_that_are_none_it_is_refused():
    with pytest.raises(InvalidOption, match="pass clients="):
        fedmerge.merge([net(), net()], "afl")
    with pytest.raises(InvalidOption, match="ridge must lie"):
        Afl(ridge=0.0)
