"""Comparisons with frozen and with personal parts: from a configuration alone."""

import json

import pytest
import torch
from torch import nn

from fedmerge.errors import ConfigError, UnknownName
from fedmerge.records.run_records import read_checkpoint
from fedmerge.simulation import Experiment, compare, make_config

BASE = {
    "methods": ["fedavg"],
    "rounds": 2,
    "partition": {"clients": 3, "held_out": 0.2},
    "model": {"name": "mlp", "options": {"hidden": [20, 8]}},
    "training": {"steps": 4},
    "engine": "serial",
}
FROZEN = {"model": {"frozen": ["layers.0"]}}
PERSONAL = {"personal": ["layers.2"]}


def normed(hidden=()):
    """A model with batch norm for the digits; widths are as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def ran(out, *layers):
    """Rows and model of each method."""
    done = compare(make_config(BASE, *layers), out, lambda row: None)
    assert not done.failed
    return [
        ([json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()], read_checkpoint(run)[1])
        for run in done.runs
    ]


def test_a_frozen_part_is_neither_sent_nor_counted(tmp_path):
    ((rows, state),) = ran(tmp_path, FROZEN)
    start = Experiment(make_config(BASE, FROZEN), 0).model_fn().state_dict()
    trained = 20 * 8 + 8 + 8 * 10 + 10
    assert [row["parameters"] for row in rows] == [trained] * 3
    for row in rows[1:]:
        assert 4 * trained < row["bytes_up"] / 3 < 4 * trained + 700  # with what tells names and shapes
        assert 4 * trained < row["bytes_down"] / 3 < 4 * trained + 700
        assert row["test_accuracy"] is not None
    assert {name for name in start if torch.equal(start[name], state[name])} == {"layers.0.weight", "layers.0.bias"}


@pytest.mark.parametrize("layer", [FROZEN, PERSONAL, {**FROZEN, **PERSONAL}])
@pytest.mark.parametrize("method", ["fedavg", "fednova", "fedfisher(variant=diag)"])
def test_however_clients_are_reached_it_is_one_record(method, layer, tmp_path):
    """A message each, one after the other in this process, or stacked where all start alike."""
    found = {}
    for engine in ("serial", "stacked"):
        ((rows, state),) = ran(tmp_path / engine, {"methods": [method], "engine": engine}, layer)
        found[engine] = rows, state
    for name, tensor in found["serial"][1].items():
        torch.testing.assert_close(found["stacked"][1][name], tensor, rtol=1e-4, atol=1e-5)
    for one, other in zip(*(rows for rows, _ in found.values()), strict=True):
        assert (one["bytes_up"], one["bytes_down"]) == (other["bytes_up"], other["bytes_down"])
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)


def test_each_client_is_judged_with_its_own_part(tmp_path):
    """The figures of a round are means over the clients' own models; with heads of their own they fit better."""
    shared = {"partition": {"alpha": 0.1, "held_out": 0.3}, "rounds": 4, "training": {"steps": 20}}
    ((rows, state),) = ran(tmp_path / "own", shared, PERSONAL)
    start = Experiment(make_config(BASE), 0).model_fn().state_dict()
    assert torch.equal(state["layers.2.weight"], start["layers.2.weight"])
    for row in rows[1:]:
        assert row["test_accuracy"] == row["client_accuracy"]
    ((common, _),) = ran(tmp_path / "common", shared)
    assert rows[-1]["client_accuracy"] > common[-1]["client_accuracy"]


def test_norms_that_stay_with_their_clients(tmp_path):
    """FedBN: scales, shifts and statistics are each client's own."""
    ((_, state),) = ran(tmp_path, {"model": {"name": f"{__name__}:normed", "options": {}}, "personal": ["2"]})
    start = normed().state_dict()
    assert {name for name in start if torch.equal(state[name], start[name])} == {n for n in start if n[0] == "2"}


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        ({"personal": ["head.*"]}, UnknownName, r"tensor in personal 'head\.\*'.*layers\.2\.weight"),
        ({"model": {"frozen": ["body"]}}, UnknownName, r"tensor in frozen 'body'.*layers\.0\.weight"),
        ({**PERSONAL, "references": True}, ConfigError, "references judge"),
        ({**PERSONAL, "evaluate_clients": False}, ConfigError, "evaluate_clients is false"),
        ({**PERSONAL, "partition": {"held_out": 0.0}}, ConfigError, "set partition.held_out"),
        ({"personal": "head"}, ConfigError, "wants a list in brackets"),
        ({"personal": "[head, x.*]"}, ConfigError, r"""--set 'personal=\["head", "x\.\*"\]'"""),
        ({"training": {"frozen_mode": "off"}}, Exception, "frozen_mode"),
    ],
)
def test_what_cannot_be_honoured_ends_before_anything_runs(layer, error, words, tmp_path):
    with pytest.raises(error, match=words):
        compare(make_config(BASE, layer), tmp_path, lambda row: None)
    assert not list(tmp_path.glob("*/rounds.jsonl"))
