"""Matching strategies over messages: stages, frozen layers, models that grow, clients of unequal widths."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

import fedmerge
from fedmerge import InvalidOption, MergeContext
from fedmerge.aggregators.fedma import FedMA as FedMAMerge
from fedmerge.models.resize import resize
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import GAMF, PFNM, FedMA, MergeStrategy, OTFusion, client_app, from_arrays
from fedmerge.training import LocalTraining, evaluate
from tests.federation import CLIENTS, tiny_data

WIDTHS = (5, 8, 6)
EXAMPLE = torch.zeros(2, 4)


def model(width=6, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def apart(partition):
    return model(6, seed=10 + partition)


def unequal(partition):
    return model(WIDTHS[partition], seed=10 + partition)


class Heard(SimulationGrid):
    """A grid that remembers what went over it."""

    def __init__(self, own):
        super().__init__(client_app(model, tiny_data, training=LocalTraining(epochs=1), own_model_fn=own), CLIENTS)
        self.sent, self.replies = [], []

    def send_and_receive(self, messages, **keywords):
        messages = list(messages)
        if not messages:
            return []
        self.sent.append([m.content for m in messages])
        replies = list(super().send_and_receive(messages, **keywords))
        self.replies.append([r.content for r in replies])
        return replies


def started(strategy, own, rounds=1):
    grid = Heard(own)
    with grid:
        result = strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=rounds)
    return result, grid


def test_a_stage_is_a_message_round_and_frozen_layers_do_not_train():
    strategy = FedMA(model_fn=model, example=EXAMPLE, fraction_evaluate=0.0, gamma=1e-3)
    result, grid = started(strategy, apart)
    assert len(grid.sent) == 3  # training, and a stage after each of the two hidden layers
    frozen = [contents[0].config_records["config"].get("frozen") for contents in grid.sent[1:]]
    assert frozen == [["0.weight", "0.bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]]
    for contents, replies, names in zip(grid.sent[1:], grid.replies[1:], frozen, strict=True):
        sent, back = (sorted((from_arrays(c["arrays"]) for c in side), key=str) for side in (contents, replies))
        for one, other in zip(sent, back, strict=True):
            assert all(torch.equal(one[n], sent[0][n]) for n in names)  # one merged layer for all
            assert all(torch.equal(one[n], other[n]) for n in names)
            assert not torch.equal(one["4.weight"], other["4.weight"])
    merged = from_arrays(result.arrays)
    last = from_arrays(grid.sent[-1][0]["arrays"])
    for name in frozen[-1]:
        torch.testing.assert_close(merged[name], last[name])


def test_without_retraining_there_is_one_exchange():
    _, grid = started(
        FedMA(model_fn=model, example=EXAMPLE, fraction_evaluate=0.0, retrain_epochs=0, gamma=1e-3), apart
    )
    assert len(grid.sent) == 1


def test_a_client_that_fails_in_a_stage_goes_on_with_what_it_was_sent(caplog):
    class Lossy(Heard):
        def send_and_receive(self, messages, **keywords):
            messages = list(messages)
            stage = messages and messages[0].content.config_records["config"].get("stage")
            return super().send_and_receive(messages[1:] if stage else messages, **keywords)

    strategy = FedMA(model_fn=model, example=EXAMPLE, fraction_evaluate=0.0, gamma=1e-3)
    with Lossy(apart) as grid:
        result = strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=1)
    assert "goes on with what it was sent" in caplog.text
    assert all(t.isfinite().all() for t in from_arrays(result.arrays).values())


@pytest.mark.parametrize("kind", [PFNM, OTFusion])
def test_clients_of_unequal_widths_merge_into_one_model(kind):
    strategy = kind(model_fn=model, example=EXAMPLE)
    result, grid = started(strategy, unequal, rounds=2)
    assert strategy.last_report.accepted == tuple(range(CLIENTS))
    replied = {from_arrays(c["arrays"])["0.weight"].shape[0] for c in grid.replies[0]}
    assert replied == set(WIDTHS)
    state = from_arrays(result.arrays)
    assert state["0.weight"].shape[0] >= max(WIDTHS)
    data = tiny_data(0, CLIENTS)
    loss, _ = evaluate(resize(model(), state), data.train_x, data.train_y)
    assert 0 < loss < 10
    assert set(result.evaluate_metrics_clientapp) == {1, 2}  # clients judged the wide model too


def test_gamf_and_growth_over_messages():
    grown, _ = started(PFNM(model_fn=model, example=EXAMPLE, gamma=1e6, sigma=1e-3), apart)
    assert from_arrays(grown.arrays)["0.weight"].shape[0] == 6 * CLIENTS
    kept, _ = started(GAMF(model_fn=model, example=EXAMPLE), apart)
    assert from_arrays(kept.arrays)["0.weight"].shape == (6, 4)


def test_stages_with_modules_at_hand_train_on_the_clients_loaders():
    models = [apart(i) for i in range(CLIENTS)]
    data = [tiny_data(i, CLIENTS) for i in range(CLIENTS)]
    loaders = [[(d.train_x, d.train_y)] for d in data]
    staged = fedmerge.merge(models, "fedma", example=EXAMPLE, clients=loaders, gamma=1e-3)
    once = fedmerge.merge(models, "fedma", example=EXAMPLE, clients=loaders, gamma=1e-3, retrain_epochs=0)
    torch.testing.assert_close(staged[0].weight, once[0].weight)  # matched before anything was trained again
    assert not torch.equal(staged[4].weight, once[4].weight)
    assert FedMAMerge().needs[0].name == "class_counts"
    assert MergeContext().exchange is None


@pytest.mark.parametrize(
    ("method", "given", "missing"),
    [
        ("pfnm", {}, "model_fn="),
        ("pfnm", {"model_fn": model}, "example="),
        ("zipit", {"model_fn": model, "example": EXAMPLE}, "data="),
    ],
)
def test_what_the_server_lacks_is_said_before_anyone_trains(method, given, missing):
    with Heard(apart) as grid, pytest.raises(InvalidOption, match=missing):
        MergeStrategy(method, **given).start(grid, ArrayRecord(model().state_dict()), num_rounds=1)
    assert not grid.sent
