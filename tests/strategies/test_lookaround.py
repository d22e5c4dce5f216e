"""Lookaround: clients' momentum goes on from round to round, by every road, against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmerge.errors import InvalidOption, NoUsableUpdates
from fedmerge.strategies import client_app, to_arrays
from fedmerge.training import LocalTraining
from tests.federation import CLIENTS, TRAINING, initial, tiny_data, tiny_model
from tests.strategies.test_local_rules import ROADS, ROUNDS, N, gradient, linear, pieces, run

ETA, RHO, STEPS = 0.1, 0.8, 3
SETTINGS = LocalTraining(learning_rate=ETA, momentum=RHO, steps=STEPS, batch_size=99)


def lookaround(x, chosen, rho=RHO):
    """Zhang et al. 2023, algorithm 1, with one momentum for each copy."""
    velocities = np.zeros((N, *x.shape))
    for clients in chosen:
        ends = []
        for i in clients:
            y = x.copy()
            for _ in range(STEPS):
                velocities[i] = rho * velocities[i] + gradient(y, i)
                y -= ETA * velocities[i]
            ends.append(y)
        x = np.mean(ends, axis=0)
    return x


def of(settings):
    return lambda mods: client_app(linear, pieces, training=settings, mods=mods)


def trained(method, road, settings, clients=N, rounds=ROUNDS, fraction=1.0):
    found, chosen, _ = run(method, road, of(settings), clients, to_arrays(linear().state_dict()), rounds, fraction)
    return np.hstack([found["weight"], found["bias"][:, None]]), chosen


START = np.hstack([linear().weight.detach().numpy(), np.zeros((2, 1))])


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_the_dozen_lines_of_numpy(fraction, road):
    found, chosen = trained("lookaround", road, SETTINGS, fraction=fraction)
    np.testing.assert_allclose(found, lookaround(START, chosen), rtol=1e-9, atol=1e-11)
    assert abs(found - trained("fedavg", road, SETTINGS, fraction=fraction)[0]).max() > 1e-3


def test_one_client_is_sgd_however_its_steps_are_cut_into_rounds():
    whole, _ = trained("fedavg", "serial", replace(SETTINGS, steps=12), 1, 1)
    for steps in (1, 3):
        found, _ = trained("lookaround", "serial", replace(SETTINGS, steps=steps), 1, 12 // steps)
        np.testing.assert_allclose(found, whole, rtol=1e-12, atol=1e-14)
    assert abs(trained("fedavg", "serial", SETTINGS, 1, 4)[0] - whole).max() > 1e-2


def test_without_momentum_it_is_the_plain_mean():
    plain = replace(SETTINGS, momentum=0.0)
    found, chosen = trained("lookaround", "serial", plain)
    np.testing.assert_allclose(found, lookaround(START, chosen, 0.0), rtol=1e-9, atol=1e-11)


REFUSED = {
    "take sgd": {"optimizer": "adam"},
    "divides a round in two": {"personal_epochs": 1},
    "whose momentum is gone": {"patience": 1},
    "makes its optimiser itself": {"train_fn": print},
}


@pytest.mark.parametrize("road", ["message", "serial"])
@pytest.mark.parametrize("words", REFUSED)
def test_training_without_such_a_momentum_is_refused(words, road):
    def app(mods):
        return client_app(tiny_model, tiny_data, training=replace(TRAINING, **REFUSED[words]), mods=mods)

    with pytest.raises((InvalidOption, NoUsableUpdates), match=words):
        run("lookaround", road, app, CLIENTS, initial(), 1)


def test_what_is_kept_is_the_momentum_and_stays_with_the_client():
    kept, sent = [], []

    def look(message, context, call_next):
        reply = call_next(message, context)
        kept.append(context.state.array_records["fedmerge.rule.kept_momentum"])
        sent.append([*message.content.array_records, *reply.content.array_records])
        return reply

    settings = replace(TRAINING, momentum=0.5)

    def app(mods):
        return client_app(tiny_model, tiny_data, training=settings, mods=[look])

    run("lookaround", "message", app, CLIENTS, initial(), 1)
    assert {name for record in kept for name in record} == {name for name, _ in tiny_model().named_parameters()}
    assert all(records == ["arrays", "arrays"] for records in sent)
    assert all(torch.from_numpy(array.numpy()).abs().max() > 0 for array in kept[0].values())
