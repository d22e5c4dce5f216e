"""Clients that lie or fail in FedMA's later exchanges: the round ends with a model of all that they sent before."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict

from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.workers.flower_task import become_server_task
from fedmerge.strategies import from_arrays
from tests.answered import answer, strategy_of
from tests.federation import CLIENTS, initial, tiny_app, tiny_model


def filled(value, dtype):
    """Arrays of the same shapes, all of one number."""
    return lambda content: replaced(content, lambda array: np.full(array.shape, value, dtype))


def replaced(content, change):
    arrays = {n: Array(np.ascontiguousarray(change(a.numpy()))) for n, a in content["arrays"].items()}
    return RecordDict({**content, "arrays": ArrayRecord(arrays)})


def without(key):
    return lambda content: RecordDict({k: record for k, record in content.items() if k != key})


LIES = {
    "NaN": filled(math.nan, np.float32),
    "1e300": filled(1e300, np.float64),
    "booleans": filled(1, np.bool_),
    "one axis less": lambda content: replaced(content, lambda array: array.reshape(-1)),
    "narrower than it was told": lambda content: replaced(content, lambda array: array.reshape(-1)[:1]),
    "none of the layers": lambda content: RecordDict({**content, "arrays": ArrayRecord({})}),
    "layers that nobody asked for": lambda content: RecordDict(
        {**content, "arrays": ArrayRecord({**content["arrays"], "0.weight": Array(np.ones((6, 4), np.float32))})}
    ),
    "no arrays": without("arrays"),
    "no metrics": without("metrics"),
    "no examples": lambda content: RecordDict({**content, "metrics": MetricRecord({"num-examples": 0})}),
    "another partition": lambda content: RecordDict({**content, "client": ConfigRecord({"partition-id": 99})}),
    "nothing": lambda content: RecordDict(),
    "an error": lambda content: Error(code=0, reason="no more"),
    "a mod's error": lambda content: Error(code=6, reason="refused"),
    "no reply": lambda content: None,
}


class Lying:
    """A grid on which one node answers honestly once, and with a lie then."""

    def __init__(self, inner, node, lie):
        self.inner, self.node, self.lie, self.exchanges, self.asked = inner, node, lie, 0, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def send_and_receive(self, messages, **keywords):
        messages = list(messages)
        self.asked.append([message.metadata.dst_node_id for message in messages])
        replies = list(self.inner.send_and_receive(messages, **keywords))
        self.exchanges += 1
        if self.exchanges > 1:
            replies = [self.changed(reply) for reply in replies]
        return [reply for reply in replies if reply is not None]

    def changed(self, reply):
        if reply.metadata.src_node_id != self.node:
            return reply
        found = self.lie(reply.content)
        return None if found is None else answer(self.node, found)


@pytest.mark.parametrize("lie", LIES)
def test_the_round_of_fedma_outlives_a_client_that_fails_later(lie):
    become_server_task()
    strategy = strategy_of("fedma", tiny_model, fraction_evaluate=0.0, max_width=1)
    with SimulationGrid(tiny_app(), CLIENTS) as inner:
        node = sorted(inner.get_node_ids())[list(LIES).index(lie) % CLIENTS]
        grid = Lying(inner, node, LIES[lie])
        messages = list(strategy.configure_train(1, initial(), ConfigRecord(), grid))
        arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    state = from_arrays(arrays)
    assert list(state) == list(tiny_model().state_dict())
    assert all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point())
    assert strategy.last_report.accepted == (0, 1, 2)
    assert grid.exchanges > 1
    assert node in grid.asked[1]
