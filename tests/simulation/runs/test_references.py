"""What the clients' own models reach."""

from __future__ import annotations

import json

import pytest
import torch

from fedmerge.simulation import compare, make_config
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.grids.simulation_grid import SimulationGrid
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.simulation.runs.references import reference_accuracies
from fedmerge.strategies import from_arrays

BASE = {
    "methods": ["fedavg"],
    "rounds": 2,
    "partition": {"clients": 4, "alpha": 0.1},
    "model": {"name": "logistic"},
    "references": True,
}


def trained():
    experiment = Experiment(make_config(BASE), 0)
    grid = MeasuredGrid(SimulationGrid(experiment.client_app(), 4), keep_trained=True)
    strategy = experiment.strategy("fedavg")
    strategy.start(grid, experiment.initial_arrays(), num_rounds=1)
    return experiment, list(grid.trained)


def test_the_ensemble_weighs_clients_by_their_share_of_each_class():
    experiment, replies = trained()
    replies.sort(key=lambda m: m.content["client"]["partition-id"])
    counts = experiment.partition.label_counts(experiment.dataset.train_y, 10).double()
    x, y = experiment.dataset.test_x, experiment.dataset.test_y
    scores, alone = 0, []
    for client, message in enumerate(replies):
        model = experiment.model_fn()
        model.load_state_dict(from_arrays(message.content["arrays"]))
        probabilities = model.eval()(x).softmax(1).double()
        scores = scores + probabilities * counts[client] / counts.sum(0)
        alone.append((probabilities.argmax(1) == y).double().mean().item())
    got = reference_accuracies(experiment, replies)
    assert got["best client"] == pytest.approx(max(alone))
    assert got["ensemble"] == pytest.approx((scores.argmax(1) == y).double().mean().item())
    assert got["ensemble"] > got["best client"]


def test_replies_without_a_usable_model_are_left_out():
    experiment, replies = trained()
    whole = reference_accuracies(experiment, replies)
    del replies[0].content["metrics"]
    assert set(reference_accuracies(experiment, replies)) == set(whole)
    assert reference_accuracies(experiment, []) == {}


def test_the_first_round_of_a_record_holds_them(tmp_path):
    (folder,), _ = compare(make_config(BASE), tmp_path, lambda row: None)
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert set(rows[1]["references"]) == {"ensemble", "best client"}
    assert rows[0]["references"] == rows[2]["references"] == {}
    (other,), _ = compare(make_config(BASE, {"references": False}), tmp_path / "without", lambda row: None)
    assert all(json.loads(line)["references"] == {} for line in (other / "rounds.jsonl").read_text().splitlines())


def test_they_are_of_the_models_before_any_stage(tmp_path):
    settings = {"methods": ["fedavg", "fedma"], "rounds": 1, "model": {"name": "mlp", "options": {"hidden": [8]}}}
    folders, failed = compare(make_config(BASE, settings), tmp_path, lambda row: None)
    assert not failed
    last = [json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1]) for folder in folders]
    assert last[0]["references"] == last[1]["references"] != {}


def test_a_record_tells_what_compression_lost(tmp_path):
    settings = {"methods": ["regmean"], "rounds": 1, "statistics": {"compression": "int8", "budget": 0.2}}
    (folder,), failed = compare(make_config(BASE, settings), tmp_path, lambda row: None)
    assert not failed
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert 0 < rows[1]["statistics_error"] < 0.5
    model = sum(t.numel() * 4 for t in Experiment(make_config(BASE), 0).model_fn().state_dict().values())
    assert rows[1]["bytes_up"] < 4 * model * 1.6  # records have headers, and this model is tiny
    assert torch.isfinite(torch.tensor(rows[1]["test_loss"]))


def test_a_record_counts_the_answers_that_an_accountant_has_to_know_of(tmp_path):
    noise = {"clip": 2.0, "noise_multiplier": 1.0}
    settings = {"methods": ["fedavg", "fedavg+ridge_head"], "rounds": 2, "privacy": {"noise": noise}}
    folders, failed = compare(make_config(BASE, settings), tmp_path, lambda row: None)
    assert not failed
    told = {
        folder.name.partition("-seed")[0]: [json.loads(x)["answers"] for x in (folder / "rounds.jsonl").open()]
        for folder in folders
    }
    assert told == {"fedavg": [0, 0, 0], "fedavg+ridge_head": [0, 2, 2]}
