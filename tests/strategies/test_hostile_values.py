"""One client's replies over two rounds of every named strategy, and its models in cohorts: no round is ended."""

from __future__ import annotations

import math
import random

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord

from fedmerge import strategies
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.workers.flower_task import become_server_task
from fedmerge.state import LARGEST
from fedmerge.strategies import MergeStrategy, client_app, from_arrays
from tests.answered import answer, odd_app, odd_arrays, shallow
from tests.federation import TRAINING, initial, tiny_data, tiny_model
from tests.hostile.kinds import METRICS, STATES, WEIGHTS, hostile_reply

CLIENTS = 5
NAMED = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9},
    "FedAdam": {},
    "FedYogi": {},
    "FedAdagrad": {},
    "FedProx": {"proximal_mu": 0.1},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "FedNova": {},
    "FedAtt": {},
}
KINDS = [*STATES.values(), *WEIGHTS.values(), *METRICS.values()]
SHARE = 9
"""Every so manieth kind in every run of the tests, by each strategy others."""


class Rounds:
    """Five clients of which one lies in the first round and none in the second."""

    def __init__(self, name):
        become_server_task()
        self.strategy = getattr(strategies, name)(fraction_evaluate=0.0, **NAMED[name])
        self.grid, self.arrays = SimulationGrid(odd_app(), CLIENTS), odd_arrays()
        self.nodes, self.model = list(self.grid.get_node_ids()), from_arrays(self.arrays)
        messages = list(self.strategy.configure_train(1, self.arrays, ConfigRecord(), self.grid))
        self.contents = [message.content for message in self.grid.send_and_receive(messages)]

    def merged(self, number, arrays, contents):
        list(self.strategy.configure_train(number, arrays, ConfigRecord(), self.grid))
        replies = [answer(node, shallow(content)) for node, content in zip(self.nodes, contents, strict=True)]
        return self.strategy.aggregate_train(number, replies)

    def check(self, kind, place):
        contents = list(self.contents)
        contents[place] = hostile_reply(kind, random.Random(place), contents[place], self.model)
        if contents[place] is None:
            return
        self.strategy.memory = {}
        arrays, metrics = self.merged(1, self.arrays, contents)
        others = {client for client in range(CLIENTS) if client != place}
        assert others <= set(self.strategy.last_report.accepted), self.strategy.last_report
        self._check_model(arrays)
        loss = metrics.get("train_loss", 0.0)
        assert math.isfinite(loss), loss
        arrays, _ = self.merged(2, arrays, self.contents)
        assert set(self.strategy.last_report.accepted) == {*others, place}, self.strategy.last_report
        self._check_model(arrays)
        for name, tensor in self.strategy.memory.items():
            assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), name

    def _check_model(self, arrays):
        state = from_arrays(arrays)
        assert list(state) == list(self.model)
        for name, want in self.model.items():
            assert (state[name].dtype, state[name].shape) == (want.dtype, want.shape), name
            assert not want.is_floating_point() or not want.numel() or float(state[name].abs().max()) <= LARGEST, name


@pytest.mark.parametrize("name", NAMED)
def test_no_reply_ends_a_round_of_a_strategy_under_flowers_name(name):
    rounds, found, first = Rounds(name), [], list(NAMED).index(name) % SHARE
    for i, kind in enumerate(KINDS[first::SHARE]):
        place = (0, 2, 4)[i % 3]
        try:
            rounds.check(kind, place)
        except Exception as error:
            found.append(f"{kind}, client {place}: {type(error).__name__}: {error}")
    assert not found, "\n".join(found)


LOUD = {
    "at the bound": lambda tensor: torch.full_like(tensor, LARGEST),
    "a billion": lambda tensor: tensor * 1e9,
    "beyond the bound": lambda tensor: torch.full_like(tensor, 1e20),
    "NaN": lambda tensor: torch.full_like(tensor, math.nan),
    "zeros": torch.zeros_like,
}


class Messages(MergeStrategy):
    """One that looks at replies, and so gets messages."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, list(replies))


@pytest.mark.parametrize("how", LOUD)
@pytest.mark.parametrize("method", ["fedavg", "fednova", "fedatt", "median", "fedavg+server_adam"])
def test_a_loud_client_is_left_out_alike_of_messages_and_of_cohorts(method, how):
    def tamper(state, base, client, round):
        return {name: LOUD[how](tensor) for name, tensor in state.items()} if client == 2 and round == 1 else state

    app = client_app(tiny_model, tiny_data, training=TRAINING, tamper=tamper)
    states = []
    for kind, engine in ((Messages, "serial"), (MergeStrategy, "serial"), (MergeStrategy, "stacked")):
        with SimulationGrid(app, 4, engine=engine) as grid:
            strategy = kind(method, model_fn=tiny_model, fraction_evaluate=0.0)
            states.append(from_arrays(strategy.start(grid, initial(), num_rounds=2).arrays))
            assert strategy.last_report.accepted == (0, 1, 2, 3)
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name
        torch.testing.assert_close(states[2][name], tensor, rtol=1e-4, atol=1e-5)
        assert not tensor.is_floating_point() or float(tensor.abs().max()) < 100, name


def test_a_federation_that_trains_far_is_not_left_out_for_it():
    def tamper(state, base, client, round):
        return {name: tensor * 1e6 * (1 + client) for name, tensor in state.items()}

    app = client_app(tiny_model, tiny_data, training=TRAINING, tamper=tamper)
    outcomes = []
    for kind in (Messages, MergeStrategy):
        with SimulationGrid(app, 4, engine="serial") as grid:
            strategy = kind("fedavg", model_fn=tiny_model, fraction_evaluate=0.0)
            outcomes.append(from_arrays(strategy.start(grid, initial(), num_rounds=1).arrays))
            assert strategy.last_report.accepted == (0, 1, 2, 3)
    assert outcomes[0]["0.weight"].abs().max() > 1e5
    assert all(torch.equal(tensor, outcomes[1][name]) for name, tensor in outcomes[0].items())


def test_a_loss_that_is_no_number_does_not_become_everybodys():
    rounds = Rounds("FedAvg")
    contents = [shallow(content) for content in rounds.contents]
    for told in (math.nan, math.inf):
        contents[1]["metrics"] = MetricRecord({**contents[1]["metrics"], "train_loss": told})
        _, metrics = rounds.merged(1, rounds.arrays, contents)
        assert math.isfinite(metrics["train_loss"])
