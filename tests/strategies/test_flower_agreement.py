"""Our strategies beside Flower's own, on the same replies."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Strategy

from fedmerge.errors import InvalidOption, NoUsableUpdates, UnknownName
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.workers.flower_task import become_server_task
from fedmerge.strategies import FedAtt, FedAvg, FedNova, MergeStrategy, from_arrays
from tests.federation import CLIENTS, initial, noisy_states, reply, tiny_app

EXAMPLES = (5, 20, 1)


def replies(order=(0, 1, 2), **metrics):
    states = noisy_states()
    return [reply(10 + i, states[i], EXAMPLES[i], **metrics) for i in order]


def prepared(strategy):
    """A strategy that has sent out the initial model."""
    become_server_task()
    grid = SimulationGrid(tiny_app(), CLIENTS)
    strategy.configure_train(1, initial(), ConfigRecord(), grid)
    return strategy


def test_fedavg_equals_flowers_on_floats_and_keeps_integer_buffers():
    ours, metrics = prepared(FedAvg()).aggregate_train(1, replies(train_loss=0.5))
    theirs, their_metrics = FlowerFedAvg().aggregate_train(1, replies(train_loss=0.5))
    for name, array in ours.items():
        mine, other = array.numpy(), theirs[name].numpy()
        if name.endswith("num_batches_tracked"):
            assert mine.dtype == np.int64
            assert mine == CLIENTS
            assert other.dtype == np.float64  # what Flower does: the reason why ours is careful
        else:
            assert mine.dtype == np.float32
            np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-7)
    assert dict(metrics) == pytest.approx(dict(their_metrics))


@pytest.mark.parametrize("strategy", [FedAvg, FedAtt])
def test_order_of_arrival_changes_no_bit(strategy):
    one, _ = prepared(strategy()).aggregate_train(1, replies((0, 1, 2)))
    two, _ = prepared(strategy()).aggregate_train(1, iter(replies((2, 0, 1))))
    assert all(one[name].data == two[name].data for name in one)


def test_partition_rather_than_node_decides_the_order():
    states = noisy_states()
    first = [reply(90, states[0], 5, partition=0), reply(7, states[1], 6, partition=1)]
    second = [reply(3, states[0], 5, partition=0), reply(44, states[1], 6, partition=1)]
    one, two = (prepared(FedAvg()).aggregate_train(1, batch)[0] for batch in (first, second))
    assert all(one[name].data == two[name].data for name in one)


def test_fednova_takes_steps_from_a_stock_clients_metrics():
    states = noisy_states()
    batch = [reply(10 + i, states[i], EXAMPLES[i], local_steps=2 + i, momentum=0.9) for i in range(CLIENTS)]
    strategy = prepared(FedNova())
    merged, _ = strategy.aggregate_train(1, batch)
    plain, _ = prepared(FedAvg()).aggregate_train(1, replies())
    assert strategy.last_report.accepted == (10, 11, 12)
    assert not np.allclose(merged["0.weight"].numpy(), plain["0.weight"].numpy(), atol=1e-5)


def test_fednova_without_steps_says_what_is_missing():
    with pytest.raises(NoUsableUpdates, match="local_steps"):
        prepared(FedNova()).aggregate_train(1, replies())


def test_bad_client_is_dropped_with_a_warning_and_listed(caplog):
    states = noisy_states()
    states[1]["0.weight"][0, 0] = float("nan")
    batch = [reply(10 + i, states[i], EXAMPLES[i]) for i in range(CLIENTS)]
    strategy = prepared(FedAvg())
    merged, _ = strategy.aggregate_train(1, batch)
    want = (5 * states[0]["3.bias"] + 1 * states[2]["3.bias"]) / 6
    torch.testing.assert_close(from_arrays(merged)["3.bias"], want)
    assert [bad.client for bad in strategy.last_report.dropped] == [11]
    assert "client 11" in caplog.text
    assert "0.weight" in caplog.text


def test_replies_without_model_or_weight_are_bad_updates():
    good, no_model, no_weight = replies()
    del no_model.content["arrays"]
    no_weight.content["metrics"] = MetricRecord({"train_loss": 1.0})
    strategy = prepared(FedAvg())
    strategy.aggregate_train(1, [good, no_model, no_weight])
    reasons = {bad.client: bad.reason for bad in strategy.last_report.dropped}
    assert "arrays" in reasons[11]
    assert "num-examples" in reasons[12]


def test_error_replies_are_tolerated_and_nothing_but_errors_keeps_the_model(caplog):
    good = replies((0, 1))
    failed = Message(Error(code=2, reason="boom\na traceback"), reply_to=good[0])
    merged, _ = prepared(FedAvg()).aggregate_train(1, [failed, *good])
    assert merged is not None
    told = [message for _, level, message in caplog.record_tuples if level == logging.WARNING]
    assert sum(message.endswith(": boom a traceback") for message in told) == 1
    assert prepared(FedAvg(on_too_few="skip")).aggregate_train(1, [failed]) == (None, None)
    assert prepared(FedAvg(on_too_few="skip")).aggregate_train(1, []) == (None, None)


def test_raise_policy_turns_a_bad_update_into_an_error():
    states = noisy_states()
    states[0]["3.bias"][0] = float("inf")
    with pytest.raises(Exception, match=r"client 10.*3\.bias"):
        prepared(FedAvg(on_bad_update="raise")).aggregate_train(1, [reply(10, states[0]), reply(11, states[1])])


def test_sampling_is_seeded_and_differs_between_rounds():
    grid = SimulationGrid(tiny_app(), 20)

    def drawn(seed, round):
        strategy = FedAvg(seed=seed, fraction_train=0.3)
        return [m.metadata.dst_node_id for m in strategy.configure_train(round, initial(), ConfigRecord(), grid)]

    assert drawn(0, 1) == drawn(0, 1)
    assert len(set(drawn(0, 1))) == 6
    assert drawn(0, 1) != drawn(0, 2)
    assert drawn(0, 1) != drawn(1, 1)


def test_misspelt_keywords_name_the_nearest():
    with pytest.raises(UnknownName, match="fraction_train"):
        FedAvg(fraction_trian=0.5)
    with pytest.raises(UnknownName, match="server_momentum"):
        FedNova(server_momentun=0.5)
    with pytest.raises(InvalidOption, match="server_momentum"):
        FedNova(server_momentum=1.5)


def test_is_a_flower_strategy():
    assert isinstance(MergeStrategy("fedavg+server_adam"), Strategy)


def test_stock_client_app_is_enough():
    """A ClientApp that knows nothing of fedmerge: one ArrayRecord and num-examples."""
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        state = message.content["arrays"].to_torch_state_dict()
        moved = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
        content = RecordDict({"model": ArrayRecord(moved), "m": MetricRecord({"num-examples": 3})})
        return Message(content, reply_to=message)

    with SimulationGrid(app, CLIENTS) as grid:
        result = FedAvg(fraction_evaluate=0.0).start(grid, initial(), num_rounds=2)
    torch.testing.assert_close(from_arrays(result.arrays)["0.bias"], from_arrays(initial())["0.bias"] + 2)
