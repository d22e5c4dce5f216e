"""Clients that lie about a merged model: what is refused, what it costs whom, and that nobody decides alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption, NoAnswer
from fedmerge.merging import build_pipeline
from fedmerge.questions import Question, Trust, pooled, respond
from fedmerge.questions.pooling import sifted
from fedmerge.questions.question import DIVERGED
from fedmerge.questions.trust import judged_losses, shares
from fedmerge.refine import NaturalGradient, Privacy, RidgeHead, refine
from fedmerge.state import module_state
from fedmerge.statistics import BatchNormSums, ClassCounts, FisherKfac, HeadSums, LossGradient, StatisticsSettings
from fedmerge.statistics.sending.compression import decode
from fedmerge.training import LocalTraining, train
from fedmerge.update import ClientUpdate, MergeContext

CLASSES, WIDTH, CLIENTS = 3, 6, 6
LIAR = 4


def blobs(seed, n=150, mostly=None):
    """Three overlapping classes, one of them more often than the others."""
    generator = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(CLASSES, 4, generator=torch.Generator().manual_seed(99))
    y = torch.randint(CLASSES, (n,), generator=generator)
    if mostly is not None:
        y = torch.where(torch.rand(n, generator=generator) < 0.6, mostly, y)
    return means[y] + torch.randn(n, 4, generator=generator), y


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


STATE = module_state(net())[0]
DATA = {client: [blobs(client, mostly=client % CLASSES)] for client in range(CLIENTS)}
TEST = blobs(1000, 600)


def accuracy(state):
    module = net()
    module.load_state_dict(dict(state))
    return float((module(TEST[0]).argmax(1) == TEST[1]).float().mean())


def asking(lie=None, liar=LIAR, data=None, asked=None):
    """Clients at hand, one of whom may lie."""

    def ask(questions, clients):
        found = []
        for client in clients:
            answers = [respond(question, net(), (data or DATA)[client]) for question in questions]
            if client == liar and lie is not None:
                answers = [lie(question, unpacked(answer)) for question, answer in zip(questions, answers, strict=True)]
            found.append((client, answers))
        if asked is not None:
            asked.append((list(questions), list(clients)))
        return found

    return ask


def unpacked(answer):
    """Statistics as they are measured: a matrix may be sent whole as well."""
    return replace(answer, statistics={kind: decode(value) for kind, value in answer.statistics.items()})


STAGES = [RidgeHead(), NaturalGradient()]


def refined(lie=None, clients=range(CLIENTS), budget=None, trust=None, asked=None, told=None, stages=STAGES):
    settings, trusted = StatisticsSettings(), Trust() if trust is None else trust
    state = module_state(net())[0]
    return refine(
        state, [], stages, asking(lie, asked=asked), list(clients), settings, None, budget, trust=trusted, told=told
    )


@cache
def left_out():
    """What comes out where the liar is not asked at all."""
    return refined(clients=[client for client in range(CLIENTS) if client != LIAR])


def tensors(answer, change, names=lambda name: True):
    """An answer whose statistics are changed."""
    found = {
        kind: {name: change(tensor) if names(name) else tensor for name, tensor in value.items()}
        for kind, value in answer.statistics.items()
    }
    return replace(answer, statistics=found)


def points(answer, told):
    """An answer whose losses are replaced, where there are any."""
    return replace(answer, losses=told(answer.losses, answer.judged)) if len(answer.losses) else answer


def is_mean(name):
    """Of what may have any sign, unlike second moments."""
    return name.rpartition(".")[2] not in ("S", "G", "A", "curvature")


def last_is_best(losses, judged):
    told = torch.full_like(losses, 1e6 * judged)
    told[-1] = 0
    return told


def to_stay_is_best(losses, judged):
    told = torch.full_like(losses, 1e6 * judged)
    told[0] = 0
    return told


def swapped(tensor):
    return tensor.roll(1, 0) if tensor.ndim and len(tensor) == CLASSES else tensor


def reversed_losses(losses, judged):
    return losses.max() - losses


def noise(tensor):
    """As loud as the tensor, and symmetric about nothing."""
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (drawn * tensor.double().norm() / drawn.norm()).to(tensor.dtype)


LIES = {
    "nan losses": lambda q, a: points(a, lambda losses, n: losses * torch.nan),
    "one nan loss": lambda q, a: points(a, lambda losses, n: losses.index_fill(0, torch.tensor([0]), torch.nan)),
    "infinite losses": lambda q, a: points(a, lambda losses, n: losses + torch.inf),
    "negative losses": lambda q, a: points(a, lambda losses, n: -1e9 * (torch.arange(len(losses)) == 1).double()),
    "the last point is best": lambda q, a: points(a, last_is_best),
    "to stay is best": lambda q, a: points(a, to_stay_is_best),
    "losses the other way round": lambda q, a: points(a, reversed_losses),
    "nan sums": lambda q, a: tensors(a, lambda t: t * torch.nan),
    "sums times a million": lambda q, a: points(tensors(a, lambda t: 1e6 * t), reversed_losses),
    "sums of the wrong sign": lambda q, a: points(tensors(a, lambda t: -t), reversed_losses),
    "classes swapped": lambda q, a: points(tensors(a, swapped, is_mean), reversed_losses),
    "no sums at all": lambda q, a: tensors(a, torch.zeros_like),
    "sums times three": lambda q, a: points(tensors(a, lambda t: 3 * t), reversed_losses),
    "means of the wrong sign": lambda q, a: points(tensors(a, lambda t: -t, is_mean), reversed_losses),
    "means thrice as large, and of the wrong sign": lambda q, a: tensors(a, lambda t: -3 * t, is_mean),
    "noise as loud as the means": lambda q, a: points(tensors(a, noise, is_mean), reversed_losses),
    "billions of examples": lambda q, a: replace(a, judged=10**9, examples=10**10, losses=1e9 * a.losses.flip(0)),
    "fewer than no examples": lambda q, a: replace(a, examples=-1),
    "no answer at all": lambda q, a: replace(a, losses=torch.zeros(0, dtype=torch.float64), statistics={}),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_client_that_lies_in_every_answer_costs_no_more_than_leaving_it_out(kind):
    told, without = dict.fromkeys(range(CLIENTS), 150), accuracy(left_out().state)
    assert without > accuracy(module_state(net())[0]) + 0.2, "the refinements are of no use here"
    assert accuracy(refined(LIES[kind], told=told).state) >= without - 0.05


@pytest.mark.parametrize("kind", ["nan losses", "negative losses", "nan sums", "fewer than no examples"])
def test_what_can_be_no_answer_costs_only_the_client_that_gave_it(kind):
    found = refined(LIES[kind])
    without = left_out()
    refused = [client for exchange in found.exchanges for client, _ in exchange.refused]
    assert refused == [LIAR]  # once: it is asked no more
    if "losses" not in kind:  # from the first exchange on
        for name, tensor in without.state.items():
            torch.testing.assert_close(found.state[name], tensor)


def test_honest_clients_are_believed_to_the_last_bit():
    plain, guarded = refined(trust=Trust("mean", "mean")), refined()
    assert not any(exchange.refused for exchange in guarded.exchanges)
    for name, tensor in plain.state.items():
        assert torch.equal(guarded.state[name], tensor)


@pytest.mark.parametrize("judgement", ["trimmed", "median"])
def test_honest_clients_lose_little_by_a_judgement_that_trusts_none_of_them(judgement):
    assert accuracy(refined(trust=Trust(judgement)).state) >= accuracy(refined().state) - 0.05


def test_believed_at_its_word_the_same_client_decides_alone():
    """What the defaults are for."""
    believed = refined(LIES["to stay is best"], trust=Trust("mean", "mean"))
    assert all(exchange.point[0] == 0 and not any(exchange.point) for exchange in believed.exchanges if exchange.judged)


# Refused before it counts.

STEP = {name: torch.ones_like(tensor) for name, tensor in STATE.items()}
NEEDS = (HeadSums(), LossGradient())
QUESTION = Question(STATE, (STEP,), ((0.0,), (0.1,)), needs=NEEDS)
SMALL = replace(QUESTION, needs=(LossGradient(), FisherKfac()), compression="auto", budget=1.0)


def extra(answer, kind="loss_gradient", name="more", tensor=None):
    value = {**answer.statistics[kind], name: torch.zeros(1) if tensor is None else tensor}
    return replace(answer, statistics={**answer.statistics, kind: value})


def eigenvectors(answer):
    """As many as there are, where a few were paid for."""
    found = {}
    for name, tensor in answer.statistics["fisher_kfac"].items():
        found[name] = tensor
        if name.endswith("#vectors"):
            found[name] = tensor[..., :1].repeat(1, 1, 500)
            found[name.replace("vectors", "peaks")] = torch.ones(len(tensor), 500)
    return replace(answer, statistics={**answer.statistics, "fisher_kfac": found})


PADDED = {
    "a statistic": lambda a: replace(a, statistics={**a.statistics, "gram": {"w": torch.zeros(3000)}}),
    "a tensor": extra,
    "an empty tensor": lambda a: extra(a, tensor=torch.zeros(0)),
    "a buffer": lambda a: extra(a, name="0.running_mean", tensor=torch.zeros(6)),
    "a tensor of another statistic": lambda a: extra(a, kind="head_sums", name="0.weight.S", tensor=torch.eye(5)),
    "a second form": lambda a: extra(a, name="0.weight#linear", tensor=torch.zeros(6, 4, dtype=torch.int8)),
    "a part": lambda a: extra(a, kind="head_sums", name="2.weight.S#more", tensor=torch.zeros(9)),
    "double numbers": lambda a: tensors(a, torch.Tensor.double),
    "whole numbers": lambda a: tensors(a, torch.Tensor.long),
    "complex numbers": lambda a: tensors(a, lambda t: t.to(torch.complex64)),
    "longer tensors": lambda a: tensors(a, lambda t: torch.cat([t, t]) if t.ndim else t),
    "an axis": lambda a: tensors(a, lambda t: t[None]),
    "longer losses": lambda a: replace(a, losses=a.losses.repeat(2)),
    "losses of another kind": lambda a: replace(a, losses=a.losses.float()),
    "losses with an axis": lambda a: replace(a, losses=a.losses[None]),
    "rounding that nobody asked for": lambda a: tensors(a, torch.Tensor.half),
    "a missing statistic": lambda a: replace(a, statistics={"loss_gradient": a.statistics["loss_gradient"]}),
    "a missing tensor": lambda a: replace(
        a, statistics={**a.statistics, "loss_gradient": {"2.bias": a.statistics["loss_gradient"]["2.bias"]}}
    ),
    "several clients": lambda a: replace(a, clients=3),
}


def answered(question=QUESTION, change=None):
    given = [(client, [respond(question, net(), DATA[client])]) for client in range(4)]
    if change is not None:
        given[1] = (1, [change(given[1][1][0])])
    return given


@pytest.mark.parametrize("kind", PADDED)
def test_an_answer_that_brings_anything_but_what_was_asked_for_is_refused(kind, caplog):
    with caplog.at_level(logging.WARNING):
        good, refused = sifted([QUESTION], answered(change=PADDED[kind]), Trust())
    assert (len(good), list(refused)) == (3, [1])
    assert "client 1: its answer is left out" in caplog.text


@pytest.mark.parametrize("compression", ["none", "float16", "int8", "auto"])
@pytest.mark.parametrize("budget", [0.05, 0.6, 4.0])
@pytest.mark.parametrize("needs", [NEEDS, (LossGradient(), FisherKfac()), (ClassCounts(), BatchNormSums())])
def test_whatever_an_honest_client_sends_in_its_budget_is_taken(compression, budget, needs):
    question = replace(QUESTION, needs=needs, compression=compression, budget=budget)
    assert sifted([question], answered(question), Trust())[1] == {}


def test_norms_of_an_honest_client_are_taken_in_their_double_numbers():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    question = Question(module_state(module)[0], needs=(BatchNormSums(),))
    given = [(client, [respond(question, module, DATA[client])]) for client in range(3)]
    assert sifted([question], given, Trust())[1] == {}


def test_more_eigenvectors_than_were_paid_for_are_refused():
    given = answered(SMALL)
    assert any(key.endswith("#vectors") for key in given[1][1][0].statistics["fisher_kfac"])
    _, refused = sifted([SMALL], answered(SMALL, eigenvectors), Trust())
    assert "were allowed" in refused[1]


def test_padding_is_billed_to_nobody_but_the_client_that_sent_it():
    def padding(question, answer):
        return replace(answer, statistics={**answer.statistics, "padding": {"w": torch.zeros(3000)}})

    budget = 6 * 4.0 * sum(tensor.numel() for tensor in STATE.values())
    found = refined(padding, budget=budget)
    without = refined(clients=[c for c in range(CLIENTS) if c != LIAR], budget=budget)
    assert ("loss_gradient", "fisher_kfac") in [exchange.measured for exchange in found.exchanges]
    assert [e.bytes_up for e in found.exchanges] == [e.bytes_up for e in without.exchanges]
    for name, tensor in without.state.items():
        torch.testing.assert_close(found.state[name], tensor)


# Who says how much.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: replace(a, examples=a.examples + 1), "it answers for 151 examples and told of 150"),
        (lambda a: replace(a, examples=10**12), "and told of 150"),
        (lambda a: replace(a, judged=a.judged + 1, examples=a.examples - 1), "16 of 150 examples judge"),
        (lambda a: replace(a, judged=150, examples=0), "150 of 150 examples judge"),
        (lambda a: replace(a, judged=-1), "-1 and 135 examples"),
        (lambda a: replace(a, losses=a.losses * torch.nan), "NaN"),
        (lambda a: replace(a, losses=a.losses - 1e9), "a mean loss of"),
    ],
)
def test_nobody_counts_for_more_than_it_told_of_in_training(change, words):
    given = answered(change=change)
    _, refused = sifted([QUESTION], given, Trust(), dict.fromkeys(range(4), 150.0))
    assert words in refused[1]


def test_numbers_of_examples_differ_in_no_exchange():
    given = [(c, [respond(QUESTION, net(), DATA[c])] * 2) for c in range(4)]
    given[2] = (2, [given[2][1][0], replace(given[2][1][1], judged=10, examples=90)])
    assert "differ from one question" in sifted([QUESTION] * 2, given, Trust())[1][2]


def test_weights_that_are_no_numbers_of_examples_bound_nothing():
    assert sifted([QUESTION], answered(), Trust(), dict.fromkeys(range(4), 1.0))[1] == {}
    # Most clients' go with what they answer for: then they are numbers of examples.
    assert list(sifted([QUESTION], answered(), Trust(), {0: 150, 1: 150, 2: 150, 3: 149})[1]) == [3]


@pytest.mark.parametrize("weight", [150.0, 1e9])
def test_a_merge_knows_what_its_updates_told(weight):
    """Through a pipeline, with the updates' own numbers of examples."""

    def more(question, answer):
        return replace(answer, judged=judged, examples=examples)

    judged, examples = 600, 5400
    state, pipeline = module_state(net())[0], build_pipeline("fedavg+ridge_head")
    updates = [ClientUpdate(c, state, weight if c == LIAR else 150.0) for c in range(CLIENTS)]
    result = pipeline.merge(updates, MergeContext(ask=asking(more)))
    assert [client for client, _ in result.refused] == ([LIAR] if weight == 150.0 else [])


def test_losses_of_ones_own_may_be_negative_where_that_is_said():
    given = answered(change=lambda a: replace(a, losses=a.losses - 100.0))
    assert sifted([QUESTION], given, Trust(lowest_loss=-float("inf")))[1] == {}
    assert list(sifted([QUESTION], given, Trust(lowest_loss=-1.0))[1]) == [1]


def test_who_answers_twice_or_was_not_asked_is_left_out():
    given = answered()
    good, refused = sifted([QUESTION], [*given, given[2]], Trust(), asked=range(4))
    assert (len(good), list(refused)) == (3, [2])
    good, refused = sifted([QUESTION], given, Trust(), asked=[0, 1, 3])
    assert (len(good), refused) == (3, {})


def test_only_nonsense_is_no_answer():
    with pytest.raises(NoAnswer):
        pooled([QUESTION], [(0, [respond(QUESTION, net(), DATA[0])] * 2)])


# A model that has diverged at some clients.


def test_a_model_that_diverges_has_a_loss_that_can_be_sent():
    far = {name: torch.full_like(tensor, torch.inf) for name, tensor in STATE.items()}
    answer = respond(Question(STATE, (far,), ((0.0,), (1.0,))), net(), DATA[0])
    assert float(answer.loss[1]) == pytest.approx(DIVERGED)
    assert sifted([Question(STATE, (far,), ((0.0,), (1.0,)))], [(0, [answer])], Trust())[1] == {}


def test_one_client_alone_vetoes_no_model():
    def vetoing(answer):
        return replace(answer, losses=torch.tensor([0.0, torch.inf], dtype=torch.float64))

    better = replace(QUESTION, directions=({"2.bias": torch.zeros(3)},), needs=())
    given = [(c, [respond(better, net(), DATA[c])]) for c in range(CLIENTS)]
    given = [(c, [replace(a, losses=a.losses * torch.tensor([1.0, 0.5]))]) for c, (a,) in given]
    vetoed = [(c, [vetoing(a) if c == LIAR else a]) for c, (a,) in given]
    for judgement in ("guarded", "trimmed", "median"):
        (total,) = pooled([better], vetoed, Trust(judgement))
        assert int(total.loss.argmin()) == 1
        assert bool(total.loss.isfinite().all())
    # Where two of six find it, it has diverged.
    vetoed = [(c, [vetoing(a) if c in (1, LIAR) else a]) for c, (a,) in given]
    assert int(pooled([better], vetoed, Trust())[0].loss.argmin()) == 0


# Judgements and sums that no few decide.


@pytest.mark.parametrize("judgement", ["guarded", "trimmed", "median"])
@pytest.mark.parametrize("liars", [1, 2, 3])
def test_a_minority_moves_no_judgement_that_the_others_agree_on(judgement, liars):
    generator = torch.Generator().manual_seed(liars)
    honest = 0.5 + torch.rand(10 - liars, 4, generator=generator, dtype=torch.float64)
    honest[:, 2] = 0.1 * honest[:, 2]  # this one is best, and the last is bad
    honest[:, 3] = 20 + honest[:, 3]
    for wanted in (0, 3):
        lie = torch.full((liars, 4), 1e12, dtype=torch.float64)
        lie[:, wanted] = 0
        found = judged_losses(torch.cat([honest, lie]), torch.ones(10), judgement, liars)
        assert int(found.argmin()) == 2


def test_good_models_are_compared_to_each_other_and_not_to_the_bad_one_before():
    """Next to what all gain by leaving the first model a client could add 5 to one of two good ones, and so choose."""
    losses = torch.tensor([[5.0, 0.3, 1.0]] * 4 + [[5.0, 5.0, 0.0]], dtype=torch.float64)
    assert int(judged_losses(losses, torch.ones(5), "mean", 1).argmin()) == 2
    for judgement in ("guarded", "trimmed", "median"):
        assert int(judged_losses(losses, torch.ones(5), judgement, 1).argmin()) == 1


def test_weighted_medians_and_trimmed_means_are_those_of_the_textbook():
    losses = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0], [0.0, 8.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert judged_losses(losses, weights, "median", 1).tolist() == [0.0, 3.0]
    assert judged_losses(losses, weights, "trimmed", 1).tolist() == [0.0, 3.0]
    assert judged_losses(losses, weights, "mean", 1).tolist() == [0.0, 3.75]
    heavy = torch.tensor([5.0, 1.0, 1.0, 1.0])
    assert judged_losses(losses, heavy, "median", 1).tolist() == [0.0, 1.0]
    assert judged_losses(losses, torch.tensor([9.0, 2.0, 1.0, 9.0]), "trimmed", 1)[1] == pytest.approx(8 / 3)


def test_all_sums_of_a_client_count_for_less_where_one_of_them_is_far_off():
    values = [{"w.S": torch.eye(2), "w.C": torch.ones(3, 2)} for _ in range(5)]
    values[3] = {"w.S": 40 * torch.eye(2), "w.C": torch.ones(3, 2)}
    assert shares(values, 1) == pytest.approx([1, 1, 1, 0.025, 1])
    assert shares(values, 2) == pytest.approx([1, 1, 1, 0.025, 1])
    values[1] = {"w.S": torch.eye(2), "w.C": 1e300 * torch.ones(3, 2)}
    assert shares(values, 2)[1] < 1e-200
    # A layer's small bias is none of its own.
    gradients = [{"0.weight": torch.ones(9), "0.bias": torch.full((1,), 0.01)} for _ in range(3)]
    gradients[0] = {"0.weight": torch.ones(9), "0.bias": torch.full((1,), 1.0)}
    assert shares(gradients, 1, {"0.weight", "0.bias"}) == [1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"judgement": "majority"}, "judgement must be of"),
        ({"sums": "median"}, "sums must be of"),
        ({"liars": 0.5}, "below 0.5"),
        ({"liars": -0.1}, "below 0.5"),
        ({"liars": True}, "below 0.5"),
        ({"lowest_loss": float("nan")}, "lowest_loss"),
    ],
)
def test_a_trust_that_makes_no_sense_is_refused(settings, words):
    with pytest.raises(InvalidOption, match=words):
        Trust(**settings)


def test_under_masks_no_judgement_can_look_at_single_answers():
    with pytest.raises(InvalidOption, match="under masks"):
        build_pipeline("fedavg+ridge_head", privacy=Privacy(masks=True), trust=Trust("median"))


@pytest.mark.slow
def test_fedkfac_with_a_client_that_lies_in_every_answer_is_as_good_as_without_it():
    """By the default settings, with models that clients have trained."""
    models = [net() for _ in range(CLIENTS)]
    for client, model in enumerate(models):
        train(model, *DATA[client][0], LocalTraining(epochs=5, learning_rate=0.1), seed=0, client=client, round=1)
    pipeline = build_pipeline("fedkfac")

    def merged(lie, clients):
        updates = []
        for c in clients:
            values = fedmerge.compute_statistics(models[c], DATA[c], list(pipeline.measured))
            updates.append(ClientUpdate(c, module_state(models[c])[0], 150.0, values))
        context = MergeContext(base=STATE, model_fn=net, example=TEST[0][:2], ask=asking(lie))
        return accuracy(pipeline.merge(updates, context).state)

    without = merged(None, [c for c in range(CLIENTS) if c != LIAR])
    found = {kind: merged(lie, range(CLIENTS)) for kind, lie in LIES.items()}
    costly = {kind: one for kind, one in found.items() if one < without - 0.05}
    # One judgement against all steps, which are small ones here, has a price: what honest clients gain by a step is
    # less than what one of them may say that it loses.
    assert set(costly) <= {"to stay is best"}, without
    assert min(found.values()) > without - 0.1
