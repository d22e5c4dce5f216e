"""Clients judge the models of their own that a method makes for them."""

import math

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedmerge.personal import parts_in
from fedmerge.simulation import SimulationGrid
from fedmerge.state import prefixed
from fedmerge.strategies import MergeStrategy
from fedmerge.strategies.client_metrics import worst_tenth
from fedmerge.wire.record_values import from_arrays
from tests.federation import CLIENTS, initial, tiny_app


def judged_models(method):
    """What a round of the tiny federation sends each node to judge, with the strategy, and the merged model."""
    strategy, start = MergeStrategy(method, seed=1), initial()
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        order = strategy.order_train(1, start, ConfigRecord(), grid)
        answer = grid.send_and_receive(list(order.messages()))
        merged, _ = strategy.aggregate_train(1, answer)
        sent = list(strategy.configure_evaluate(1, merged, ConfigRecord(), grid))
        strategy.aggregate_evaluate(1, grid.send_and_receive(sent))
    models = {message.metadata.dst_node_id: from_arrays(message.content["arrays"]) for message in sent}
    return strategy, start, merged, dict(zip(sorted(models), (models[n] for n in sorted(models)), strict=True))


@pytest.mark.parametrize("method", ["emr", "tall_masks"])
def test_each_client_is_sent_its_own_model(method):
    strategy, start, merged, models = judged_models(method)
    parts = parts_in(prefixed("aggregator", strategy.memory))
    assert sorted(parts) == list(range(CLIENTS))
    wanted = [part.of(from_arrays(merged), from_arrays(start)) for part in parts.values()]
    found = list(models.values())
    for own in wanted:
        assert any(all(torch.equal(own[name], model[name]) for name in own) for model in found)
    assert not torch.equal(found[0]["0.weight"], found[1]["0.weight"])
    numbers = sum(-(-tensor.numel() // 8) for name, tensor in wanted[0].items() if name.endswith(("weight", "bias")))
    assert strategy.last_report.bytes_personal == CLIENTS * (numbers + 8)
    assert 0 <= strategy.worst_accuracy <= strategy.last_evaluation["eval_acc"]


def test_where_a_method_makes_one_model_all_judge_that():
    strategy, _, merged, models = judged_models("fedavg")
    assert all(torch.equal(model["0.weight"], from_arrays(merged)["0.weight"]) for model in models.values())
    assert strategy.last_report.bytes_personal == 0


def reply(accuracy):
    record = RecordDict({"arrays": ArrayRecord({}), "metrics": MetricRecord({"eval_acc": accuracy, "num-examples": 4})})
    asked = Message(content=RecordDict(), dst_node_id=1, message_type="evaluate")
    return Message(content=record, reply_to=asked)


def test_the_worst_tenth_is_one_client_of_nine_and_two_of_twenty():
    assert worst_tenth([reply(0.1 * i) for i in range(9, 0, -1)], "eval_acc") == pytest.approx(0.1)
    assert worst_tenth([reply(0.05 * i) for i in range(20)], "eval_acc") == pytest.approx(0.025)
    assert worst_tenth([reply(math.nan), reply(0.5)], "eval_acc") == 0.5
    assert worst_tenth([reply(0.5)], "other") is None
