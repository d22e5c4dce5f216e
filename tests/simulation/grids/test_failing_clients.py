"""Clients that fail are named wherever they do, once; and who merged nothing has not succeeded."""

from __future__ import annotations

import logging
import sys
from collections import Counter

import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedmerge.data import ClientData
from fedmerge.errors import ClientFailed, InvalidOption, NothingMerged, NoUsableUpdates
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import FedAvg, MergeStrategy, client_app, from_arrays
from tests.federation import TRAINING, initial, plain_model, tiny_data, tiny_model

CLIENTS = 4
CAUSE = "OSError: cannot read (from ConnectionError: cable pulled)"


class Messages(MergeStrategy):
    """One that looks at replies, and so gets messages."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, list(replies))


PATHS = [(MergeStrategy, "serial"), (MergeStrategy, "stacked"), (Messages, "serial")]
every_path = pytest.mark.parametrize(("kind", "engine"), PATHS)


def failing_data(*bad, first=1):
    """Data that clients `bad` cannot read when they want it for the `first` time or later."""
    asked = Counter()

    def data(client, total):
        asked[client] += 1
        if client in bad and asked[client] >= first:
            try:
                raise ConnectionError("cable pulled")
            except ConnectionError as error:
                raise OSError("cannot read") from error
        return tiny_data(client % 3, total)

    return data


def run(strategy, data, *, model_fn=plain_model, rounds=2, engine="serial"):
    app = client_app(model_fn, data, training=TRAINING)
    with SimulationGrid(app, CLIENTS, engine=engine) as grid:
        return strategy.start(grid, initial(model_fn), num_rounds=rounds)


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@every_path
def test_each_failure_is_told_once_and_stands_in_the_report(kind, engine, caplog):
    strategy = kind("fedavg", fraction_evaluate=0.0)
    with caplog.at_level(logging.WARNING, "fedmerge"):
        result = run(strategy, failing_data(0, 2), engine=engine)
    told = [line for line in warned(caplog) if "failed" in line]
    assert told == [f"round {k}: client {client} failed: {CAUSE}" for k in (1, 2) for client in (0, 2)]
    report = strategy.last_report
    assert report.accepted == (1, 3)
    assert [(one.client, one.round, one.reason) for one in report.failed] == [(0, 2, CAUSE), (2, 2, CAUSE)]
    assert set(from_arrays(result.arrays)) == set(plain_model().state_dict())


@every_path
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_where_all_clients_fail_the_run_ends_with_their_names_and_cause(kind, engine, policy):
    strategy = kind("fedavg", fraction_evaluate=0.0, on_too_few=policy)
    with pytest.raises(NoUsableUpdates, match="client 0 failed: OSError: cannot read") as told:
        run(strategy, failing_data(*range(CLIENTS)), engine=engine, rounds=3)
    assert isinstance(told.value, NothingMerged) == (policy == "skip")
    assert [one.client for one in told.value.failed] == list(range(CLIENTS))
    assert "none of 3 rounds merged" in str(told.value) or policy == "raise"
    assert strategy.last_report.round == (3 if policy == "skip" else 1)
    assert len(strategy.last_report.failed) == CLIENTS


@every_path
def test_failed_clients_count_against_the_fewest_wanted(kind, engine):
    with pytest.raises(
        NoUsableUpdates, match=r"2 usable updates, at least 3 wanted \(client 1 failed: OSError"
    ) as told:
        run(kind("fedavg", min_clients=3), failing_data(1, 3), engine=engine)
    assert [one.client for one in told.value.failed] == [1, 3]


@every_path
def test_a_run_of_which_one_round_merged_is_one(kind, engine):
    strategy = kind("fedavg", fraction_evaluate=0.0, on_too_few="skip", min_clients=CLIENTS)
    result = run(strategy, failing_data(2, first=2), engine=engine)
    assert strategy.last_report.skipped.startswith("3 usable updates, at least 4 wanted (client 2 failed")
    state = from_arrays(result.arrays)
    assert any(not torch.equal(state[name], tensor) for name, tensor in plain_model().state_dict().items())


@every_path
def test_models_and_data_that_cannot_be_made_are_failures_of_clients(kind, engine):
    def no_model():
        raise FileNotFoundError("weights.pt")

    app = client_app(no_model, tiny_data, training=TRAINING)
    with SimulationGrid(app, CLIENTS, engine=engine) as grid, pytest.raises(NoUsableUpdates, match=r"weights\.pt"):
        kind("fedavg").start(grid, initial(plain_model), num_rounds=1)
    for data in (lambda client, total: (1, 2), lambda client, total: sys.exit(3)):
        with pytest.raises(NoUsableUpdates, match=r"client 0 failed: .*and 1 more failed"):
            run(kind("fedavg"), data, engine=engine)


@every_path
def test_an_empty_client_is_told(kind, engine, caplog):
    def data(client, total):
        given = tiny_data(client % 3, total)
        return (
            ClientData(given.train_x[:0], given.train_y[:0], given.held_out_x, given.held_out_y)
            if client == 1
            else given
        )

    strategy = kind("fedavg", fraction_evaluate=0.0)
    run(strategy, data, engine=engine, rounds=1)
    (told,) = [line for line in warned(caplog) if "client 1" in line]
    assert "no examples" in told
    assert 1 not in strategy.last_report.accepted


def test_who_cannot_evaluate_is_told_and_ends_the_run_where_that_is_the_policy(caplog):
    strategy = FedAvg(fraction_evaluate=1.0)
    result = run(strategy, failing_data(3, first=2), rounds=1)
    assert [line for line in warned(caplog) if "failed" in line] == [f"round 1, evaluation: client 3 failed: {CAUSE}"]
    assert "eval_loss" in result.evaluate_metrics_clientapp[1]
    with pytest.raises(ClientFailed, match="round 1: client 3 failed: OSError"):
        run(FedAvg(on_client_error="raise"), failing_data(3, first=2), rounds=1)


@pytest.mark.parametrize(
    ("method", "about"), [("fedma", "stage 1"), ("fedavg+ridge_head", "questions"), ("fedavg", "recalibration")]
)
def test_who_fails_when_asked_again_is_told_and_in_the_report(method, about, caplog):
    model_fn = tiny_model if about == "recalibration" else plain_model
    strategy = MergeStrategy(
        method,
        model_fn=model_fn,
        example=torch.zeros(2, 4),
        fraction_evaluate=0.0,
        batch_norm="recalibrate" if about == "recalibration" else "mean",
    )
    run(strategy, failing_data(1, first=2), model_fn=model_fn, rounds=1)
    told = [line for line in warned(caplog) if "client 1 failed" in line]
    assert told[0] == f"round 1, {about}: client 1 failed: {CAUSE}"
    assert {(one.client, one.reason) for one in strategy.last_report.failed} == {(1, CAUSE)}
    assert len(strategy.last_report.failed) == len(told)
    strict = MergeStrategy(
        method,
        model_fn=model_fn,
        example=torch.zeros(2, 4),
        on_client_error="raise",
        batch_norm=strategy.pipeline.batch_norm,
    )
    with pytest.raises(ClientFailed, match="client 1 failed"):
        run(strict, failing_data(1, first=2), model_fn=model_fn, rounds=1)


def test_an_app_that_answers_with_no_message_has_failed_also_for_flowers_strategies(caplog):
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_config["partition-id"] == 0:
            return None
        content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    with SimulationGrid(app, 3) as grid:
        strategy = FedAvg(fraction_evaluate=0.0)
        strategy.start(grid, initial(), num_rounds=1)
        (failed,) = strategy.last_report.failed
        # These clients tell no partitions and go by their nodes, and so does the one that failed.
        assert failed.client == "on node 2"
        assert failed.reason.startswith("TypeError: the ClientApp must return a Message to a train message")
        with caplog.at_level(logging.INFO, "flwr"):
            FlowerFedAvg(fraction_evaluate=0.0).start(grid, initial(), num_rounds=1)
    assert "aggregate_train: Received 2 results and 1 failures" in caplog.text


def test_a_run_without_rounds_is_refused_and_one_without_training_keeps_the_model():
    for rounds in (0, -1, True, 2.0):
        with pytest.raises(InvalidOption, match="num_rounds"):
            run(FedAvg(), tiny_data, rounds=rounds)
    result = run(FedAvg(fraction_train=0.0), failing_data(), rounds=1)
    assert {n: a.data for n, a in result.arrays.items()} == {n: a.data for n, a in initial(plain_model).items()}
    assert result.evaluate_metrics_clientapp[1]["eval_loss"] > 0


def test_a_fraction_that_asks_nobody_merges_nothing():
    with pytest.raises(NothingMerged, match="no client was asked"):
        run(FedAvg(fraction_train=0.1, min_train_nodes=0, fraction_evaluate=0.0), tiny_data)


def test_an_initial_model_that_is_no_record_is_told_how_to_be_one():
    with SimulationGrid(client_app(plain_model, tiny_data), CLIENTS) as grid, pytest.raises(InvalidOption) as told:
        FedAvg().start(grid, plain_model().state_dict(), num_rounds=1)
    assert "fedmerge.strategies.to_arrays(" in str(told.value)
