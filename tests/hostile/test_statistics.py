"""Every statistic there is, after training and in answers: no kind of value ends a merge, nor is one obeyed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.adapters import lora
from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.merging import Pipeline
from fedmerge.questions import Question, pooled, respond
from fedmerge.statistics import (
    Activations,
    AdapterScaling,
    BatchNormMoments,
    BatchNormSums,
    ClassCounts,
    ClassMoments,
    EntropyGradient,
    EntropySlopes,
    FisherDiag,
    FisherKfac,
    Gram,
    HeadGradient,
    HeadSums,
    LocalSteps,
    LossGradient,
    LossSlopes,
    PrefixSums,
    RefitSums,
    Secants,
    Statistic,
    SurgerySums,
)
from fedmerge.statistics.sending.compression import decode
from tests.federation import noisy_states, tiny_data, tiny_model
from tests.hostile.kinds import STATISTICS

MEASURED = (
    Activations(),
    BatchNormMoments(),
    ClassCounts(),
    FisherDiag(),
    FisherKfac(),
    Gram(),
    LocalSteps(),
)
ANSWERED = (
    BatchNormSums(),
    ClassMoments(),
    EntropyGradient(),
    EntropySlopes(),
    HeadGradient(),
    HeadSums(),
    LossGradient(),
    LossSlopes(),
    PrefixSums(),
    RefitSums(),
    Secants(),
    SurgerySums(),
)
CLIENTS, PLACES = 4, (0, 1, 3)
STEPS = {n: torch.tensor(float(x)) for n, x in
         {"local_steps": 4, "momentum": 0.5, "learning_rate": 0.1, "proximal_mu": 0}.items()}  # fmt: skip


@dataclass(frozen=True)
class Listening(Aggregator):
    """Merges nothing, and keeps the statistics that got through."""

    kind: Statistic

    @property
    def needs(self) -> Sequence[Statistic]:
        return (self.kind,)

    def merge(self, updates, context, memory):
        taken = list(updates)
        for update in taken:
            values = update.statistics[self.kind.name].values()
            assert all(bool(t.isfinite().all()) for t in values)
        return taken[-1].state, {}


def module(client):
    found = tiny_model()
    found.load_state_dict(noisy_states(CLIENTS)[client])
    return found


@cache
def update(kind, client):
    data = tiny_data(client, CLIENTS)
    value = STEPS if kind == LocalSteps() else kind.measure(module(client), [(data.train_x, data.train_y)], None)
    value = {n: t.detach() for n, t in value.items()}
    return ClientUpdate(client, noisy_states(CLIENTS)[client], float(len(data.train_x)), {kind.name: value})


def hostile(kind, name, seed):
    sent = STATISTICS[name](random.Random(seed), update(kind, 1).statistics[kind.name], kind.name)
    return None if sent is None else replace(update(kind, 1), statistics=sent)


@pytest.mark.parametrize("kind", MEASURED, ids=lambda kind: kind.name)
def test_no_kind_of_a_measured_statistic_ends_a_merge_or_is_obeyed(kind):
    context = MergeContext(base=tiny_model().state_dict())
    obeyed = []
    for i, (name, how) in enumerate(STATISTICS.items()):
        bad = hostile(kind, name, 1)
        if bad is None:
            continue
        place = PLACES[i % 3]
        sent = [replace(update(kind, client), client=client) for client in range(CLIENTS)]
        sent[place] = replace(bad, client=place)
        result = Pipeline(Listening(kind)).merge(sent, context)
        others = tuple(client for client in range(CLIENTS) if client != place)
        assert set(others) <= set(result.accepted), name
        if how.must_drop and place in result.accepted:
            obeyed.append(name)
    assert not obeyed


@cache
def question(kind):
    steps = {n: 0.1 * t.detach() for n, t in tiny_model().named_parameters()}
    return Question(tiny_model().state_dict(), (steps, steps), ((0.0, 0.0), (1.0, 1.0)), at=None, needs=(kind,))


@cache
def answers(kind):
    found = []
    for client in range(CLIENTS):
        data = tiny_data(client, CLIENTS)
        batches = [(data.train_x, data.train_y)]
        found.append((client, [respond(question(kind), tiny_model(), batches, own=module(client))]))
    return found


def same(one, two):
    return torch.equal(one.losses, two.losses) and all(
        torch.equal(t, two.statistics[kind][n]) for kind, value in one.statistics.items() for n, t in value.items()
    )


@pytest.mark.parametrize("kind", [*ANSWERED, *MEASURED[3:-1]], ids=lambda kind: kind.name)
def test_no_kind_of_a_statistic_in_an_answer_ends_the_exchange_or_is_obeyed(kind):
    obeyed = []
    for i, (name, how) in enumerate(STATISTICS.items()):
        honest = answers(kind)[1][1][0]
        sent = how(random.Random(1), decode(honest.statistics[kind.name]), kind.name)
        if sent is None:
            continue
        place = PLACES[i % 3]
        given = list(answers(kind))
        bad = replace(given[place][1][0], statistics=sent)
        given[place] = (place, [bad])
        (total,) = pooled([question(kind)], given)
        assert all(bool(t.isfinite().all()) for value in total.statistics.values() for t in value.values()), name
        (without,) = pooled([question(kind)], [one for one in given if one[0] != place])
        if how.must_drop and not same(total, without):
            obeyed.append(name)
    assert not obeyed


def test_every_registered_statistic_is_tried():
    def all_of(kind):
        return {one for below in kind.__subclasses__() for one in {below, *all_of(below)}}

    found = {kind for kind in all_of(Statistic) if "name" in vars(kind) and kind.__module__.startswith("fedmerge.")}
    # Scalings, of models with low-rank pairs only, are tried by themselves below.
    assert {type(kind) for kind in (*MEASURED, *ANSWERED, AdapterScaling())} == found


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 0.0, -1.0, 1e9, [1.0, 2.0]],
    ids=["nan", "inf", "zero", "negative", "huge", "several"],
)
def test_a_scaling_that_no_layer_has_is_not_obeyed(value):
    model = lora(torch.nn.Linear(3, 2), rank=2, alpha=8)
    honest = AdapterScaling().measure(model, [], None)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    bad = dict.fromkeys(honest, torch.tensor(value, dtype=torch.float64))
    updates = [ClientUpdate(i, state, 1.0, {"adapter_scaling": bad if i == 1 else honest}) for i in range(3)]
    result = Pipeline(Listening(AdapterScaling())).merge(updates, MergeContext(base=state))
    assert result.accepted == (0, 2)
