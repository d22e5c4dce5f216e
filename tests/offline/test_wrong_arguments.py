"""Statistics and a base that do not go with the models: the error names them, and no client that there is not."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import BadArgument, BadUpdate, UnknownName


def net(hidden=6, more=()):
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3), *more)


LOADER = [(torch.randn(12, 4), torch.arange(12) % 3)]


def measured(model, name="fisher_diag"):
    return fedmerge.compute_statistics(model, LOADER, [name])


def test_a_statistic_that_there_is_not_is_named_with_the_one_meant():
    a, b = net(), net()
    fisher = [measured(a), measured(b)]
    with pytest.raises(UnknownName, match=r"statistics\[1\] 'fihser_diag'. Did you mean 'fisher_diag'"):
        fedmerge.merge([a, b], "fisher", statistics=[fisher[0], {"fihser_diag": fisher[1]["fisher_diag"]}])
    with pytest.raises(UnknownName, match=r"statistics\[0\] 'examples'"):
        fedmerge.merge([a, b], "fedavg", statistics=[{"examples": 3}, {}])


def test_one_that_is_missing_is_told_with_how_to_get_it():
    a, b = net(), net()
    with pytest.raises(BadArgument, match=r"^statistics\[1\]: .*'fisher_diag', which is missing.*models\[1\]"):
        fedmerge.merge([a, b], "fisher", statistics=[measured(a), {}])
    merged = fedmerge.merge([a, b], "fisher", statistics=[measured(a), {}], clients=[LOADER, LOADER])
    same = fedmerge.merge([a, b], "fisher", clients=[LOADER, LOADER])
    assert torch.allclose(merged[0].weight, same[0].weight)


@pytest.mark.parametrize(
    ("method", "kind"), [("fisher", "fisher_diag"), ("regmean", "gram"), ("fedfisher", "fisher_kfac")]
)
def test_those_of_another_model_are_told_as_such(method, kind):
    a, b, other = net(), net(), net(hidden=8)
    with pytest.raises(BadArgument, match=rf"^statistics\[1\]: .*'{kind}'.*this very model") as told:
        fedmerge.merge([a, b], method, statistics=[measured(a, kind), measured(other, kind)])
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)


def test_a_bare_number_has_its_companions_beside_it():
    a, b = net(), net()
    fedmerge.merge([a, b], "fednova", base=net(), statistics=[{"local_steps": 5, "momentum": 0.5}] * 2)
    with pytest.raises(BadArgument, match=r"^statistics\[0\]: .*local_steps"):
        fedmerge.merge([a, b], "fednova", base=net(), statistics=[{"local_steps": {"steps": 3}}] * 2)


@pytest.mark.parametrize("method", ["fedavg", "ties", "fedavg+server_momentum"])
@pytest.mark.parametrize(
    ("base", "words"),
    [
        (net(hidden=8), "'0.weight' has shape .8, 4., in models.0. .6, 4."),
        (net(more=[nn.Linear(3, 3)]), "'3.bias', which it has, the models do not have"),
        (nn.Sequential(nn.Linear(4, 6)), "'2.bias', which the models have, is missing in it"),
    ],
)
def test_a_base_of_other_layers_is_the_culprit(method, base, words):
    with pytest.raises(BadArgument, match=f"^base: tensor {words}"):
        fedmerge.merge([net(), net()], method, base=base)


def test_a_base_that_fits_one_model_tells_which_is_the_odd_one():
    with pytest.raises(BadUpdate, match="update of client 0") as told:
        fedmerge.merge([net(hidden=8), net(), net()], "fedavg", base=net())
    assert not isinstance(told.value, BadArgument)
