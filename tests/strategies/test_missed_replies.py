"""Clients whose reply was not merged take back what they kept of it, so that server and clients agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedmerge.clients.group import Instructions
from fedmerge.clients.local_rules import take_back
from fedmerge.data import ClientData
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.strategies.missed_replies import missed_by, noted
from fedmerge.training import LocalTraining

N, ETA, STEPS, ROUNDS = 4, 2**-7, 3, 5  # the rate travels in 32 bits
LOST = {(1, 1), (1, 2), (3, 2), (0, 4)}
"""Client and round."""


def examples(client):
    rng = np.random.default_rng(client)
    x = rng.normal(size=(5 + client, 3)) + client
    return x, x @ [1.0, -2.0, 0.5] + client


def gradient(w, client):
    """Of the mean squared error of a linear model."""
    x, y = examples(client)
    return 2 * (x @ w - y) @ x / len(x)


def scaffold(x):
    """Karimireddy et al. 2020, algorithm 1, option II, where those who are lost have not taken part."""
    c, own = np.zeros(3), np.zeros((N, 3))
    for number in range(1, ROUNDS + 1):
        there = [i for i in range(N) if (i, number) not in LOST]
        ends, changes = [], []
        for i in there:
            y = x.copy()
            for _ in range(STEPS):
                y -= ETA * (gradient(y, i) - own[i] + c)
            new = own[i] - c + (x - y) / (STEPS * ETA)
            changes.append(new - own[i])
            ends.append(y)
            own[i] = new
        x, c = np.mean(ends, axis=0), c + np.sum(changes, axis=0) / N
        np.testing.assert_allclose(c, own.mean(0), atol=1e-12)
    return x


def feddyn(x, alpha=0.1):
    """Acar et al. 2021, algorithm 1, likewise."""
    h, own = np.zeros(3), np.zeros((N, 3))
    for number in range(1, ROUNDS + 1):
        there = [i for i in range(N) if (i, number) not in LOST]
        ends = []
        for i in there:
            y = x.copy()
            for _ in range(STEPS):
                y -= ETA * (gradient(y, i) - own[i] + alpha * (y - x))
            own[i] -= alpha * (y - x)
            ends.append(y)
        h = h - alpha / N * sum(end - x for end in ends)
        x = np.mean(ends, axis=0) - h / alpha
    return x


def linear():
    made = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(made.weight)
    return made


def pieces(partition, total):
    x, y = (torch.from_numpy(array) for array in examples(partition))
    return ClientData(x, y[:, None], x[:0], y[:0, None])


class Spoilt:
    """What some clients send in some rounds cannot be merged; they have trained and kept what goes with it."""

    def begin(self, client, round):
        pass

    def sends_well(self, client, round):
        return (client, round) not in LOST

    def sent(self, state, client, round):
        return state if self.sends_well(client, round) else {name: t * torch.nan for name, t in state.items()}


class Lossy(Grid):
    """Some replies never arrive."""

    def __init__(self, grid):
        self.grid = grid

    def __getattr__(self, name):
        return getattr(self.grid, name)

    def set_run(self, *given):
        self.grid.set_run(*given)

    run = property(lambda self: self.grid.run)

    def create_message(self, *given, **named):
        return self.grid.create_message(*given, **named)

    def get_node_ids(self):
        return self.grid.get_node_ids()

    def push_messages(self, messages):
        return self.grid.push_messages(messages)

    def pull_messages(self, ids):
        return self.grid.pull_messages(ids)

    def send_and_receive(self, messages, *, timeout=None):
        sent = {m.metadata.dst_node_id: dict(next(iter(m.content.config_records.values()))) for m in messages}
        heard = list(self.grid.send_and_receive(messages, timeout=timeout))
        return [m for m in heard if (self.client(m), sent[m.metadata.src_node_id].get("server-round")) not in LOST]

    def client(self, message):
        return self.grid.partition_of_node(message.metadata.src_node_id)


@pytest.mark.parametrize("road", ["lossy", "message", "serial", "stacked"])
@pytest.mark.parametrize(("method", "reference"), [("scaffold", scaffold), ("feddyn", feddyn)])
def test_it_is_as_if_they_had_not_taken_part(method, reference, road):
    settings = LocalTraining(learning_rate=ETA, momentum=0.0, steps=STEPS, batch_size=99)
    mods = [lambda message, context, call_next: call_next(message, context)] if road == "message" else []
    app = client_app(
        linear, pieces, training=settings, task="regression", mods=mods, mishaps=None if road == "lossy" else Spoilt()
    )
    strategy = MergeStrategy(method, fraction_evaluate=0.0, min_available_nodes=N)
    with SimulationGrid(app, N, engine="stacked" if road == "stacked" else "serial") as grid:
        found = strategy.start(
            Lossy(grid) if road == "lossy" else grid, to_arrays(linear().state_dict()), num_rounds=ROUNDS
        )
    weights = from_arrays(found.arrays)["weight"][0].numpy()
    np.testing.assert_allclose(weights, reference(np.zeros(3)), rtol=1e-9, atol=1e-11)
    assert not missed_by(strategy.memory, grid.get_node_ids())


def told(round, *missed):
    config = ConfigRecord({"server-round": round, "local-rule": "control_variates"})
    if missed:
        config["missed-replies"] = list(missed)
    return Instructions.read(config, LocalTraining())


@pytest.mark.parametrize(
    ("order", "goes_back"),
    [
        (told(4), False),
        (told(4, "7:3"), True),
        (told(4, "7:2"), True),
        (told(6, "7:4"), False),
        (told(4, "8:3"), False),
        (told(3), True),
    ],
)
def test_who_goes_back_and_who_does_not(order, goes_back):
    """Having last trained in round 3, node 7; a server that comes with round 3 again repeats it."""
    kept = RecordDict(
        {
            "fedmerge.rule.control_variates": to_arrays({"w": torch.ones(1)}),
            "fedmerge.before.control_variates": to_arrays({"w": torch.zeros(1)}),
            "fedmerge.round.control_variates": ConfigRecord({"round": 3}),
        }
    )
    take_back(kept, order, 7)
    assert from_arrays(kept.array_records["fedmerge.rule.control_variates"])["w"].tolist() == [
        0.0 if goes_back else 1.0
    ]
    take_back(kept, order, 7)  # once only
    assert from_arrays(kept.array_records["fedmerge.rule.control_variates"])["w"].tolist() == [
        0.0 if goes_back else 1.0
    ]


def test_a_memory_of_replies_survives_numbers_of_sixty_four_bits():
    node = 2**64 - 5
    memory = noted({"aggregator/x": torch.ones(1)}, [node, 3], {3}, 2)
    assert missed_by(memory, [3, node]) == [f"{node}:2"]
    assert set(noted(memory, [node], {node}, 4)) == {"aggregator/x"}
