"""Identities of sums: honest clients keep them whatever their task, and forged sums break them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmerge.questions import Question, Trust, respond
from fedmerge.questions.pooling import pooled, sifted
from fedmerge.state import module_state
from fedmerge.statistics import HeadGradient, HeadSums, LossGradient
from fedmerge.statistics.sending.compression import decode
from fedmerge.statistics.sending.laws import Breach, breaches, cancelling, labelled
from fedmerge.tasks import Binary, Classification, Regression, make_task

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


@pytest.mark.parametrize("constant", [(0.2, 0.3, 0.5), (0.5, 0.5, 0.0)])
def test_numbers_that_happen_to_add_up_to_one_refuse_nobody_whose_do_not(constant):
    """A regression on the same numbers at all clients but one, whose task nobody has told the server."""

    def same(generator):
        return torch.tensor(constant).expand(24, 3).clone()

    assert not refused(HeadSums(), net(), same, task=Regression(), first=numbers)


FORGED = {
    "C negated": lambda name, t: -t if name.endswith(".C") else t,
    "C of noise": lambda name, t: torch.randn_like(t) * t.norm() if name.endswith(".C") else t,
    "labels three times": lambda name, t: 3 * t if name.endswith(".C") else t,
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


KINDS = [HeadSums(), HeadGradient(), LossGradient()]


def refused_of(model, data, task=None, compression="none", budget=1.0):
    """Who is refused of honest clients, by any statistic with identities."""
    found = {}
    for kind in KINDS:
        question = Question(module_state(model)[0], needs=(kind,), compression=compression, budget=budget)
        given = [(c, [respond(question, model, [data(c)], task=task)]) for c in range(CLIENTS)]
        found |= sifted([question], given, Trust())[1]
    return found


def inputs(client, count=24):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(client))


def only(client, odd, usual):
    """Targets of all clients, and those of the last."""
    return torch.full((24,), odd if client == CLIENTS - 1 else usual)


def confident(score):
    """A model that is all but certain of class 0."""
    model = net()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([score, 0.0, 0.0]))
    return model


@pytest.mark.parametrize("usual", [0.0, 1.0])
def test_clients_of_a_binary_task_may_have_one_class_each(usual):
    model = net(outputs=1)
    assert not refused_of(model, lambda c: (inputs(c), only(c, 1 - usual, usual)), Binary())


def test_clients_of_other_tasks_may_have_targets_that_look_like_one_hot_labels_at_most():
    assert not refused_of(net(outputs=1), lambda c: (inputs(c), only(c, 2.0, 1.0)[:, None]), Regression())
    usual, odd = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    labels_of = lambda c: (odd if c == CLIENTS - 1 else usual).expand(24, 3)  # noqa: E731
    assert not refused_of(net(), lambda c: (inputs(c), labels_of(c)), make_task("multilabel"))


def test_a_client_of_a_class_that_counts_more_keeps_them():
    weighted = Classification(class_weights=(1.0, 1.0, 6.0))
    assert not refused_of(net(), lambda c: (inputs(c), only(c, 2, c % 2)), weighted)


@pytest.mark.parametrize("score", [10.0, 18.0, 25.0, 60.0])
def test_what_is_left_of_the_gradient_of_a_client_that_fits_may_be_rounding(score):
    def data(client):
        targets = torch.randint(3, (24,), generator=torch.Generator().manual_seed(client))
        return inputs(client), targets if client < CLIENTS - 1 else torch.zeros(24, dtype=torch.long)

    assert not refused_of(confident(score), data)


@pytest.mark.parametrize("bias", [True, False])
def test_a_client_in_whose_data_alone_a_layer_is_alive_keeps_them(bias):
    model = net(bias)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, 0], model[0].bias[:] = 5.0, 0.0

    def data(client):
        rows, sign = inputs(client), 1 if client == CLIENTS - 1 else -1
        return torch.cat([sign * rows[:, :1].abs(), rows[:, 1:]], 1), labels(torch.Generator().manual_seed(client))

    assert not refused_of(model, data)


def test_a_client_whose_labels_count_where_nobody_elses_do_keeps_them():
    assert not refused_of(net(), lambda c: (inputs(c), only(c, 1, -100)))


@pytest.mark.parametrize("compression", ["int8", "float16"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rare_labels_and_large_features_survive_compression(compression, scale):
    def data(client):
        drawing = torch.Generator().manual_seed(client)
        rare = (torch.rand(60, generator=drawing) >= 0.03).long()
        usual = torch.randint(3, (60,), generator=drawing)
        return scale * inputs(client, 60) + scale, rare if client > 2 else usual

    wide = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for budget in (0.5, 2.0):
        assert not refused_of(wide, data, None, compression, budget)


def within(error):
    return {"a": Breach(error, 1.0)}


def test_an_identity_that_more_break_than_may_lie_is_none():
    assert breaches([within(0.0), within(0.0), within(0.5), within(0.5)]) == {}
    assert breaches([within(0.0), within(0.0), within(0.0), within(0.5), within(0.5)]) == {}
    assert breaches([within(0.0), within(0.0), within(0.0), within(0.5), within(0.5)], liars=2) == {3: "a", 4: "a"}
    assert breaches([within(0.0), within(0.15), within(0.0)]) == {}
    assert breaches([within(0.0), within(float("nan")), within(0.0)]) == {1: "a"}
    assert breaches([within(0.0), {}, within(0.0)]) == {1: "a"}
    nothing = {"a": Breach(0.0, 0.0)}
    assert breaches([nothing, nothing, nothing, within(0.9)]) == {}
    assert breaches([nothing, within(0.0), within(0.0), within(0.9)]) == {3: "a"}
    assert breaches([within(0.0), within(0.0), {"a": Breach(1e-6, 1e-6)}]) == {}


def test_errors_are_relative_to_what_is_summed():
    assert cancelling(torch.tensor([[1.0], [-0.5]])) == (0.5, 1.5)
    assert cancelling(torch.zeros(2, 2)) == (0, 0)
    h = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    second, crossed = h.T @ h / 3, y.T @ h / 3
    assert labelled(second, crossed).error == pytest.approx(0, abs=1e-12)
    crossed[0] *= 1.15  # 2/3 of the labels, times 0.15; the last row of S is (2, 1)
    assert labelled(second, crossed).error == pytest.approx((0.2 + 0.1) / (2.2 + 1.1))
    crossed[0] *= 2
    assert labelled(second, crossed).error == 1


def test_sums_that_count_labels_more_than_once_count_that_much_less():
    for times, clients in ((3, 3), (1e6, 5)):
        questions, given = answers(HeadSums(), net(), labels)
        loud = {name: times * t for name, t in decode(given[LIAR][1][0].statistics["head_sums"]).items()}
        forged = replace(given[LIAR][1][0], statistics={"head_sums": loud})
        lying = [(client, one if client != LIAR else [forged]) for client, one in given][-clients:]
        found, plain = (pooled(questions, g, Trust())[0].statistics["head_sums"] for g in (lying, given[-clients:]))
        # The scale of both parts is no matter; how clients count beside each other is.
        for part in ("2.weight.S", "2.weight.C"):
            torch.testing.assert_close(found[part] / found["2.weight.S"][-1, -1], plain[part], rtol=1e-4, atol=1e-6)
