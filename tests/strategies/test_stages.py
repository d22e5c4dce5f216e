"""Matching strategies over messages: stages, frozen layers, models that grow, clients of unequal widths."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

import fedmerge
from fedmerge import InvalidOption, MergeContext
from fedmerge.aggregators.fedma import FedMA as FedMAMerge
from fedmerge.models import build_model
from fedmerge.models.resize import resize
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import GAMF, PFNM, FedMA, MergeStrategy, OTFusion, client_app, from_arrays
from fedmerge.strategies.rounds import by_message
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


def apart_noting(partition):
    return Noting(*apart(partition))


class Heard(SimulationGrid):
    """A grid that remembers what went over it."""

    def __init__(self, own):
        super().__init__(client_app(model, tiny_data, training=LocalTraining(epochs=1), own_model_fn=own), CLIENTS)
        self.sent, self.replies = [], []

    def train(self, order, *, timeout=None):
        return by_message(self, order, timeout)

    def send_and_receive(self, messages, **keywords):
        messages = list(messages)
        if not messages:
            return []
        self.sent.append([m.content for m in messages])
        replies = list(super().send_and_receive(messages, **keywords))
        self.replies.append([r.content for r in replies if r.has_content()])
        return replies


def started(strategy, own, rounds=1):
    grid = Heard(own)
    with grid:
        result = strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=rounds)
    return result, grid


def test_a_stage_is_a_message_round_in_which_each_layer_travels_once():
    strategy = FedMA(model_fn=model, example=EXAMPLE, fraction_evaluate=0.0, gamma=1e-3)
    result, grid = started(strategy, apart)
    assert len(grid.sent) == 3  # training, and a stage after each of the two hidden layers
    layers = [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]]
    frozen = [contents[0].config_records["config"].get("frozen") for contents in grid.sent[1:]]
    assert frozen == [layers[0], layers[0] + layers[1]]
    merged = from_arrays(result.arrays)
    for contents, replies, down, up in zip(grid.sent[1:], grid.replies[1:], layers[:2], layers[1:], strict=True):
        for content in contents:
            sent = from_arrays(content["arrays"])
            assert list(sent) == down
            for name in down:  # one merged layer for all, which stays
                torch.testing.assert_close(sent[name], merged[name])
        assert all(list(from_arrays(content["arrays"])) == up for content in replies)
    # A client re-orders what it has kept by what it is told: places of inputs, not weights, are sent for that.
    told = [from_arrays(content["sources"]) for content in grid.sent[1]]
    assert any(told)
    assert all(index.shape == (6,) for sources in told for key, index in sources.items() if key == "1 2.weight")


class Noting(nn.Sequential):
    """Notes which examples it is trained on, in their order."""

    batches: ClassVar[list[tuple[float, ...]]] = []

    def __init__(self, *layers):
        super().__init__(*(layers or model()))

    def forward(self, x):
        if self.training:
            self.batches.append(tuple(x[:, 0].tolist()))
        return super().forward(x)


def test_stages_draw_batches_that_no_other_stage_nor_any_later_round_draws_again():
    Noting.batches.clear()
    exchanges = []

    class Split(SimulationGrid):
        def train(self, order, *, timeout=None):
            return by_message(self, order, timeout)

        def send_and_receive(self, messages, **keywords):
            replies = list(super().send_and_receive(messages, **keywords))
            exchanges.append(list(Noting.batches))
            Noting.batches.clear()
            return replies

    app = client_app(Noting, tiny_data, training=LocalTraining(epochs=1, batch_size=16), own_model_fn=apart_noting)
    strategy = FedMA(model_fn=model, example=EXAMPLE, fraction_evaluate=0.0, gamma=1e-3, retrain_epochs=2)
    with Split(app, CLIENTS) as grid:
        strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=6)
    orders = [one for exchange in exchanges for one in exchange]
    rounds = 6 * CLIENTS
    assert len(orders) >= rounds + 2 * 2 * CLIENTS  # two stages of two epochs in the first round, at least
    assert {len(one) for one in orders} == {8, 12, 16}  # an epoch is one batch, so its order is all that is drawn
    assert len(set(orders)) == len(orders)


def test_without_retraining_there_is_one_exchange():
    _, grid = started(
        FedMA(model_fn=model, example=EXAMPLE, fraction_evaluate=0.0, retrain_epochs=0, gamma=1e-3), apart
    )
    assert len(grid.sent) == 1


def test_a_client_that_fails_in_a_stage_stays_at_what_it_sent_and_is_not_asked_again(caplog):
    class Lossy(Heard):
        def send_and_receive(self, messages, **keywords):
            messages = list(messages)
            stage = messages and messages[0].content.config_records["config"].get("stage")
            return super().send_and_receive(messages[1:] if stage else messages, **keywords)

    strategy = FedMA(model_fn=model, example=EXAMPLE, fraction_evaluate=0.0, gamma=1e-3)
    with Lossy(apart) as grid:
        result = strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=1)
    assert "stays at what it sent last" in caplog.text
    assert [len(contents) for contents in grid.sent] == [3, 2, 1]
    assert all(t.isfinite().all() for t in from_arrays(result.arrays).values())


def test_a_client_that_has_kept_nothing_fails_its_stage_and_the_merge_goes_on(caplog):
    class Forgetful(Heard):
        def send_and_receive(self, messages, **keywords):
            messages = list(messages)
            for message in messages[:1]:
                message.content.config_records["config"]["keep-model"] = False
            return super().send_and_receive(messages, **keywords)

    with Forgetful(apart) as grid:
        strategy = FedMA(model_fn=model, example=EXAMPLE, fraction_evaluate=0.0)
        result = strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=1)
    assert "stays at what it sent last" in caplog.text
    assert all(t.isfinite().all() for t in from_arrays(result.arrays).values())


def test_batch_norms_and_blocks_that_stay_come_back_after_the_last_stage():
    def vit(seed):
        return build_model("vit", (1, 8, 8), 3, seed=seed, dim=8, heads=2, depth=1)

    def normed(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 1, 8, 8, generator=generator), torch.arange(12) % 3
    for make in (vit, normed):
        merged = fedmerge.merge([make(1), make(2)], "fedma", example=x[:2], clients=[[(x, y)], [(x, y)]], repair="none")
        assert all(t.isfinite().all() for t in merged.state_dict().values())
        assert merged.eval()(x).shape == (12, 3)


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
