"""Methods that search for coefficients: never worse than their start, repeatable, and where the formula says."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge import ClientUpdate, MergeContext
from fedmerge.errors import InvalidOption, MissingExtra
from fedmerge.merging import build_pipeline
from fedmerge.refine import Privacy
from fedmerge.searching import Judged, Problem
from fedmerge.searching.descent import Descent
from fedmerge.statistics import LossSlopes, NoisySums

SEARCHES = [
    "adamerging",
    "adamerging(granularity=model)",
    "atlas",
    "mehl_soup",
    "evolutionary",
    "evolutionary(rule=task_arithmetic,granularity=tensor,negative=true)",
    "lorahub(price=0.0)",
    "checkpoint_search(sampler=tpe)",
    "checkpoint_search(between=clients,sampler=tpe)",
]


def blobs(seed, n=30):
    generator = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    y = torch.randint(3, (n,), generator=generator)
    return means[y] + torch.randn(n, 4, generator=generator), y


@cache
def federation():
    """A start, three models trained from it, and their data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    models, data = [], [[blobs(i)] for i in range(3)]
    for ((x, y),) in data:
        model = copy.deepcopy(base)
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        models.append(model)
    return base, models, data


def merged(method, models=None, **keywords):
    base, trained, data = federation()
    judges = {} if "data" in keywords else {"clients": data[: len(models or trained)]}
    return fedmerge.merge(models or trained, method, base=base, **{**judges, **keywords})


def loss(model, batches=None):
    """Mean cross-entropy over all clients' examples."""
    pairs = batches or [pair for one in federation()[2] for pair in one]
    x, y = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    return float(F.cross_entropy(copy.deepcopy(model).eval()(x), y).detach())


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_ends_below_its_start_on_its_own_objective_and_alike_for_one_seed(method):
    start, found, again = (merged(method, evaluations=n, seed=5) for n in (0, 8, 8))
    assert torch.equal(vector(found), vector(again))
    assert loss(found) <= loss(start)
    if "checkpoint" not in method:  # whose start, the mean, may be the best there is
        assert loss(found) < loss(start) - 1e-4


@pytest.mark.parametrize("method", SEARCHES)
def test_the_server_judges_where_it_has_data(method):
    own = [blobs(50)]
    start, found = (merged(method, evaluations=n, data=own) for n in (0, 10))
    assert loss(found, own) <= loss(start, own)
    assert torch.equal(vector(found), vector(merged(method, evaluations=10, data=own, judge="server")))


@pytest.mark.parametrize("method", ["mehl_soup", "evolutionary", "checkpoint_search(between=clients,sampler=tpe)"])
def test_copies_of_one_model_stay_that_model(method):
    _, models, data = federation()
    found = fedmerge.merge([models[0]] * 3, method, base=federation()[0], clients=data, evaluations=6)
    torch.testing.assert_close(vector(found), vector(models[0]))


@pytest.mark.parametrize("method", SEARCHES)
def test_a_single_client_is_searched_among_too(method):
    _, models, _ = federation()
    found = merged(method, models[:1], evaluations=6)
    assert bool(torch.isfinite(vector(found)).all())
    assert loss(found, federation()[2][0]) <= loss(merged(method, models[:1], evaluations=0), federation()[2][0]) + 1e-6


def gradient(coefficients, sign=1e-4):
    """By the coefficients of task vectors, by central differences of the clients' loss in float64."""
    base, models, _ = federation()
    mean = fedmerge.merge(models, "fedavg", base=base).double()  # whose batch-norm statistics the search keeps

    def at(point):
        model, theta = copy.deepcopy(mean), vector(base).double()
        theta = theta + sum(
            c * (vector(m).double() - vector(base).double()) for c, m in zip(point, models, strict=True)
        )
        nn.utils.vector_to_parameters(theta, model.parameters())
        pairs = [(x.double(), y) for one in federation()[2] for x, y in one]
        return loss(model, pairs)

    steps = sign * np.eye(len(coefficients))
    return np.array([(at(coefficients + s) - at(coefficients - s)) / (2 * sign) for s in steps]), at(coefficients)


def test_adamerging_takes_the_steps_of_adam_written_out():
    base, models, _ = federation()
    x, m, v, tried = np.full(3, 0.3), np.zeros(3), np.zeros(3), []
    for t in range(1, 5):
        g, value = gradient(x)
        tried.append((value, x))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    best = min(tried, key=lambda one: one[0])[1]
    assert best[0] != 0.3
    want = vector(base).double()
    want = want + sum(c * (vector(one).double() - vector(base).double()) for c, one in zip(best, models, strict=True))
    options = {"granularity": "model", "initial": 0.3, "learning_rate": 0.05, "evaluations": 3}
    torch.testing.assert_close(vector(merged("adamerging", **options)).double(), want, atol=1e-5, rtol=1e-4)


def test_layer_wise_starts_as_task_wise_and_goes_further():
    tied, free = (merged("adamerging", granularity=g, evaluations=10) for g in ("model", "tensor"))
    assert loss(free) < loss(tied)
    starts = [merged("adamerging", granularity=g, evaluations=0) for g in ("model", "tensor")]
    assert torch.equal(vector(starts[0]), vector(starts[1]))
    torch.testing.assert_close(vector(starts[0]), vector(merged("fedavg")))


@pytest.mark.parametrize(("clamp", "last"), [(True, 1.0), (False, 1.3)])
def test_clamped_coefficients_stay_between_0_and_1(clamp, last):
    """Where the objective falls for ever, Adam takes steps of its learning rate."""
    method = build_pipeline("adamerging", {"adamerging": {"clamp": clamp, "learning_rate": 0.1}}).aggregator
    search, judged, points = method.search(Problem(torch.tensor([0.3]), 0)), None, []
    for _ in range(11):
        points.append(float((search.send(judged) if judged else next(search)).points))
        judged = Judged(torch.zeros(1), torch.tensor([-2.0]))
    assert points[0] == pytest.approx(0.3)
    assert points[1] == pytest.approx(0.4, abs=1e-4)
    assert points[-1] == pytest.approx(last, abs=1e-3)


def test_steps_along_a_cosine_add_up_to_half_of_those_of_one_length():
    search = Descent(10, 0.1, cosine=True).search(Problem(torch.zeros(1), 0), LossSlopes())
    points = [next(search).points]
    points += [search.send(Judged(torch.zeros(1), torch.tensor([-2.0]))).points for _ in range(10)]
    with pytest.raises(StopIteration):
        search.send(Judged(torch.zeros(1), torch.tensor([-2.0])))
    assert float(points[-1]) == pytest.approx(0.1 * sum((1 + np.cos(np.pi * t / 10)) / 2 for t in range(10)), abs=1e-4)


@pytest.mark.parametrize("data", [blobs(50)[0], [blobs(50)[0]]])
def test_inputs_without_labels_are_enough_for_the_entropy(data):
    def entropy(model):
        p = copy.deepcopy(model).eval()(blobs(50)[0]).detach().softmax(1)
        return float(-(p * p.log()).sum(1).mean())

    found, start = (merged("adamerging", data=data, evaluations=n) for n in (8, 0))
    assert entropy(found) < entropy(start)
    labelled = merged("adamerging", data=[blobs(50)], objective="entropy", evaluations=8)
    assert torch.equal(vector(found), vector(labelled))


@pytest.mark.parametrize(
    ("method", "keywords", "words"),
    [
        ("adamerging", {}, "pass data=.*or pass clients="),
        ("mehl_soup", {"data": torch.zeros(4, 4)}, "no labels.*or pass clients="),
        ("evolutionary(judge=server)", {"clients": [[blobs(0)]] * 3}, "pass data=.*judge=clients"),
        ("atlas(judge=clients)", {"data": [blobs(0)]}, "pass clients="),
        ("atlas(evaluations=-1)", {"data": [blobs(0)]}, "evaluations must lie"),
        ("lorahub(initial=2.0)", {"data": [blobs(0)]}, "initial must lie"),
        ("adamerging(objective=accuracy)", {"data": [blobs(0)]}, "objective"),
    ],
)
def test_who_cannot_judge_is_told_what_to_do_before_anything_is_merged(method, keywords, words):
    base, models, _ = federation()
    with pytest.raises(InvalidOption, match=words):
        fedmerge.merge(models, method, base=base, **keywords)


@pytest.mark.parametrize(
    ("library", "method"), [("cma", "evolutionary"), ("cma", "lorahub"), ("optuna", "checkpoint_search")]
)
def test_a_library_that_is_missing_is_named_with_the_extra_that_brings_it(monkeypatch, library, method):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(MissingExtra, match=r"fedmerge\[search\]"):
        merged(method, evaluations=3)


def test_weights_of_a_linear_rule_add_up_to_one_and_none_is_negative():
    base, models, _ = federation()
    found = merged("evolutionary", evaluations=14)
    tau = torch.stack([vector(one) - vector(base) for one in models]).double()
    weights = torch.linalg.lstsq(tau.T, (vector(found) - vector(base)).double()).solution
    assert float(weights.sum()) == pytest.approx(1, abs=1e-4)
    assert bool((weights > -1e-4).all())


def test_a_soup_stays_on_the_hyperplane_of_its_models_tensor_by_tensor():
    _, models, _ = federation()
    found = dict(merged("mehl_soup", evaluations=4).named_parameters())
    states = [dict(one.named_parameters()) for one in models]
    for name, tensor in found.items():
        if tensor.numel() < 3:
            continue
        rows = torch.stack([state[name].detach().flatten().double() for state in states])
        steps = (rows[1:] - rows[0]).T
        wanted = tensor.detach().flatten().double() - rows[0]
        left = wanted - steps @ torch.linalg.lstsq(steps, wanted).solution
        assert float(left.norm()) < 1e-4 * float(steps.norm()) + 1e-6  # of a bias that norms undo only rounding is left


def test_coefficients_that_cost_more_than_they_bring_stay_at_0():
    base, _, _ = federation()
    assert torch.equal(vector(merged("lorahub", price=1e6, evaluations=12)), vector(base))


def test_an_overshoot_is_taken_back_along_the_segment_to_the_model_before():
    """One client that went twice as far as the optimum: lambda is about a half."""
    base, x = nn.Linear(1, 1, bias=False), torch.ones(4, 1)
    ahead = copy.deepcopy(base)
    with torch.no_grad():
        base.weight.fill_(0.0)
        ahead.weight.fill_(2.0)
    keywords = {"base": base, "clients": [[(x, x + 0.0)]], "task": "regression"}
    found = fedmerge.merge([ahead], "checkpoint_search", **keywords)
    assert float(found.weight.detach()) == pytest.approx(1.0, abs=0.1)
    near = fedmerge.merge([ahead], "checkpoint_search", lowest=0.9, **keywords)
    assert float(near.weight.detach()) == pytest.approx(1.8, abs=0.02)


def test_earlier_global_models_are_remembered_as_many_as_are_asked_for():
    _, models, _ = federation()
    pipeline = build_pipeline("checkpoint_search(checkpoints=4,evaluations=0)")
    memory, bases = {}, []
    for number in range(4):
        base = {"w": torch.full((2,), float(number))}
        bases.append(base)
        result = pipeline.merge([ClientUpdate(0, {"w": torch.full((2,), 9.0)})], MergeContext(base=base), memory)
        memory = result.memory
    kept = sorted(name for name in memory)
    assert [name.rpartition("/")[0] for name in kept] == ["aggregator/model0", "aggregator/model1"]
    assert [float(memory[name][0]) for name in kept] == [3.0, 2.0]
    assert models


def test_under_masks_the_search_is_the_same_and_noise_is_refused_where_slopes_have_no_bound():
    plain, masked = (
        merged("evolutionary", evaluations=8, privacy=privacy) for privacy in (Privacy(), Privacy(masks=True))
    )
    torch.testing.assert_close(vector(masked), vector(plain), atol=1e-5, rtol=1e-4)
    noise = NoisySums(clip=1.0, noise_multiplier=1.0)
    with pytest.raises(InvalidOption, match="loss_slopes"):
        merged("adamerging", privacy=Privacy(noise=noise))
    assert bool(torch.isfinite(vector(merged("lorahub", evaluations=6, privacy=Privacy(noise=noise)))).all())


def test_frozen_parameters_stay_where_they_are():
    base, models, _ = (copy.deepcopy(one) for one in federation())
    for model in (base, *models):
        model[0].weight.requires_grad_(False)
        model[0].weight.copy_(base[0].weight)
    found = merged("adamerging", models, evaluations=4)
    assert torch.equal(found[0].weight, base[0].weight)


def test_a_search_goes_on_from_what_server_steps_made_of_its_start():
    found = merged("evolutionary+server_momentum", evaluations=6)
    start = merged("fedavg+server_momentum")
    assert loss(found) <= loss(start)
