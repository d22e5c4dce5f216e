"""The same model by every road: messages and single clients to the last bit, a stack of clients to 1e-5."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fedmerge.data import ClientData
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.scenarios.attacks import SignFlip
from fedmerge.simulation.scenarios.faults import Faults, Mishaps
from fedmerge.simulation.scenarios.hostile_clients import Hostile
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.tasks import Classification, LanguageModel, Multilabel
from fedmerge.training import LocalTraining
from tests.federation import TRAINING

CLIENTS = 5


class Messages(MergeStrategy):
    """One that wants a message for each client."""

    reads_messages = True


@dataclass(frozen=True)
class Kind:
    """One kind of learning: a model, and what its targets are."""

    outputs: int
    targets: object
    task: object = None
    norm: bool = False
    net: object = None
    inputs: object = None

    def model(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.net is not None:
                return self.net()
            middle = [nn.BatchNorm1d(6)] if self.norm else []
            return nn.Sequential(nn.Linear(4, 6), *middle, nn.ReLU(), nn.Linear(6, self.outputs))

    def data(self, client, _total):
        draws = torch.Generator().manual_seed(client)
        n = 8 + 4 * client
        x = torch.randn(n, 4, generator=draws) if self.inputs is None else self.inputs(n, draws)
        y = self.targets(n, draws)
        return ClientData(x, y, x[:0], y[:0])


def classes(n, draws):
    return torch.randint(0, 3, (n,), generator=draws)


def numbers(n, draws):
    return torch.randn(n, 2, generator=draws)


def several(n, draws):
    return torch.randint(0, 2, (n, 3), generator=draws).float()


def tokens(n, draws):
    return torch.randint(0, 5, (n, 6), generator=draws)


def pictures(n, draws):
    return torch.randn(n, 1, 4, 3, generator=draws)


def pixels(n, draws):
    labels = torch.randint(0, 3, (n, 4, 3), generator=draws)
    labels[:, 0] = -100
    return labels


def language_net():
    return nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 5))


def dense_net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))


# A task that is added gets a row here.
KINDS = {
    "classification": Kind(3, classes),
    "classification with batch norm": Kind(3, classes, norm=True),
    "regression": Kind(2, numbers, "regression"),
    "several labels": Kind(3, several, nn.BCEWithLogitsLoss()),
    "several labels with weights": Kind(3, several, Multilabel(pos_weight=(1.0, 2.0, 4.0))),
    "weighted classes": Kind(3, classes, Classification(class_weights=(1.0, 2.0, 4.0))),
    "smoothed labels": Kind(3, classes, Classification(label_smoothing=0.2)),
    "segmentation": Kind(3, pixels, "classification", net=dense_net, inputs=pictures),
    "language model": Kind(5, tokens, LanguageModel(padding=0, shift=True), net=language_net, inputs=tokens),
}
HAPPENINGS = {
    "nothing": {},
    "an attack": {"tamper": Hostile(SignFlip(2.0), frozenset({1, 3}), 3, 0)},
    "faults": {"mishaps": Mishaps(Faults(crash=0.2, nan=0.2, garbage=0.2), 1)},
    "adam": {"training": LocalTraining(optimizer="adam", epochs=1, batch_size=4)},
}


def trained(kind, road, method="fedavg", batch_norm="mean", **happening):
    strategy = (Messages if road == "messages" else MergeStrategy)(
        method, model_fn=kind.model, batch_norm=batch_norm, fraction_evaluate=0.0
    )
    app = client_app(kind.model, kind.data, **{"training": TRAINING, "task": kind.task, **happening})
    with SimulationGrid(app, CLIENTS, engine="stacked" if road == "stacked" else "serial") as grid:
        result = strategy.start(grid, to_arrays(kind.model().state_dict()), num_rounds=2)
    report = strategy.last_report
    failed = [(one.client, one.reason) for one in report.failed]
    left_out = [(bad.client, bad.reason) for bad in report.dropped]
    return from_arrays(result.arrays), (report.accepted, failed, left_out)


def alike(kind, **settings):
    (told, facts), (alone, same), (stacked, too) = (
        trained(kind, road, **settings) for road in ("messages", "serial", "stacked")
    )
    assert facts == same == too
    for name, tensor in told.items():
        assert torch.equal(tensor, alone[name]), name
        torch.testing.assert_close(stacked[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    return facts


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_learning(kind):
    alike(KINDS[kind])


@pytest.mark.parametrize("happening", [name for name in HAPPENINGS if name != "nothing"])
def test_whatever_befalls_clients(happening):
    accepted, failed, left_out = alike(KINDS["classification"], **HAPPENINGS[happening])
    assert bool(failed or left_out) == (happening == "faults")
    assert len(accepted) + len(failed) + len(left_out) == CLIENTS


@pytest.mark.parametrize("method", ["fednova", "fisher"])
def test_whatever_clients_measure(method):
    alike(KINDS["classification"], method=method)


@pytest.mark.parametrize("batch_norm", ["pooled", "local"])
def test_batch_norms_that_are_merged_otherwise_or_stay(batch_norm):
    alike(KINDS["classification with batch norm"], batch_norm=batch_norm)
