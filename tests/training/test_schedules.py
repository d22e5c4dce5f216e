"""Schedules of the learning rate, over rounds and within them: their numbers, stacked and serial, and their norms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedmerge.aggregators.fednova import step_norm
from fedmerge.errors import ConfigError, InvalidOption, UnknownName
from fedmerge.statistics import LocalSteps
from fedmerge.training import LocalTraining, Participant, cohort, train, train_cohort
from fedmerge.training.report import norm_of_rates, norm_of_steps
from fedmerge.training.schedules import factor_at

OWN = """
def halved(position, length, by=2.0):
    return by ** -position

def none(position, length):
    return -1.0
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_schedules.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("step(every=2,factor=0.5)", [1, 1, 0.5, 0.5]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("cosine(floor=0.5)", [1, 0.5 + (1 + math.sqrt(0.5)) / 4, 0.75, 0.5 + (1 - math.sqrt(0.5)) / 4]),
        ("warmup(length=4)", [0.25, 0.5, 0.75, 1]),
        ("warmup(length=2)+step(every=3,factor=0.1)", [0.5, 1, 1, 0.1]),
        ("own_schedules:halved(by=4)", [1, 1 / 4, 1 / 16, 1 / 64]),
    ],
)
def test_the_factors_of_four_positions(own_module, text, factors):
    assert [factor_at(text, t, 4) for t in range(4)] == pytest.approx(factors)
    rates = [
        LocalTraining(learning_rate=0.2, schedule=text, total_rounds=4).in_round(r).learning_rate for r in range(1, 5)
    ]
    assert rates == pytest.approx([0.2 * factor for factor in factors])


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("cosin", UnknownName, "Did you mean 'cosine'"),
        ("step(evry=2)", UnknownName, "Did you mean 'every'"),
        ("step(every=0)", InvalidOption, "every must be a whole number"),
        ("step(factor=0)", InvalidOption, "factor must be positive"),
        ("step(factor=x)", InvalidOption, "factor"),
        ("cosine(floor=2)", InvalidOption, "floor must be in"),
        ("warmup(length=1.5)", InvalidOption, "length = 1.5 is not valid"),
        ("warmup+", InvalidOption, "schedule"),
    ],
)
@pytest.mark.parametrize("setting", ["schedule", "step_schedule"])
def test_schedules_that_do_not_exist_are_told(setting, text, error, words):
    with pytest.raises(error, match=words):
        LocalTraining(**{setting: text})


def test_a_schedule_that_runs_to_the_last_round_has_to_know_it():
    with pytest.raises(InvalidOption, match=r"training\.total_rounds"):
        LocalTraining(schedule="cosine").in_round(2)
    past = LocalTraining(learning_rate=1.0, schedule="cosine(floor=0.1)", total_rounds=3).in_round(9)
    assert past.learning_rate == pytest.approx(0.1)


def test_functions_that_fail_or_are_not_there_are_told(own_module):
    for text, error, words in (
        ("own_schedules:none", InvalidOption, "factor -1.0"),
        ("own_schedules:halved(base=2)", InvalidOption, "unexpected keyword"),
        ("own_schedules:halve", ConfigError, "Did you mean 'halved'"),
    ):
        with pytest.raises(error, match=words):
            LocalTraining(schedule=text).in_round(2)


def test_the_settings_of_a_round_are_the_same_taken_twice():
    once = LocalTraining(learning_rate=1.0, schedule="step(every=1,factor=0.5)").in_round(3)
    assert once.in_round(3) == once
    assert once.learning_rate == 0.25


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("engine", ["by hand", "vmap"])
def test_stacked_clients_of_unequal_length_follow_their_own_schedules(monkeypatch, engine, optimizer):
    if engine == "vmap":
        monkeypatch.setattr(cohort, "linear_layers", lambda *_: None)
    rng = torch.Generator().manual_seed(0)
    people = [
        Participant(i, torch.randn(n, 3, generator=rng), torch.randint(2, (n,), generator=rng))
        for i, n in enumerate((9, 14, 2))
    ]
    settings = LocalTraining(
        optimizer, 0.1, epochs=2, batch_size=4, weight_decay=0.1, proximal_mu=0.2, total_rounds=4,
        schedule="cosine", step_schedule="warmup(length=2)+cosine",
    )  # fmt: skip
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    stacked = train_cohort(model, people, settings, seed=0, round=3)
    constant = train_cohort(model, people, LocalTraining(optimizer, 0.1, epochs=2, batch_size=4), seed=0, round=3)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for k, one in enumerate(people):
        report = train(model, one.x, one.y, settings, seed=0, client=one.client, round=3)
        assert (report.learning_rate, report.rate_share) == (
            stacked.reports[k].learning_rate, stacked.reports[k].rate_share
        )  # fmt: skip
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(stacked.states[name][k], tensor, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(constant.states[name][k], tensor, rtol=1e-3)
        model.load_state_dict(start)


@pytest.mark.parametrize(
    ("rates", "momentum", "mu", "options"),
    [
        ([0.1, 0.3, 0.2], 0.0, 0.0, {}),
        ([0.1, 0.3, 0.2, 0.05], 0.8, 0.0, {}),
        ([0.1, 0.3, 0.2], 0.0, 1.5, {}),
        ([0.1, 0.3, 0.2, 0.2], 0.5, 1.5, {}),
        ([0.1, 0.3, 0.2], 0.5, 0.0, {"nesterov": True}),
        ([0.1, 0.3, 0.2], 0.5, 0.7, {"dampening": 0.4}),
    ],
)
def test_the_norm_of_steps_is_what_torchs_sgd_makes_of_an_impulse(rates, momentum, mu, options):
    """The gradient of each step alone, and how far torch's SGD ends from where it began."""
    total = 0.0
    for impulse in range(len(rates)):
        place = nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.SGD([place], lr=1.0, momentum=momentum, **options)
        for step, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            place.grad = mu * place.detach() + (1.0 if step == impulse else 0.0)
            optimizer.step()
        total += abs(float(place.detach()))
    assert norm_of_rates(rates, momentum, mu, **options) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.3), (0.7, 0.3)])
def test_at_one_rate_both_norms_agree(momentum, decay):
    found = norm_of_rates([0.1] * 7, momentum, decay / 0.1) / 0.1
    assert found == pytest.approx(norm_of_steps(7, momentum, decay), rel=1e-12)


def test_a_report_tells_how_far_the_steps_of_a_schedule_reach():
    settings = LocalTraining(learning_rate=0.5, momentum=0.0, step_schedule="step(every=1,factor=0.5)")
    report = settings.report(3, 1.0, settings.rates(3))
    assert report.reach == pytest.approx(0.5 + 0.25 + 0.125)
    assert settings.report(3, 1.0).reach == pytest.approx(1.5)


def test_fednova_divides_by_what_the_schedule_lets_steps_reach():
    settings = LocalTraining(learning_rate=0.5, momentum=0.6, step_schedule="step(every=1,factor=0.5)")
    told = LocalSteps().measure(nn.Linear(1, 1), [], settings.report(3, 1.0, settings.rates(3)))
    assert step_norm({name: float(value) for name, value in told.items()}) == pytest.approx(
        norm_of_rates([0.5, 0.25, 0.125], 0.6, 0.0) / 0.5
    )
    assert "rate_share" not in LocalSteps().measure(nn.Linear(1, 1), [], settings.report(3, 1.0))


@pytest.mark.parametrize("share", [0.0, -1.0, 1e-9, 1e9, float("nan")])
def test_shares_that_no_schedule_has_are_refused(share):
    with pytest.raises(InvalidOption, match="rate_share"):
        LocalSteps().parse({"local_steps": 3, "learning_rate": 0.1, "rate_share": share})
