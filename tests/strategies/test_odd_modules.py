"""Modules that Python cannot copy, or that keep something between calls, in a federation: each client starts afresh."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from fedmerge.data import ClientData
from fedmerge.models.resize import copy_of, resize
from fedmerge.offline.compute import compute_statistics
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import FedAvg, client_app
from fedmerge.training import LocalTraining, train

RNG = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 5, generator=RNG), torch.arange(24) % 3
KINDS = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")


def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        KINDS[kind](model[0])
    return model


def data(p, n):
    return ClientData(X[p::n], Y[p::n], X[p::n], Y[p::n])


def start(strategy, make, engine="serial", training=None):
    app = client_app(make, data, training=training or LocalTraining(learning_rate=0.1, epochs=1, batch_size=4))
    with SimulationGrid(app, num_clients=2, engine=engine) as grid:
        found = strategy.start(grid, initial_arrays=ArrayRecord(make().state_dict()), num_rounds=1)
    return found.arrays.to_torch_state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_copied_after_training(kind):
    model = made(kind)
    train(model, X, Y, LocalTraining(epochs=1), seed=0, client=0, round=0)
    for twin in (copy_of(model), resize(model, model.state_dict())):
        assert torch.equal(twin.eval()(X), model.eval()(X))
        train(twin, X, Y, LocalTraining(epochs=1), seed=0, client=0, round=0)
        assert not torch.equal(twin.eval()(X), model.eval()(X))
    assert compute_statistics(model, [(X, Y)], ["gram"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_federation_is_the_mean_of_clients_by_themselves(kind):
    """Whether clients are reached by messages, as in Flower's own FedAvg, or not, and whatever the engine."""
    states = []
    for p in range(2):
        model = made(kind)
        one = data(p, 2)
        train(model, one.train_x, one.train_y, LocalTraining(learning_rate=0.1, epochs=1, batch_size=4),
              seed=0, client=p, round=1)  # fmt: skip
        states.append(model.state_dict())
    for engine in ("serial", "stacked", "auto"):
        found = start(FedAvg(fraction_evaluate=0.0), lambda: made(kind), engine)
        for name in ("2.weight", "2.bias", "0.bias"):
            torch.testing.assert_close(found[name], (states[0][name] + states[1][name]) / 2)
    assert start(FlowerFedAvg(fraction_evaluate=0.0), lambda: made(kind)).keys() == states[0].keys()


class Remembering(nn.Module):
    """Counts its calls, in a buffer that does not travel and in an attribute, and says so in its scores."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(3), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.seen = self.seen + 1
        return self.layer(x) * (1 + self.calls + self.seen)


def remembering():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Remembering()


@pytest.mark.parametrize("engine", ["serial", "stacked", "auto"])
def test_nothing_of_one_client_is_left_for_the_next(engine):
    settings = LocalTraining(learning_rate=0.01, epochs=1, batch_size=4)
    states = []
    for p in range(2):
        model, one = remembering(), data(p, 2)
        train(model, one.train_x, one.train_y, settings, seed=0, client=p, round=1)
        states.append(model.state_dict())
    found = start(FedAvg(fraction_evaluate=0.0), remembering, engine, settings)
    by_message = start(FlowerFedAvg(fraction_evaluate=0.0), remembering, training=settings)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    assert by_message.keys() == found.keys()
