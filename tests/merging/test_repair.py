"""REPAIR and recalibration: activations of the merged model are those that the models had."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import InvalidOption
from fedmerge.merging.repair import Rescale, recalibrated


def model(seed, norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(8)] if norm else []
        return nn.Sequential(nn.Linear(5, 8), *middle, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


X = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))


def moments(one, depth):
    with torch.no_grad():
        out = one[:depth](X)
    return out.mean(0), out.std(0, unbiased=False)


def test_channels_have_the_weighted_means_of_what_was_merged():
    a, b, merged = model(1), model(2), model(3)
    before = merged[4].weight.clone()
    rescale = Rescale(X.split(50))
    rescale.add(a, 3.0)
    rescale.add(b, 1.0)
    corrected = rescale.finish(merged)
    assert set(corrected) == {"0.weight", "0.bias", "2.weight", "2.bias"}  # not the output layer
    assert torch.equal(merged[4].weight, before)
    for depth in (1, 3):
        for got, one, other in zip(moments(merged, depth), moments(a, depth), moments(b, depth), strict=True):
            torch.testing.assert_close(got, 0.75 * one + 0.25 * other, rtol=1e-3, atol=1e-4)


def test_copies_stay_as_they_are():
    merged = fedmerge.merge([model(1), model(1)], "rebasin", example=X[:2], data=[X], repair="rescale")
    for name, tensor in model(1).state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_norms_are_measured_anew_where_there_are_data_and_warned_of_where_not(caplog):
    models = [model(1, norm=True), model(2, norm=True)]
    merged = fedmerge.merge(models, "rebasin", example=X[:2], data=[X])
    want = merged[0](X)
    torch.testing.assert_close(merged[1].running_mean, want.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged[1].running_var, want.var(0), rtol=1e-4, atol=1e-5)
    with caplog.at_level(logging.WARNING):
        fedmerge.merge(models, "rebasin", example=X[:2])
    assert "statistics of batch norm are averages" in caplog.text
    with pytest.raises(InvalidOption, match="data="):
        recalibrated(models[0], [])
