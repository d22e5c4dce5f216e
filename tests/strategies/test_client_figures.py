"""Metrics of the task on the clients' own examples: they travel as sums, and are those of all examples in one place."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fedmerge.data import ClientData
from fedmerge.simulation import SimulationGrid, compare, make_config
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.tasks import Binary, Regression
from fedmerge.training import LocalTraining, judge

N = 3


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(2, 1)


def examples(client, total):
    """A different number at each client, and for one of them all targets alike."""
    draws = torch.Generator().manual_seed(client)
    x = torch.randn(12 + 5 * client, 2, generator=draws)
    y = (x.sum(1) > 0.3 * client).float() if client else torch.ones(12)
    return ClientData(x[:6], y[:6], x[6:], y[6:])


def close(outputs, targets):
    return ((outputs.flatten() - targets).abs() < 0.5).float()


def judged(task, told=True):
    app = client_app(linear, examples, training=LocalTraining(steps=2), task=task)
    strategy = MergeStrategy("fedavg", model_fn=linear, min_available_nodes=N)
    if told:
        strategy.travel.facts["task"] = task
    with SimulationGrid(app, N, engine="serial") as grid:
        result = strategy.start(grid, to_arrays(linear().state_dict()), num_rounds=1)
    model = linear()
    model.load_state_dict(from_arrays(result.arrays))
    all_data = [examples(client, N) for client in range(N)]
    x, y = (torch.cat([tensors[i] for data in all_data for tensors in [data.held_out.tensors]]) for i in (0, 1))
    return dict(result.evaluate_metrics_clientapp[1]), judge(model, x, y, task=task).figures


@pytest.mark.parametrize(
    "task",
    [Regression(metrics=("mae", "rmse", "r2", close)), Binary(metrics=("f1", "auroc"))],
    ids=["numbers", "answers"],
)
def test_figures_are_those_of_all_held_out_examples_together(task):
    told, wanted = judged(task)
    assert {name: told[f"eval_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert not [name for name in told if name.startswith("sums")]


def test_a_server_that_does_not_know_the_task_knows_registered_metrics():
    told, wanted = judged(Regression(metrics=("mae", "r2", close)), told=False)
    assert told["eval_mae"] == pytest.approx(wanted["mae"], rel=1e-5)
    assert told["eval_r2"] == pytest.approx(wanted["r2"], rel=1e-5)
    assert "eval_close" not in told


@pytest.mark.parametrize("personal", [[], ["layers.1"]])
def test_they_are_in_the_record(personal, tmp_path):
    config = make_config(
        {
            "methods": ["fedavg"],
            "rounds": 1,
            "partition": {"clients": 3, "held_out": 0.2},
            "model": {"name": "mlp", "options": {"hidden": [8]}},
            "training": {"steps": 3},
            "engine": "serial",
            "task": {"name": "classification", "metrics": ["f1"]},
            "personal": personal,
        }
    )
    done = compare(config, tmp_path, lambda row: None)
    first, last = map(json.loads, (done.runs[0] / "rounds.jsonl").read_text().splitlines())
    assert "client_f1" not in first  # nobody has judged yet
    assert 0 < last["client_f1"] < 1
    assert (last["test_f1"] == last["client_f1"]) == bool(personal)
    assert last["client_accuracy"] is not None
