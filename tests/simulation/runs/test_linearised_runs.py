"""Comparisons whose clients train in the tangent space: what is judged, recorded and refused."""

import json

import pytest
import task_data
import torch
from torch import nn

from fedmerge.clients import client_app
from fedmerge.data import ClientData
from fedmerge.errors import ConfigError, InvalidOption, ModelError
from fedmerge.models.tangent import linearise
from fedmerge.records.run_records import read_checkpoint
from fedmerge.simulation import Experiment, SimulationGrid, compare, make_config
from fedmerge.strategies import MergeStrategy, to_arrays
from fedmerge.training import LocalTraining
from fedmerge.training.judged import judge

BASE = {
    "methods": ["fedavg"],
    "rounds": 2,
    "partition": {"clients": 3, "held_out": 0.2},
    "model": {"name": "mlp"},
    "training": {"steps": 6, "learning_rate": 0.2, "linearised": ["*"]},
    "engine": "serial",
    "workers": 1,
}


def ran(out, *layers):
    """Configuration, rows and model of each method."""
    config = make_config(BASE, *layers)
    done = compare(config, out, lambda row: None)
    assert not done.failed
    rows = [[json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()] for run in done.runs]
    return config, rows, [read_checkpoint(run)[1] for run in done.runs]


def test_the_merged_model_is_judged_linearised_around_the_base_in_every_round(tmp_path):
    config, (rows,), (state,) = ran(tmp_path)
    plain = make_config(BASE, {"training": {"linearised": []}})
    experiment = Experiment(plain, 0)
    model = linearise(experiment.model_fn())
    model.load_state_dict(state)
    assert rows[-1]["test_loss"] == pytest.approx(judge(model, experiment.dataset.test).loss, rel=1e-5)
    assert rows[-1]["test_loss"] != pytest.approx(judge(model.plain, experiment.dataset.test).loss, rel=1e-3)
    assert rows[-1]["test_loss"] < rows[0]["test_loss"]
    held_out = [Experiment(config, 0).client_app().client.data_fn(i, 3).held_out for i in range(3)]
    judged = [judge(model, examples) for examples in held_out]
    assert rows[-1]["client_accuracy"] == pytest.approx(sum(judged[1:], judged[0]).accuracy)


def test_an_edit_is_the_setting_for_one_method_alone(tmp_path):
    plain = {"training": {"linearised": []}}
    _, (usual, edited), states = ran(tmp_path / "a", plain, {"methods": ["fedavg", "linearised+fedavg"]})
    _, (told,), (state,) = ran(tmp_path / "b")
    assert edited[-1]["test_loss"] == pytest.approx(told[-1]["test_loss"], rel=1e-4)
    assert edited[-1]["test_loss"] != pytest.approx(usual[-1]["test_loss"], rel=1e-3)
    torch.testing.assert_close(states[1], state, rtol=1e-4, atol=1e-5)


def test_with_frozen_and_personal_parts(tmp_path):
    parts = {
        "model": {"options": {"hidden": [12, 8]}, "frozen": ["layers.0"]},
        "personal": ["layers.2"],
        "training": {"personal_epochs": 1, "linearised": ["layers.1", "layers.2.weight"]},
    }
    _, (rows,), _ = ran(tmp_path, parts)
    assert rows[-1]["test_loss"] < rows[0]["test_loss"]


@pytest.mark.parametrize("kind", task_data.KINDS)
def test_every_task(tmp_path, kind):
    settings = task_data.settings(kind, engine="serial")
    settings["training"] |= {"epochs": 1, "linearised": ["*"]}
    done = compare(make_config(settings), tmp_path, lambda row: None)
    (before, *_, after) = [json.loads(line) for line in (done.runs[0] / "rounds.jsonl").read_text().splitlines()]
    assert after["test_loss"] < before["test_loss"]


def test_the_last_layer_linearised_and_fitted_by_squares(tmp_path):
    """Tangent fine-tuning as TAFT has it: all but the last part frozen, squares of scaled one-hot labels."""
    taft = {
        "task": {"name": "one_hot_squares"},
        "model": {"frozen": ["layers.0"]},
        "training": {"learning_rate": 0.01, "steps": 20},
    }
    _, (rows,), _ = ran(tmp_path, taft)
    assert rows[-1]["test_accuracy"] > 0.5


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def rows_of(partition_id, num_partitions):
    draws = torch.Generator().manual_seed(partition_id)
    x, y = torch.randn(20, 4, generator=draws), torch.randint(0, 3, (20,), generator=draws)
    return ClientData(x, y, x, y)


@pytest.mark.parametrize("messages", [True, False])
def test_a_strategy_tells_clients_that_were_made_without_it(messages):
    def run(method, training):
        grid = SimulationGrid(client_app(net, rows_of, training=training), 2)
        more = {"train_metrics_aggr_fn": lambda contents, key: contents[0]["metrics"]} if messages else {}
        strategy = MergeStrategy(method, model_fn=net, **more)
        result = strategy.start(grid=grid, initial_arrays=to_arrays(net().state_dict()), num_rounds=2)
        return result.arrays.to_torch_state_dict(), dict(result.evaluate_metrics_clientapp[2])

    usual = LocalTraining(learning_rate=0.5, epochs=3)
    told, figures = run("linearised+fedavg", usual)
    set_there, same = run("fedavg", LocalTraining(learning_rate=0.5, epochs=3, linearised=["*"]))
    plain, _ = run("fedavg", usual)
    torch.testing.assert_close(told, set_there, rtol=1e-4, atol=1e-5)
    assert figures == pytest.approx(same, rel=1e-4)
    assert (told["0.weight"] - plain["0.weight"]).abs().max() > 1e-3


def test_a_strategy_that_knows_its_model_refuses_what_does_not_go():
    grid = SimulationGrid(client_app(net, rows_of), 2)
    strategy = MergeStrategy("regmean", model_fn=lambda: linearise(net()))
    with pytest.raises(InvalidOption, match="measured within layers"):
        strategy.start(grid=grid, initial_arrays=to_arrays(net().state_dict()), num_rounds=1)


@pytest.mark.parametrize(
    ("settings", "kind", "told"),
    [
        ({"methods": ["otfusion"]}, InvalidOption, "re-orders neurons"),
        ({"model": {"apart": True}}, ConfigError, "model.apart has them start apart"),
        ({"methods": ["linearised(parameters=['layers.0'])+fedavg"]}, ConfigError, "leave one of them out"),
        ({"batch_norm": "recalibrate"}, InvalidOption, "measures batch norms anew"),
    ],
)
def test_what_does_not_go_is_refused_with_the_configuration(settings, kind, told):
    with pytest.raises(kind, match=told):
        make_config(BASE, settings)


class Fitted(torch.autograd.Function):
    """Without a derivative forward."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class OwnPart(nn.Module):
    """A model with a part of somebody's own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return Fitted.apply(self.head(x.flatten(1)))


def test_a_model_that_cannot_be_linearised_is_refused_before_anything_runs(tmp_path):
    settings = {"model": {"name": f"{__name__}:OwnPart", "options": {}}}
    with pytest.raises(ModelError, match="has no derivative that can be taken forward"):
        ran(tmp_path, settings)
    assert not list(tmp_path.iterdir())
