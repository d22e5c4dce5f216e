"""Random streams: apart from each other, the same everywhere, and nothing of the global ones."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.seeding import generator, integer_seed, torch_generator
from fedmerge.training import LocalTraining, evaluate, train
from fedmerge.training.seeding_many import Streams

KEYS = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 1), (0, "a", 1, 0), (0, "a", 1, 1)]


@pytest.mark.parametrize("draw", [integer_seed, lambda *key: generator(*key).integers(2**60)])
def test_streams_differ_by_seed_purpose_and_key(draw):
    draws = {key: int(draw(*key)) for key in KEYS}
    assert len(set(draws.values())) == len(KEYS)
    assert draws == {key: int(draw(*key)) for key in KEYS}


@pytest.mark.parametrize("seed", [0, 7, 2**33 + 5, 2**130 + 17])
@pytest.mark.parametrize("clients", [[0, 3, 2**32 - 1, 17], [2**32, 5], [2**63], []])
@pytest.mark.parametrize("key", [(), (1,), (2**40,), (1, 2, 3)])
def test_generators_of_many_clients_are_those_of_each(seed, clients, key):
    # The odd 32-bit draw leaves half a word over, which must not reach the next client.
    rows = [*range(len(clients)), *range(len(clients))[::-1]]
    streams = Streams(seed, "batches", clients, *key).generators(rows)
    many = [(g.permutation(50).tolist(), g.integers(9, dtype="i4")) for g in streams]
    each = [generator(seed, "batches", clients[row], *key) for row in rows]
    assert many == [(g.permutation(50).tolist(), g.integers(9, dtype="i4")) for g in each]


def test_torch_streams_are_apart_and_repeatable():
    draws = {key: torch.rand(1, generator=torch_generator(*key)).item() for key in KEYS}
    assert len(set(draws.values())) == len(KEYS)
    assert draws == {key: torch.rand(1, generator=torch_generator(*key)).item() for key in KEYS}


def test_streams_are_the_same_in_every_process_and_version():
    """Golden numbers: whoever changes them makes recorded runs impossible to repeat."""
    assert integer_seed(0, "batches", 3, 1) == 2450807451119174733
    assert integer_seed(7, "dropout") == 6024666715418567676
    assert generator(0, "batches", 3, 1).integers(0, 1000, 5).tolist() == [675, 961, 504, 549, 334]
    assert torch_generator(0, "a").initial_seed() == 5213239120382857277


@contextmanager
def untouched_global_generators():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1:3], random.getstate()  # noqa: NPY002

    before = states()
    yield
    after = states()
    assert before[0] == after[0]
    assert (before[1][0] == after[1][0]).all()
    assert before[1][1] == after[1][1]
    assert before[2] == after[2]


@pytest.mark.parametrize("method", ["fedavg", "fednova", "fedatt", "fedavg+server_adam"])
def test_merging_leaves_global_generators_alone(method):
    models, start = [nn.Linear(3, 3), nn.Linear(3, 3)], nn.Linear(3, 3)
    options = {"noise": 0.1} if method == "fedatt" else {}
    with untouched_global_generators():
        fedmerge.merge(models, method, base=start, statistics=[{"local_steps": 3}] * 2, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_and_measuring_leave_global_generators_alone(optimizer):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    x, y = torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)
    with untouched_global_generators():
        train(model, x, y, LocalTraining(optimizer=optimizer), seed=0, client=0, round=1)
        evaluate(model, x, y)
        fedmerge.compute_statistics(model.train(), [(x, y)], ["batch_norm"])


def test_a_merge_does_not_depend_on_global_generators():
    models, start = [nn.Linear(3, 3), nn.Linear(3, 3)], nn.Linear(3, 3)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(fedmerge.merge(models, "fedatt", base=start, noise=0.1, seed=5).weight)
    assert torch.equal(*results)
    assert not torch.equal(results[0], fedmerge.merge(models, "fedatt", base=start, noise=0.1, seed=6).weight)
