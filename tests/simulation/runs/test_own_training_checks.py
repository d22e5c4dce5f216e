"""A training function of one's own that cannot do what a method asks is told before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedmerge.errors import ConfigError, FedMergeError
from fedmerge.simulation import compare, make_config

BASE = {
    "rounds": 2,
    "partition": {"clients": 2, "scheme": "iid"},
    "model": {"name": "logistic"},
    "training": {"epochs": 1, "batch_size": 64},
    "workers": 1,
}
CALLS: list[int] = []


def descend(model, batches, settings, *, corrected=True):
    CALLS.append(sum(len(y) for _, y in batches))
    optimizer, total = torch.optim.SGD(model.parameters(), settings.learning_rate), 0.0
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if corrected:
            batches.correct(model)
        optimizer.step()
        total += loss.item()
    return {"steps": len(batches), "loss": total / len(batches)}


def whole(model, batches, settings):
    return {**descend(model, batches, settings), "learning_rate": settings.learning_rate}


def uncorrected(model, batches, settings):
    return {**descend(model, batches, settings, corrected=False), "learning_rate": settings.learning_rate}


def without_rate(model, batches, settings):
    return descend(model, batches, settings)


def nothing(model, batches, settings):
    descend(model, batches, settings)


def broken(model, batches, settings):
    return {"steps": len(batches), "loss": settings.no_such_setting}


def settings_of(method, function, **training):
    return make_config(BASE, {"methods": [method], "training": {"train_fn": f"{__name__}:{function}", **training}})


@pytest.mark.parametrize(
    ("method", "function", "training", "words"),
    [
        ("scaffold", "without_rate", {}, "scaffold with training.train_fn .* learning_rate"),
        ("scaffold", "uncorrected", {}, r"batches\.correct\(model\)"),
        ("feddyn", "uncorrected", {"steps": 3, "epochs": None}, r"feddyn .* batches\.correct\(model\)"),
        ("fedprox", "uncorrected", {}, r"batches\.correct\(model\)"),
        ("fedavg", "uncorrected", {"proximal_mu": 0.1}, r"batches\.correct\(model\)"),
        ("fednova", "nothing", {}, "returns a TrainingReport"),
        ("flwr.serverapp.strategy:FedAvg", "nothing", {}, "returns a TrainingReport"),
        ("fedavg", "broken", {}, "fails on a first batch: AttributeError: .*no_such_setting"),
    ],
)
def test_what_a_method_asks_of_a_training_function_is_tried_first(tmp_path, method, function, training, words):
    with pytest.raises(ConfigError, match=words):
        compare(settings_of(method, function, **training), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def falling(position, length):
    return 1 / (1 + position) if position < 1 else -1.0


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"schedule": f"{__name__}:faling"}, "Did you mean 'falling'"),
        ({"schedule": f"warmup(length=2)+{__name__}:falling"}, r"gives the factor -.* at position 1: want a positive"),
        ({"step_schedule": "no_such_module:cosine"}, "cannot import module"),
        ({"step_schedule": f"{__name__}:falling"}, "at position 1"),
    ],
)
def test_schedules_are_read_to_their_end_first(tmp_path, training, words):
    with pytest.raises(FedMergeError, match=words):
        compare(make_config(BASE, {"methods": ["fedavg", "fedprox"], "training": training}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_empty_says_to_leave_it_out(tmp_path):
    with pytest.raises(FedMergeError, match=r"the loss is empty .*leave it out"):
        compare(make_config(BASE, {"methods": ["fedavg"], "task": {"loss": ""}}), tmp_path / "out")


def test_one_batch_is_enough_to_try_and_what_fits_runs(tmp_path):
    CALLS.clear()
    assert len(compare(settings_of("scaffold", "whole"), tmp_path / "out").runs) == 1
    assert len(CALLS) == 1 + 2 * 2  # the trial, and two clients in two rounds
    assert CALLS[0] == 64 < min(CALLS[1:])


def test_who_needs_no_rate_needs_none(tmp_path):
    assert len(compare(settings_of("feddyn", "without_rate"), tmp_path / "out").runs) == 1
