"""The kinds are what they say: each spoils something, leaves what is honest as it was, and is drawn from a seed."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings

from fedmerge import ClientUpdate
from fedmerge.questions import Question, respond
from fedmerge.statistics import FisherDiag, FisherKfac
from fedmerge.wire.record_values import from_arrays
from tests.answered import asked
from tests.federation import noisy_states, tiny_data, tiny_model
from tests.hostile.kinds import (
    ANSWERS,
    IDENTITY,
    METRICS,
    STATES,
    STATISTICS,
    WEIGHTS,
    hostile_reply,
    hostile_update,
    updates_of,
)
from tests.random_statistics import random_diagonal, random_grams, random_kfac

REPLIES = [kind for table in (STATES, WEIGHTS, METRICS, STATISTICS) for kind in table.values()]


def copied(value):
    return {n: copied(t) if isinstance(t, dict) else t.clone() for n, t in value.items()}


def same(one, two):
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[n], two[n]) for n in one)
    return one.dtype == two.dtype and one.shape == two.shape and one.equal(two)


def tied_model():
    return {"embed.weight": torch.arange(12.0).reshape(4, 3), "head.weight": torch.arange(12.0).reshape(4, 3)}


def honest(state):
    """An update with a statistic of every form."""
    statistics = {
        "fisher_kfac": random_kfac(state, 1), "gram": random_grams(state, 1),
        "fisher_diag": random_diagonal(state, 1), "class_counts": {"class_counts": torch.tensor([3, 0, 5])},
        "local_steps": {"local_steps": torch.tensor(3.0)},
    }  # fmt: skip
    return ClientUpdate(1, state, 8.0, statistics)


HONEST = [(honest(noisy_states()[1]), tiny_model().state_dict()), (honest(tied_model()), tied_model())]


@pytest.mark.parametrize("table", [STATES, WEIGHTS, STATISTICS], ids=["states", "weights", "statistics"])
def test_a_kind_of_update_differs_from_the_honest_one_and_leaves_it_alone(table):
    for kind in table.values():
        differ = False
        for update, model in HONEST:
            state, statistics = copied(update.state), copied(update.statistics)
            bad = hostile_update(kind, random.Random(3), update, model)
            assert same(update.state, state), kind
            assert same(update.statistics, statistics), kind
            if bad is not None:
                equal = same(dict(bad.state), state) and same(dict(bad.statistics), statistics)
                differ |= not equal or bad.weight != 8.0
                again = hostile_update(kind, random.Random(3), update, model)
                assert list(bad.state) == list(again.state), kind
                assert all(torch.equal(t.isnan(), again.state[n].isnan()) for n, t in bad.state.items()), kind
        assert differ, kind


def test_every_kind_of_reply_is_made_of_some_methods_reply():
    left = {str(kind) for kind in REPLIES if kind.name != "tied tensors that differ"}
    for method in ("fedavg", "regmean", "fisher", "fedma", "fednova"):
        known = asked(method)
        model = from_arrays(known.arrays)
        left -= {str(k) for k in REPLIES if hostile_reply(k, random.Random(1), known.contents[1], model) is not None}
    assert not left


def test_every_kind_of_answer_and_of_identity_is_made():
    data = tiny_data(1, 3)
    question = Question(
        tiny_model().state_dict(), ({"3.bias": torch.ones(3)},), ((0.0,), (1.0,)), needs=(FisherKfac(), FisherDiag())
    )
    answer = respond(question, tiny_model(), [(data.train_x, data.train_y)])
    made = {name for name, kind in ANSWERS.items() if kind(random.Random(1), answer, question) is not None}
    assert {name for name in ANSWERS if name not in made} <= {
        name for name in ANSWERS if name.startswith(("statistic counts", "statistic steps", "statistic momentum",
                                                     "statistic learning", "statistic a hundred times the",
                                                     "statistic a million steps"))
    }  # fmt: skip
    replies = asked("fedavg").replies()
    for kind in IDENTITY.values():
        sent = kind(random.Random(1), replies, 1)
        assert len(sent) >= len(replies)
        assert any(reply not in replies for reply in sent), kind


@settings(max_examples=30, deadline=None, derandomize=True)
@given(updates_of(ClientUpdate(0, noisy_states()[0], 8.0), tiny_model().state_dict(), STATES, WEIGHTS))
def test_hypothesis_draws_kinds_with_what_they_make(pair):
    kind, update = pair
    assert kind.place in ("state", "weight")
    assert update.client == 0
