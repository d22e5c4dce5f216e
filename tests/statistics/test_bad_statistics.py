"""Whoever sends a statistic that cannot be true is left out, and the others merge as if that client were not there."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional

import fedmerge
from fedmerge import BadUpdate, ClientUpdate, MergeContext
from fedmerge.merging import build_pipeline
from fedmerge.statistics import StatisticsSettings
from fedmerge.statistics.sending.compression import decode, encode
from fedmerge.training.report import TrainingReport

CLIENTS = 5
# Rules for adapters want models with adapters, and scalings are tried in tests/hostile/test_statistics.py.
NEEDS = {name: known.needs for name, known in fedmerge.methods().items() if set(known.needs) - {"adapter_scaling"}}
LAYERED = sorted({name for names in NEEDS.values() for name in names} - {"local_steps", "class_counts"})
PLACES = (0, 2, CLIENTS - 1)


class Model(nn.Module):
    """A convolution with groups, a norm, a frozen layer, a bias that stands alone, a weight that no tap serves."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv1d(2, 4, 3, padding=1, groups=2)
            self.norm = nn.BatchNorm1d(4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.hidden = nn.Linear(4, 5)
            self.twice = nn.Linear(5, 5, bias=False)
            self.shift = nn.Parameter(torch.zeros(5))
            self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.norm(self.conv(x.view(-1, 2, 2))).relu().mean(2)
        x = self.hidden(self.frozen(x)).relu() + self.shift
        return self.head(functional.linear(self.twice(x).relu(), self.twice.weight))


class Plain(nn.Sequential):
    """What methods that match neurons can trace and grow."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def model_of(method):
    return Plain if method in ("pfnm", "fedma", "fedkfac") else Model


def pipeline_of(method, **settings):
    options = {"fedkfac": {"head": "none", "steps": 0}, "fedma": {"retrain_epochs": 0}}.get(method, {})
    return build_pipeline(method, {method: options}, repair="none", **settings)


@cache
def honest(method, compression="none", layers=None):
    """Updates of clients that have trained apart, with what they measured as it would be sent."""
    pipeline = pipeline_of(method, statistics=StatisticsSettings(layers=layers))
    sent = []
    for client in range(CLIENTS):
        generator = torch.Generator().manual_seed(client)
        n = 12 + 4 * client
        x, y = torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)
        model = model_of(method)()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        report = TrainingReport(5 + client, 1.0, 0.1)
        found = {kind.name: kind.measure(model, [(x, y)], report) for kind in pipeline.measured}
        coded = {name: encode(value, compression, 10**9).state for name, value in found.items()}
        sent.append(ClientUpdate(client, model.state_dict(), float(n), coded))
    return sent


def merged(method, updates, *, known=True, **settings):
    model = model_of(method)
    facts = {"frozen": frozenset({"frozen.weight", "frozen.bias"})} if known and model is Model else {}
    knows = {"model_fn": model, "example": torch.zeros(2, 4), **facts} if known or model is Plain else {}
    context = MergeContext(base=model().state_dict(), **knows)
    return pipeline_of(method, **settings).merge(updates, context)


@cache
def without(method, place, compression="none", known=True, layers=None):
    left = [update for update in honest(method, compression, layers) if update.client != place]
    result = merged(method, left, known=known, statistics=StatisticsSettings(layers=layers))
    assert not result.dropped
    return result.state


def spoilt(update, statistic, change):
    value = {name: tensor.clone() for name, tensor in decode(update.statistics[statistic]).items()}
    return replace(update, statistics={**update.statistics, statistic: change(value)})


def placed(kinds):
    """Every kind, come of the first, the middle or the last client in turn, and the first kind of all of them."""
    turns = [(kind, PLACES[i % 3]) for i, kind in enumerate(kinds)]
    return [*turns, *((turns[0][0], place) for place in PLACES[1:])]


def first(value):
    return next(iter(value))


def one(change):
    """A change of the first tensor alone."""
    return lambda value: {**value, first(value): change(value[first(value)])}


def every(change):
    return lambda value: {name: change(tensor) for name, tensor in value.items()}


def lacking(number):
    return lambda value: {name: tensor for i, (name, tensor) in enumerate(value.items()) if i != number % len(value)}


KINDS = {
    "nothing": lambda value: {},
    "without the first": lacking(0),
    "without the last": lacking(-1),
    "one tensor alone": lambda value: {first(value): value[first(value)]},
    "another model's name": lambda value: {**value, "other.weight": torch.eye(2)},
    "a frozen layer's": lambda value: {**value, "frozen.weight": torch.eye(5), "frozen.weight.diag": torch.ones(4, 4)},
    "names with a stop behind": lambda value: {f"{name}.": tensor for name, tensor in value.items()},
    "an axis more": one(lambda t: t[None]),
    "a row less": one(lambda t: t[:-1]),
    "a single number": one(lambda t: torch.tensor(1.0)),
    "no number": one(lambda t: torch.zeros(0)),
    "whole numbers": every(lambda t: (100 * t).long()),
    "flags": every(lambda t: t > 0),
    "complex numbers": every(lambda t: t.to(torch.complex64)),
    "NaN": one(lambda t: t * float("nan")),
    "infinite": every(lambda t: t / 0),
    "1e30": every(lambda t: torch.full_like(t, 1e30)),
    "float64 at 1e300": every(lambda t: t.double() + 1e300),
    "1e-320": every(lambda t: torch.full_like(t, 1e-320, dtype=torch.float64)),
    "negated": every(lambda t: -t),
}


FIRST = {"fisher_diag": "fisher", "fisher_kfac": "fedfisher", "gram": "regmean"}
"""All methods read a statistic alike: one sees every kind, the others those that once led them astray."""
SOME = ("nothing", "one tensor alone", "whole numbers", "1e30", "1e-320", "negated")


@pytest.mark.parametrize(
    ("method", "kind", "place"),
    [
        (method, kind, place)
        for method in NEEDS
        if set(NEEDS[method]) & set(LAYERED)
        for kind, place in placed(KINDS)
        if method in FIRST.values() or kind in SOME
    ],
)
def test_a_client_whose_layers_cannot_be_true_is_as_if_it_were_not_there(method, kind, place):
    (statistic, *_) = (name for name in NEEDS[method] if name in LAYERED)
    updates = list(honest(method))
    updates[place] = spoilt(updates[place], statistic, KINDS[kind])
    result = merged(method, updates)
    (bad,) = result.dropped
    assert bad.client == place
    assert statistic in bad.reason
    torch.testing.assert_close(result.state, without(method, place))


def test_every_method_that_needs_anything_is_tested():
    assert set(NEEDS) >= {"fedfisher", "fisher", "regmean", "mats", "maecho", "fedlpa", "fednova", "pfnm", "fedkfac"}
    assert set(LAYERED) == {"fisher_diag", "fisher_kfac", "gram"}


@pytest.mark.parametrize("kind", ["nothing", "without the last", "one tensor alone", "an axis more", "1e30"])
@pytest.mark.parametrize("method", ["fedfisher", "fisher", "regmean", "maecho"])
def test_a_server_that_does_not_know_the_model_goes_by_what_most_clients_send(method, kind):
    updates = list(honest(method))
    updates[0] = spoilt(updates[0], NEEDS[method][0], KINDS[kind])
    result = merged(method, updates, known=False)
    assert [bad.client for bad in result.dropped] == [0]
    torch.testing.assert_close(result.state, without(method, 0, known=False))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("method", ["fedfisher", "fisher", "regmean"])
@pytest.mark.parametrize("ahead", [KINDS["nothing"], KINDS["one tensor alone"]])
def test_two_that_agree_on_less_and_come_first_do_not_decide(method, ahead, known):
    updates = list(honest(method))
    for place in (0, 1):
        updates[place] = spoilt(updates[place], NEEDS[method][0], ahead)
    for given in (updates, iter(updates)):
        result = merged(method, given, known=known)
        assert [bad.client for bad in result.dropped] == [0, 1]
        torch.testing.assert_close(result.state, merged(method, updates[2:], known=known).state)


@pytest.mark.parametrize("method", ["fedfisher", "fisher"])
def test_a_server_that_knows_the_model_needs_but_one_client_that_measured_it(method):
    updates = [spoilt(update, NEEDS[method][0], KINDS["nothing"]) for update in honest(method)[:4]]
    result = merged(method, [*updates, honest(method)[4]])
    assert result.accepted == (4,)


def test_a_layer_more_than_the_others_have_costs_nobody_anything():
    """Without the model, the server cannot know that nobody can tap a weight that is used twice."""
    updates = list(honest("regmean"))
    updates[0] = spoilt(updates[0], "gram", lambda value: {**value, "twice.weight": torch.eye(5)})
    for known in (True, False):
        result = merged("regmean", updates, known=known)
        assert not result.dropped
        torch.testing.assert_close(result.state, merged("regmean", honest("regmean"), known=known).state)


@pytest.mark.parametrize("method", ["regmean", "fedfisher"])
def test_whether_a_bias_is_a_column_the_model_says(method):
    """Without its last column the matrix would be that of a layer whose bias is not trained."""
    weight = {"regmean": "hidden.weight", "fedfisher": "hidden.weight.A"}[method]
    others = [
        spoilt(u, NEEDS[method][0], lambda value: {**value, weight: value[weight][:-1, :-1]})
        for u in honest(method)[:3]
    ]
    result = merged(method, [*others, *honest(method)[3:]])
    assert result.accepted == (3, 4)
    assert "[4, 4]" in result.dropped[0].reason
    result = merged(method, [others[0], *honest(method)[1:]], known=False)
    assert result.accepted == (1, 2, 3, 4)


def test_factors_and_a_diagonal_of_one_layer_are_too_much():
    def doubled(value):
        return {**value, "head.bias.diag": torch.ones(3)}

    updates = list(honest("fedfisher"))
    updates[1] = spoilt(updates[1], "fisher_kfac", doubled)
    (bad,) = merged("fedfisher", updates).dropped
    assert "'head.bias' is in the factors of its layer" in bad.reason


@pytest.mark.parametrize("layers", [("head",), ("conv", "hidden.*"), ("norm",)])
@pytest.mark.parametrize("method", ["regmean", "fedfisher", "fisher"])
def test_layers_that_are_not_asked_for_are_not_missed(method, layers):
    updates = list(honest(method, layers=layers))
    settings = StatisticsSettings(layers=layers)
    assert not merged(method, updates, statistics=settings).dropped
    if updates[2].statistics[NEEDS[method][0]]:
        updates[2] = spoilt(updates[2], NEEDS[method][0], KINDS["without the first"])
        result = merged(method, updates, statistics=settings)
        assert [bad.client for bad in result.dropped] == [2]
        torch.testing.assert_close(result.state, without(method, 2, layers=layers))


@pytest.mark.parametrize("compression", ["none", "float16", "int8"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("method", [name for name in NEEDS if set(NEEDS[name]) & set(LAYERED)])
def test_honest_clients_pass_however_they_send(method, compression, known):
    assert not merged(method, honest(method, compression), known=known).dropped


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e10])
@pytest.mark.parametrize("method", ["regmean", "fedfisher", "fisher", "mats", "fedlpa", "gradient_matching"])
def test_the_scale_of_all_clients_is_their_own(method, factor):
    updates = [spoilt(update, NEEDS[method][0], every(lambda t: t * factor)) for update in honest(method)]
    assert not merged(method, updates).dropped


COUNTS = {
    "negative": [-1, 5, 8],
    "none": [0, 0, 0],
    "a fraction": [1.5, 5, 5],
    "NaN": [float("nan"), 5, 5],
    "infinite": [float("inf"), 5, 5],
    "beyond what a float counts": [1e17, 5, 5],
    "another number of classes": [4, 4, 2, 2],
    "one class": [12],
    "in rows": [[4, 4, 4]],
    "flags": [True, True, False],
    "complex": [1j, 2, 2],
    "far more than it has examples": [10**6, 0, 0],
    "twice its examples": [24, 0, 0],
}


@pytest.mark.parametrize(("kind", "place"), placed(COUNTS))
@pytest.mark.parametrize("method", ["maecho", "pfnm"])
def test_counts_that_do_not_go_with_the_examples_are_not_heeded(method, kind, place):
    updates = list(honest(method))
    times = int(updates[place].weight) // 12 if "examples" in kind else 1
    counts = torch.tensor(COUNTS[kind]) * times if "examples" in kind else torch.tensor(COUNTS[kind])
    if kind == "twice its examples":
        counts = torch.tensor([2 * int(updates[place].weight), 0, 0])
    updates[place] = spoilt(updates[place], "class_counts", lambda value: {"class_counts": counts})
    result = merged(method, updates)
    assert [bad.client for bad in result.dropped] == [place]
    assert "class_counts" in result.dropped[0].reason
    torch.testing.assert_close(result.state, without(method, place))


@pytest.mark.parametrize(
    "counts",
    [
        lambda n, k: [n, 0, 0],
        lambda n, k: [n // 2, 0, 1],  # the rest is to be ignored, or was not looked at
        lambda n, k: [n, n, n],  # regression tells about every output
        lambda n, k: [7 * n, n + 3 * k, 2 * n],  # sequences of several labels, some padded
        lambda n, k: [float(n), 0.0, 0.0],
    ],
)
def test_counts_of_other_tasks_are_fine(counts):
    updates = [
        spoilt(u, "class_counts", lambda value, u=u: {"class_counts": torch.tensor(counts(int(u.weight), u.client))})
        for u in honest("maecho")
    ]
    assert not merged("maecho", updates).dropped


def test_weights_that_are_no_numbers_of_examples_say_nothing_of_counts():
    updates = [replace(update, weight=1.0) for update in honest("maecho")]
    updates[1] = spoilt(updates[1], "class_counts", lambda value: {"class_counts": torch.tensor([900, 5, 5])})
    assert not merged("maecho", updates).dropped


STEPS = {
    "none": {"local_steps": 0.0},
    "NaN": {"local_steps": float("nan")},
    "negative": {"local_steps": -5.0},
    "the most that are allowed": {"local_steps": 1e7},
    "more than go with its examples": {"local_steps": 30_000.0},
    "momentum next to 1": {"local_steps": 1e5, "momentum": 1 - 1e-12},
    "momentum beyond 1": {"local_steps": 5.0, "momentum": 1.5},
    "an infinite rate": {"local_steps": 5.0, "learning_rate": float("inf")},
    "a rate of 1e300, with or without a proximal term": {"local_steps": 5.0, "learning_rate": 1e300},
    "a proximal term that overshoots": {"local_steps": 5.0, "learning_rate": 1.0, "proximal_mu": 2.0},
    "a proximal term alone": {"local_steps": 5.0, "proximal_mu": 2.0},
}


@pytest.mark.parametrize(("kind", "place"), placed(STEPS))
def test_steps_that_nobody_takes_do_not_scale_the_move_of_all(kind, place):
    updates = list(honest("fednova"))
    told = {name: torch.tensor(number, dtype=torch.float64) for name, number in STEPS[kind].items()}
    updates[place] = spoilt(updates[place], "local_steps", lambda value: told)
    result = merged("fednova", updates)
    assert [bad.client for bad in result.dropped] == [place]
    assert "local_steps" in result.dropped[0].reason
    torch.testing.assert_close(result.state, without("fednova", place))


def test_clients_of_very_different_size_and_speed_take_very_different_steps():
    sizes, epochs = (1, 40, 100, 90, 20_000), (20, 1, 5, 2, 3)
    updates = []
    for update, n, e in zip(honest("fednova"), sizes, epochs, strict=True):
        steps = {"local_steps": torch.tensor(float(e * -(-n // 32)))}
        updates.append(replace(update, weight=float(n), statistics={"local_steps": steps}))
    assert not merged("fednova", updates).dropped


def test_by_hand_it_is_an_error_that_names_the_model():
    models = [copy.deepcopy(Plain()) for _ in range(3)]
    batch = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    good = [fedmerge.compute_statistics(model, [batch], ["gram"]) for model in models]
    fedmerge.merge(models, "regmean", statistics=good)
    some = [{"gram": {"0.weight": one["gram"]["0.weight"]}} for one in good]
    fedmerge.merge(models, "regmean", statistics=some)  # what nobody measured is averaged
    for bad in ({}, {"0.weight": torch.eye(5)}, {**good[1]["gram"], "2.weight": -torch.eye(7)}):
        with pytest.raises(BadUpdate, match=r"statistics\[1\]") as caught:
            fedmerge.merge(models, "regmean", statistics=[good[0], {"gram": bad}, good[2]])
        assert caught.value.client == 1


@pytest.mark.parametrize(("kind", "place"), placed({1e5: "", 1e10: "", 1e14: ""}))
@pytest.mark.parametrize("method", ["regmean", "fedlpa", "mats"])
@pytest.mark.parametrize("compression", ["none", "float16", "int8"])
def test_inputs_of_another_order_of_magnitude_take_no_say(method, compression, kind, place):
    (name,) = NEEDS[method]
    updates = list(honest(method, compression))
    updates[place] = spoilt(updates[place], name, every(lambda t: t * kind))
    value = decode(updates[place].statistics[name])
    updates[place] = replace(updates[place], statistics={name: encode(value, compression, 10**9).state})
    result = merged(method, updates)
    assert [bad.client for bad in result.dropped] == [place]
    torch.testing.assert_close(result.state, without(method, place, compression))


def test_of_two_clients_nobody_can_say_whose_inputs_are_too_large():
    updates = honest("regmean")[:2]
    updates[1] = spoilt(updates[1], "gram", every(lambda t: t * 1e6))
    assert not merged("regmean", updates).dropped


@pytest.mark.parametrize("method", ["regmean", "fednova"])
def test_flags_and_complex_numbers_count_nothing(method):
    (name,) = NEEDS[method]
    for dtype in (torch.bool, torch.complex64):
        updates = list(honest(method))
        updates[3] = spoilt(updates[3], name, every(lambda t, dtype=dtype: t.to(dtype)))
        assert [bad.client for bad in merged(method, updates).dropped] == [3]


@pytest.mark.parametrize("weight", ["many", None, 10**400, float("nan"), float("inf"), -3.0, 0.0])
def test_a_number_of_examples_that_is_none_spoils_no_comparison(weight):
    for method in ("fednova", "maecho"):
        updates = list(honest(method))
        updates[0] = replace(updates[0], weight=weight)
        assert [bad.client for bad in merged(method, updates).dropped] == [0]
