"""What people pass in place of a function, a model or a keyword."""

from __future__ import annotations

import pytest
import torch
from flwr.client import ClientApp as AnyClientApp
from torch import nn

import fedmerge
from fedmerge.data import ClientData
from fedmerge.errors import FedMergeError
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import FedAvg, FedFisher, client_app, to_arrays
from fedmerge.training import LocalTraining


def make_model():
    return nn.Linear(4, 3)


def load(partition, total):
    x, y = torch.ones(4, 4), torch.zeros(4, dtype=torch.long)
    return ClientData(x, y, x, y)


def start(initial, **keywords):
    with SimulationGrid(client_app(make_model, load), num_clients=2) as grid:
        FedAvg().start(grid, initial, **{"num_rounds": 1, **keywords})


ARRAYS = to_arrays(make_model().state_dict())

MISTAKES = {
    "models not in a list": (lambda: fedmerge.merge(make_model(), make_model()), "in one list"),
    "a model for its function": (lambda: client_app(make_model(), load), "model_fn must be a function"),
    "data for their function": (lambda: client_app(make_model, load(0, 1)), "data_fn must be a function"),
    "data_fn of one parameter": (lambda: client_app(make_model, lambda i: load(i, 1)), "num_partitions"),
    "functions in the wrong order": (lambda: client_app(load, make_model), "model_fn is called as model_fn()"),
    "training as a mapping": (lambda: client_app(make_model, load, training={"lr": 0.1}), "LocalTraining"),
    "a model for a strategy's function": (lambda: FedFisher(model_fn=make_model()), "model_fn must be a function"),
    "usual name of a rate": (lambda: LocalTraining(lr=0.1), "Did you mean 'learning_rate'"),
    "usual name of epochs": (lambda: LocalTraining(local_epochs=2), "Did you mean 'epochs'"),
    "number of clients": (lambda: SimulationGrid(client_app(make_model, load), clients=3), "'num_clients'"),
    "no app": (lambda: SimulationGrid(None, 3), "must be a ClientApp"),
    "a function of a context": (lambda: SimulationGrid(lambda context: None, 3), "message, context"),
    "Flower's older clients": (lambda: SimulationGrid(AnyClientApp(client_fn=lambda context: None), 3), "client_fn"),
    "Flower's older fraction": (lambda: FedAvg(fraction_fit=0.5), "Did you mean 'fraction_train'"),
    "Flower's older minimum": (lambda: FedAvg(min_fit_clients=2), "Did you mean 'min_train_nodes'"),
    "Flower's older start": (lambda: FedAvg(initial_parameters=ARRAYS), "start(initial_arrays=...)"),
    "rounds of a strategy": (lambda: FedAvg(num_rounds=3), "start(num_rounds=...)"),
    "a model for its arrays": (lambda: start(make_model()), "to_arrays(model.state_dict())"),
    "a state_dict for its arrays": (lambda: start(make_model().state_dict()), "to_arrays(state_dict)"),
    "unknown argument of start": (lambda: start(ARRAYS, rounds=3), "num_rounds"),
    "a module to encode": (lambda: to_arrays(make_model()), "model.state_dict()"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_by_what_was_meant(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(FedMergeError) as told:
        call()
    assert words in str(told.value)


def test_a_factory_that_returns_nothing_is_named():
    with (
        SimulationGrid(client_app(lambda: None, load), num_clients=2) as grid,
        pytest.raises(FedMergeError, match="model_fn returned a NoneType"),
    ):
        FedAvg().start(grid, ARRAYS, num_rounds=1)
