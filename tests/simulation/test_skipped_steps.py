"""Steps of a refinement that do not apply to a model are skipped, no client fails, and the record says why."""

import json

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption
from fedmerge.simulation import compare, make_config

BASE = {
    "rounds": 1,
    "partition": {"clients": 3, "held_out": 0.2},
    "training": {"steps": 3},
    "engine": "serial",
}

MLP = {"model": {"name": "mlp", "options": {"hidden": [8]}}}
CONVOLUTIONAL, TEMPERED = ({"model": {"name": f"{__name__}:{name}"}} for name in ("convolutional", "tempered"))


def convolutional():
    """Classes by convolutions alone, their positions averaged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def tempered():
    """A linear layer whose outputs are not the model's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10), nn.Tanh())


def last_row(out, layer):
    done = compare(make_config(BASE, layer), out, lambda row: None)
    assert not done.failed
    return json.loads((done.runs[0] / "rounds.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("method", "layer", "steps"),
    [
        ("fedkfac(steps=1)", CONVOLUTIONAL, ["RidgeStep"]),
        ("fedkfac(steps=1)", TEMPERED, ["RidgeStep"]),
        ("fedavg+logistic_head", TEMPERED, ["LogisticStart"]),
        ("fedavg+ridge_head", {**MLP, "personal": ["layers.1"]}, ["RidgeStep"]),
        ("fedavg+ridge_head", {"model": {**MLP["model"], "frozen": ["layers.1"]}}, ["RidgeStep"]),
        ("fedavg+ridge_head", MLP, []),
    ],
)
def test_a_step_that_does_not_apply_is_in_the_record_and_nobody_fails(method, layer, steps, tmp_path):
    row = last_row(tmp_path, {"methods": [method], **layer})
    assert [one["step"] for one in row["steps_skipped"]] == steps
    assert all("there is no head to fit" in one["reason"] for one in row["steps_skipped"])
    assert (row["clients_ok"], row["clients_failed"], row["failures"], row["refused"]) == (3, 0, [], [])


def test_the_other_steps_are_taken(tmp_path):
    row = last_row(tmp_path / "whole", {"methods": ["fedkfac(steps=1)"], **CONVOLUTIONAL})
    plain = last_row(tmp_path / "plain", {"methods": ["fedkfac(head=none,steps=0)"], **CONVOLUTIONAL})
    assert row["test_loss"] < plain["test_loss"]


def test_whoever_asks_for_the_sums_themselves_is_told_that_there_are_none():
    with pytest.raises(InvalidOption, match="not those of a linear layer"):
        fedmerge.compute_statistics(convolutional(), [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))], ["head_sums"])
