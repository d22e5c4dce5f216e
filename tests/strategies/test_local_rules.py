"""Methods that change the clients' training: against NumPy, by every road, and refused where they mean nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import nn

from fedmerge.data import ClientData
from fedmerge.errors import InvalidOption, NoUsableUpdates, UnknownName
from fedmerge.simulation import SimulationGrid
from fedmerge.statistics import LocalSteps
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.training import LocalTraining
from tests.federation import CLIENTS, TRAINING, initial, plain_model, tiny_data, tiny_model

N, ETA, STEPS, ROUNDS = 5, 0.3, 4, 5
SIZES = (6, 9, 4, 7, 5)


def examples(client):
    """Of a client whose classes lie elsewhere than those of the others."""
    rng = np.random.default_rng(client)
    x = rng.normal(size=(SIZES[client], 3)) + client
    return x, (x @ [1.0, -2.0, 0.5] + rng.normal(size=len(x)) > client / 3).astype(int)


def gradient(weights, client):
    """Of the mean cross-entropy of softmax regression; weights [2, 4] with the bias last."""
    x, y = examples(client)
    x = np.hstack([x, np.ones((len(x), 1))])
    scores = np.exp(x @ weights.T)
    return (scores / scores.sum(1, keepdims=True) - np.eye(2)[y]).T @ x / len(x)


def scaffold(x, chosen, server_lr=1.0):
    """Karimireddy et al. 2020, algorithm 1, option II."""
    c, own = np.zeros_like(x), np.zeros((N, *x.shape))
    for clients in chosen:
        moves, changes = [], []
        for i in clients:
            y = x.copy()
            for _ in range(STEPS):
                y -= ETA * (gradient(y, i) - own[i] + c)
            new = own[i] - c + (x - y) / (STEPS * ETA)
            moves.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x, c = x + server_lr * np.mean(moves, axis=0), c + np.sum(changes, axis=0) / N
    return x


def feddyn(x, chosen, alpha=0.1):
    """Acar et al. 2021, algorithm 1, by gradient steps."""
    h, own = np.zeros_like(x), np.zeros((N, *x.shape))
    for clients in chosen:
        ends = []
        for i in clients:
            y = x.copy()
            for _ in range(STEPS):
                y -= ETA * (gradient(y, i) - own[i] + alpha * (y - x))
            own[i] -= alpha * (y - x)
            ends.append(y)
        h = h - alpha / N * sum(end - x for end in ends)
        x = np.mean(ends, axis=0) - h / alpha
    return x


METHODS = {
    "scaffold": scaffold,
    "scaffold(server_lr=0.5)": lambda x, chosen: scaffold(x, chosen, 0.5),
    "feddyn": feddyn,
    "feddyn(alpha=0.7)": lambda x, chosen: feddyn(x, chosen, 0.7),
}


def linear():
    made = nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        made.weight.copy_(torch.arange(6.0).view(2, 3) / 10)
        made.bias.zero_()
    return made


def pieces(partition, total):
    x, y = (torch.from_numpy(array) for array in examples(partition))
    return ClientData(x, y, x[:0], y[:0])


def by_message(message, context, call_next):
    """A mod that changes nothing: there is one, and so messages are sent."""
    return call_next(message, context)


ROADS = {"message": ([by_message], "serial"), "serial": ([], "serial"), "stacked": ([], "stacked")}


def run(method, road, app, clients, start, rounds, fraction=1.0, config=None):
    """The model after some rounds, and who took part in each."""
    mods, engine = ROADS[road]
    strategy = MergeStrategy(
        method, fraction_train=fraction, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=clients, seed=4
    )
    chosen = []

    def note(round, arrays):
        if round:
            chosen.append(strategy.last_report.accepted)

    with SimulationGrid(app(mods), clients, engine=engine) as grid:
        found = strategy.start(
            grid, start, num_rounds=rounds, evaluate_fn=note, train_config=ConfigRecord(config or {})
        )
    return from_arrays(found.arrays), chosen, strategy


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("method", METHODS)
def test_the_dozen_lines_of_numpy(method, road):
    """Three of five clients a round, in float64."""
    settings = LocalTraining(learning_rate=ETA, momentum=0.0, steps=STEPS, batch_size=99)

    def app(mods):
        return client_app(linear, pieces, training=settings, mods=mods)

    found, chosen, _ = run(method, road, app, N, to_arrays(linear().state_dict()), ROUNDS, 0.6)
    assert {len(clients) for clients in chosen} == {3}
    assert set(chosen[0]) < set().union(*chosen)  # somebody is asked for the first time later
    start = np.hstack([linear().weight.detach().numpy(), np.zeros((2, 1))])
    want = METHODS[method](start, chosen)
    np.testing.assert_allclose(np.hstack([found["weight"], found["bias"][:, None]]), want, rtol=1e-9, atol=1e-11)


SETTINGS = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9, "schedule": "cosine", "total_rounds": 3},
    "within": {"momentum": 0.5, "step_schedule": "warmup(length=3)+cosine(floor=0.1)", "clip_norm": 1.0},
    "adam": {"optimizer": "adam", "learning_rate": 0.01, "schedule": "step(every=1,factor=0.5)"},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.01, "step_schedule": "warmup(length=2)"},
}
RULES = [
    (method, kind)
    for method in ("fedprox(proximal_mu=0.3)", "scaffold", "feddyn")
    for kind in SETTINGS
    if (method, SETTINGS[kind].get("optimizer")) not in (("scaffold", "adam"), ("scaffold", "adamw"))
]


@pytest.mark.parametrize(("method", "kind"), RULES)
def test_every_road_leads_to_the_same_model(method, kind):
    training = replace(TRAINING, **SETTINGS[kind])

    def app(mods):
        return client_app(plain_model, tiny_data, training=training, mods=mods)  # Adam makes noise of unused biases

    message, serial, stacked, average = (
        run(name, road, app, CLIENTS, initial(plain_model), 3)[0]
        for name, road in ((method, "message"), (method, "serial"), (method, "stacked"), ("fedavg", "serial"))
    )
    for name, tensor in message.items():
        assert torch.equal(serial[name], tensor), name
        torch.testing.assert_close(stacked[name], tensor, rtol=1e-4, atol=1e-5)
    assert not all(torch.allclose(average[name], tensor, atol=1e-4) for name, tensor in message.items())


def tiny(mods, **training):
    return client_app(tiny_model, tiny_data, training=replace(TRAINING, **training), mods=mods)


@pytest.mark.parametrize("road", ROADS)
def test_control_variates_of_adam_are_refused(road):
    with pytest.raises((InvalidOption, NoUsableUpdates), match="mean gradients, read off the steps of SGD"):
        run("scaffold", road, lambda mods: tiny(mods, optimizer="adam"), CLIENTS, initial(), 1)


def test_a_rule_that_clients_do_not_know_is_told():
    with pytest.raises((UnknownName, NoUsableUpdates), match="local rule 'momentous'"):
        run("fedavg", "serial", tiny, CLIENTS, initial(), 1, config={"local-rule": "momentous"})
    told = {"local-rule": "dynamic", "local-rule-settings": '{"alhpa": 1.0}'}
    with pytest.raises((UnknownName, NoUsableUpdates), match="option of dynamic 'alhpa'"):
        run("fedavg", "message", tiny, CLIENTS, initial(), 1, config=told)


def test_tensors_of_another_model_are_not_added_to_gradients():
    strategy = MergeStrategy("scaffold", fraction_evaluate=0.0, min_available_nodes=CLIENTS)
    strategy.memory = {"aggregator/0.weight": torch.zeros(1, 1)}
    with (
        SimulationGrid(tiny([]), CLIENTS) as grid,
        pytest.raises((InvalidOption, NoUsableUpdates), match="one architecture"),
    ):
        strategy.start(grid, initial(), num_rounds=1)


def test_what_goes_out_and_what_comes_back():
    """c goes out beside the model from the second round on; clients send their model and numbers, and keep c_i."""
    sent, received, kept = [], [], []

    def look(message, context, call_next):
        sent.append({key: set(record) for key, record in message.content.array_records.items()})
        reply = call_next(message, context)
        received.append(list(reply.content.array_records))
        kept.append(set(context.state.array_records["fedmerge.rule.control_variates"]))
        return reply

    _, _, strategy = run("scaffold", "message", lambda mods: tiny([look]), CLIENTS, initial(), 2)
    parameters = {name for name, _ in tiny_model().named_parameters()}
    assert [list(records) for records in sent] == [["arrays"]] * CLIENTS + [["arrays", "local-rule"]] * CLIENTS
    assert sent[-1]["local-rule"] == parameters
    assert all(records == ["arrays", "statistics.local_steps"] for records in received)
    assert kept == [parameters] * 2 * CLIENTS
    assert {name.removeprefix("aggregator/") for name in strategy.memory} == parameters


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_the_number_of_all_clients_may_be_told(method):
    """A federation of which a deployment sees a part."""
    found = [run(f"{method}(population={n})", "serial", tiny, CLIENTS, initial(), 2)[0] for n in (CLIENTS, 50)]
    usual = run(method, "serial", tiny, CLIENTS, initial(), 2)[0]
    assert all(torch.equal(tensor, found[0][name]) for name, tensor in usual.items())
    assert not torch.allclose(found[1]["0.weight"], usual["0.weight"], atol=1e-5)


def test_clients_count_by_their_examples_where_they_are_to():
    settings = LocalTraining(learning_rate=ETA, momentum=0.0, steps=1, batch_size=99)

    def app(mods):
        return client_app(linear, pieces, training=settings, mods=mods)

    start: ArrayRecord = to_arrays(linear().state_dict())
    found, *_ = run("scaffold(weighted=true)", "serial", app, N, start, 1)
    average, *_ = run("fedavg", "serial", app, N, start, 1)
    for name, tensor in average.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14)


def test_a_learning_rate_that_would_blow_up_what_is_divided_by_it_stands_out():
    kind = LocalSteps(rated=True)
    rates = {0: 0.1, 1: 0.1, 2: 0.05, 3: 0.001}
    told = {client: (kind.parse({"local_steps": 5, "learning_rate": rate}), 10.0) for client, rate in rates.items()}
    assert list(kind.outlying(told)) == [3]
    assert not LocalSteps().outlying(told)


def test_steps_without_a_learning_rate_are_no_answer_where_it_is_needed():
    with pytest.raises(InvalidOption, match="learning_rate"):
        LocalSteps(rated=True).parse({"local_steps": 5})
    assert LocalSteps().parse({"local_steps": 5})["learning_rate"] == 0
