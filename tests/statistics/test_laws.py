"""Identities of sums: honest clients keep them whatever their task, and forged sums break them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmerge.questions import Question, Trust, respond
from fedmerge.questions.pooling import sifted
from fedmerge.state import module_state
from fedmerge.statistics import HeadGradient, HeadSums, LossGradient
from fedmerge.statistics.compression import decode
from fedmerge.statistics.laws import breaches, cancelling, labelled
from fedmerge.tasks import Regression

CLIENTS, LIAR = 5, 3


def net(bias=True, outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, outputs, bias=bias))


def drawn(client, targets):
    generator = torch.Generator().manual_seed(client)
    return torch.randn(24, 4, generator=generator), targets(generator)


def labels(generator):
    return torch.randint(3, (24,), generator=generator)


def ignored(generator):
    found = labels(generator)
    found[::4] = -100
    return found


def numbers(generator):
    return torch.randn(24, 3, generator=generator)


def one_class(generator):
    return torch.full((24,), int(torch.randint(3, (1,), generator=generator)))


def answers(kind, model, targets, lie=lambda name, tensor: tensor, task=None, first=labels):
    """What clients answer; the first one has other targets, the liar's are changed."""
    question = Question(module_state(model)[0], needs=(kind,))
    given = []
    for client in range(CLIENTS):
        answer = respond(question, model, [drawn(client, first if client == 0 else targets)], task=task)
        if client == LIAR:
            changed = {name: lie(name, t.clone()) for name, t in decode(answer.statistics[kind.name]).items()}
            answer = replace(answer, statistics={kind.name: changed})
        given.append((client, [answer]))
    return [question], given


def refused(*arguments, **keywords):
    return sifted(*answers(*arguments, **keywords), Trust())[1]


@pytest.mark.parametrize("kind", [HeadSums(), HeadGradient(), LossGradient()], ids=lambda kind: kind.name)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [labels, ignored, one_class])
def test_honest_clients_keep_them(kind, bias, targets):
    for first in (labels, ignored):
        assert not refused(kind, net(bias), targets, first=first)


@pytest.mark.parametrize("kind", [HeadSums(), HeadGradient(), LossGradient()], ids=lambda kind: kind.name)
def test_identities_of_labels_are_asked_of_nobody_in_a_regression(kind):
    assert not refused(kind, net(), numbers, task=Regression(), first=numbers)
    assert not refused(kind, net(), numbers, lambda name, t: -t if name.endswith(".C") else t, Regression(), numbers)


FORGED = {
    "C negated": lambda name, t: -t if name.endswith(".C") else t,
    "C of noise": lambda name, t: torch.randn_like(t) * t.norm() if name.endswith(".C") else t,
    "all of it three times": lambda name, t: 3 * t,
    "one class taken from another": lambda name, t: moved(t) if name.endswith(".C") else t,
    "features of one class too large": lambda name, t: tilted(t) if name.endswith(".C") else t,
}


def moved(tensor):
    tensor[0] += 2 * tensor[1]
    tensor[1] -= 2 * tensor[1]  # the sum stays; a frequency is below zero
    return tensor


def tilted(tensor):
    tensor[0, :-1] += 5
    tensor[1, :-1] -= 5
    return tensor


@pytest.mark.parametrize("forged", FORGED)
def test_forged_moments_of_labelled_features_are_refused(forged):
    found = refused(HeadSums(), net(), labels, FORGED[forged])
    assert list(found) == [LIAR]
    assert "identity" in found[LIAR]


@pytest.mark.parametrize("kind", [HeadGradient(), LossGradient()], ids=lambda kind: kind.name)
def test_gradients_that_no_softmax_has_are_refused(kind):
    noise = torch.Generator().manual_seed(0)
    head = ("2.weight.gradient", "2.weight", "2.bias")
    found = refused(kind, net(), labels, lambda n, t: torch.randn(t.shape, generator=noise) if n in head else t)
    assert list(found) == [LIAR]


def test_nobody_is_refused_where_half_of_the_clients_break_one():
    assert breaches([{"a": 0.0}, {"a": 0.0}, {"a": 0.5}, {"a": 0.5}]) == {}
    assert breaches([{"a": 0.0, "b": 0.3}, {"a": 0.15, "b": 0.3}, {"a": 0.0, "b": 0.0}]) == {}
    assert breaches([{"a": 0.0}, {"a": float("nan")}, {"a": 0.0}]) == {1: "a"}
    assert breaches([{"a": 0.0}, {}, {"a": 0.0}]) == {1: "a"}


def test_errors_are_relative_to_what_is_summed():
    assert cancelling(torch.tensor([[1.0], [-0.5]])) == pytest.approx(1 / 3)
    assert cancelling(torch.zeros(2, 2)) == 0
    h = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    second, crossed = h.T @ h / 3, y.T @ h / 3
    assert max(labelled(second, crossed).values()) == pytest.approx(0, abs=1e-12)
    crossed[0] *= 1.3  # 2/3 of the labels, times 0.3; the last row of S is (2, 1)
    assert labelled(second, crossed)["one-hot labels"] == pytest.approx((0.4 + 0.2) / (2.4 + 1.2))
