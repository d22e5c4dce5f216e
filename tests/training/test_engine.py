"""The engine that trains a cohort is the one measured to be faster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedmerge.errors import CannotStack, InvalidOption
from fedmerge.models import build_model
from fedmerge.training import (
    LocalTraining,
    Participant,
    choose_engine,
    engine,
    train_cohort,
    train_one_by_one,
)

RNG = torch.Generator().manual_seed(0)
PEOPLE = [Participant(i, torch.randn(5, 4, generator=RNG), torch.arange(5) % 3) for i in range(12)]
SETTINGS = LocalTraining(batch_size=2)
NAMES = {"seed": 0, "round": 1}


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def text_model():
    tokens = torch.ones(4, 3, dtype=torch.long)
    model = build_model("char_lstm", (3,), 7, seed=0, hidden=4)
    return model, [Participant(0, tokens, tokens), Participant(1, tokens, tokens)]


@pytest.mark.parametrize(("serial", "stacked", "name"), [(1.0, 0.4, "stacked"), (1.0, 1.3, "serial")])
def test_the_faster_is_chosen(serial, stacked, name):
    # In turn: serial, stacked, serial, stacked; the least of each counts.
    times = iter([serial, stacked * 9, serial * 9, stacked])

    def measure(call):
        call()
        return next(times)

    choice = choose_engine(net(), PEOPLE, SETTINGS, **NAMES, measure=measure)
    assert (choice.name, choice.serial_seconds, choice.stacked_seconds) == (name, serial, stacked)
    assert f"{stacked:.2f} of the serial time, on 8 clients" in choice.reason


def test_what_cannot_be_stacked_trains_one_by_one_and_says_why():
    model, people = text_model()
    choice = choose_engine(model, people, SETTINGS, **NAMES)
    assert choice.name == "serial"
    assert "LSTM" in choice.reason


def test_engines_that_disagree_are_not_compared_by_their_speed(monkeypatch):
    def wrong(model, *rest, **names):
        found = train_cohort(model, *rest, **names)
        found.states["0.weight"].mul_(1.01)
        return found

    monkeypatch.setattr(engine, "train_cohort", wrong)
    choice = choose_engine(net(), PEOPLE, SETTINGS, **NAMES)
    assert choice.name == "serial"
    assert "differ" in choice.reason


def test_clients_of_other_shapes_cannot_be_stacked():
    model = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Linear(4, 3))
    people = [Participant(i, torch.randn(5, size), torch.arange(5) % 3) for i, size in enumerate((4, 8))]
    with pytest.raises(CannotStack, match="shapes"):
        train_cohort(model, people, SETTINGS, **NAMES)
    assert len(train_one_by_one(model, people, SETTINGS, **NAMES).reports) == 2


def test_one_by_one_leaves_the_model_as_it_was():
    # Batches of one have no variance.
    model, settings = nn.Sequential(nn.BatchNorm1d(4), net()).eval(), LocalTraining(batch_size=5)
    model[1][0].weight.grad = torch.ones(6, 4)
    before = copy.deepcopy(model.state_dict())
    found = train_one_by_one(model, PEOPLE[:3], settings, **NAMES)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[1][0].weight.grad, torch.ones(6, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    stacked = train_cohort(model, PEOPLE[:3], settings, **NAMES)
    assert list(found.states) == list(stacked.states)
    for name, tensor in stacked.states.items():
        torch.testing.assert_close(tensor, found.states[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(InvalidOption, match="no participants"):
        train_one_by_one(model, [], SETTINGS, **NAMES)
