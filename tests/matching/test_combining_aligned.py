"""What is aligned may be combined by any aggregator that looks at nothing but the models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import InvalidOption, UnknownName
from fedmerge.merging import build_pipeline

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))


def shuffled(model, seed):
    """The same function with its hidden neurons in another order."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    other = network()
    first, last = model[0], model[2]
    other.load_state_dict(
        {
            "0.weight": first.weight[order],
            "0.bias": first.bias[order],
            "2.weight": last.weight[:, order],
            "2.bias": last.bias,
        }
    )
    return other


@pytest.mark.parametrize("method", ["rebasin", "otfusion", "gamf", "c2m3"])
def test_the_median_after_alignment_survives_a_liar_that_the_mean_does_not(method):
    honest = [shuffled(network(), seed) for seed in range(4)]
    liar = network()
    with torch.no_grad():
        liar[2].bias += 1000.0 * torch.arange(3)  # what alignment leaves in place
    models, weights = [*honest, liar], [2.0, 2.0, 2.0, 2.0, 1.0]
    mean = fedmerge.merge(models, method, weights=weights, example=X)
    median = fedmerge.merge(models, method, weights=weights, example=X, combine="median")
    want = network()(X)
    torch.testing.assert_close(median(X), want, rtol=1e-4, atol=1e-4)
    assert (mean(X) - want).abs().max() > 10
    plain = fedmerge.merge(models, "median", weights=weights)
    assert (plain(X) - want).abs().max() > 0.05


def test_the_average_is_what_it_was():
    models = [network(seed) for seed in range(3)]
    for name in ("rebasin", "zipit"):
        one = fedmerge.merge(models, name, data=[X])
        two = fedmerge.merge(models, f"{name}(combine=trimmed_mean(trim=0.0))", data=[X])
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_options_of_the_combiner_arrive():
    assert build_pipeline("pfnm(combine=krum(attackers=0.1,selected=3))").aggregator.combiner.selected == 3


@pytest.mark.parametrize(
    ("combine", "words"),
    [
        ("gamf", "aligns once more"),
        ("norm_clipping", "base is not aligned"),
        ("median+server_adam", "behind the whole method"),
        ("trimmed_mean(trim=0.7)", "trim must lie"),
    ],
)
@pytest.mark.parametrize("method", ["rebasin", "otfusion", "gamf", "c2m3", "zipit", "cca", "pfnm", "fedma"])
def test_what_cannot_combine_is_refused(method, combine, words):
    with pytest.raises(InvalidOption, match=words):
        build_pipeline(method, {method: {"combine": combine}})


@pytest.mark.parametrize("method", ["otfusion", "zipit", "cca", "pfnm", "fedma"])
def test_statistics_do_not_follow_neurons_that_are_mixed(method):
    with pytest.raises(InvalidOption, match="needs statistics"):
        build_pipeline(method, {method: {"combine": "regmean"}})


@pytest.mark.parametrize("method", ["rebasin", "gamf", "c2m3"])
def test_they_follow_a_permutation(method):
    models = [shuffled(network(), seed) for seed in range(3)]
    merged = fedmerge.merge(models, method, clients=[[(X, torch.zeros(len(X)))]] * 3, combine="regmean")
    torch.testing.assert_close(merged(X), network()(X), rtol=1e-3, atol=1e-3)


def test_an_unknown_combiner_is_named():
    with pytest.raises(UnknownName, match="median"):
        build_pipeline("rebasin(combine=meadian)")
