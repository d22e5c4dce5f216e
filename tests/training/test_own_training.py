"""A training function of one's own: it gets model, batches and settings, and what it returns is checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.errors import ConfigError, InvalidOption
from fedmerge.training import Correction, LocalTraining, TrainingReport, train
from tests.training.test_optimizers import examples, net, same


def plain(model, batches, settings):
    """What a user writes."""
    optimizer = torch.optim.SGD(model.parameters(), settings.learning_rate, momentum=settings.momentum)
    total = 0.0
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        batches.correct(model)
        optimizer.step()
        total += loss.item() * len(x)
    rows = sum(len(x) for x, _ in batches)
    return {"steps": len(batches), "loss": total / rows, "learning_rate": settings.learning_rate}


def trained(function, correction=None, **settings):
    model = net()
    settings = LocalTraining(learning_rate=0.1, epochs=2, batch_size=4, train_fn=function, **settings)
    given = {} if correction is None else {"correction": correction}
    return model, train(model, *examples(), settings, seed=3, client=5, round=2, **given)


@pytest.mark.parametrize("settings", [{}, {"proximal_mu": 0.5}, {"schedule": "step(every=1,factor=0.5)"}])
def test_a_function_that_does_what_we_do_ends_where_we_do(settings):
    offset = {"0.weight": torch.full((4, 3), 0.1)}
    (found, report), (want, usual) = (trained(f, Correction(0.2, offset), **settings) for f in (plain, None))
    same(found, want)
    assert report.steps == usual.steps
    assert report.loss == pytest.approx(usual.loss)
    assert report.learning_rate == usual.learning_rate


def test_a_function_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "own_fit.py").write_text("def fit(model, batches, settings):\n    return {'steps': 1, 'loss': 0.5}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert trained("own_fit:fit")[1] == TrainingReport(1, 0.5)
    with pytest.raises(ConfigError, match="Did you mean 'fit'"):
        trained("own_fit:fitt")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda model, batches, settings: None, "returns a TrainingReport"),
        (lambda model, batches, settings: {"loss": 1.0}, "with steps, loss"),
        (lambda model, batches, settings: {"loss": 1.0, "steps": 1, "accuracy": 1}, "got"),
        (lambda model, batches, settings: TrainingReport(0, 1.0), "steps >= 1"),
        (lambda model, batches, settings: {"steps": 2, "loss": float("nan")}, "a loss"),
    ],
)
def test_what_is_no_report_is_told(function, words):
    with pytest.raises(InvalidOption, match=words):
        trained(function)


def test_what_the_method_asks_for_is_not_left_out():
    def careless(model, batches, settings):
        return TrainingReport(1, 1.0)

    with pytest.raises(InvalidOption, match=r"batches\.correct"):
        trained(careless, Correction(pull=0.1))
    with pytest.raises(InvalidOption, match=r"batches\.correct"):
        trained(careless, proximal_mu=0.1)
    assert trained(careless)[1].steps == 1


def test_batches_are_those_of_local_training_again_and_again():
    seen = []

    def look(model, batches, settings):
        seen.append([x.clone() for x, _ in batches])
        seen.append([x.clone() for x, _ in batches])
        torch.rand(3)
        seen.append([batches.seed, batches.client, batches.round, len(batches)])
        return TrainingReport(len(batches), 1.0)

    state = torch.random.get_rng_state()
    trained(look, accumulate=2)
    assert torch.equal(state, torch.random.get_rng_state())
    first, second, numbers = seen
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert numbers == [3, 5, 2, 8]
    assert [len(x) for x in first] == [4, 4, 4, 2] * 2


@pytest.mark.parametrize("wrong", [3, "fit", nn.Linear(1, 1).weight])
def test_what_is_no_function_is_told(wrong):
    with pytest.raises(InvalidOption, match=r"training\.train_fn"):
        LocalTraining(train_fn=wrong)


def test_settings_with_a_function_can_be_replaced():
    assert dataclasses.replace(LocalTraining(train_fn=plain), epochs=3).train_fn is plain
