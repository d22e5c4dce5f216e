"""Comparisons of every kind of task from one configuration: what they learn, and what their records hold."""

from __future__ import annotations

import csv
import json

import pytest
import task_data
import torch

from fedmerge.commands.progress import Progress
from fedmerge.commands.tables import show, summary_table
from fedmerge.errors import ConfigError, FedMergeError, TaskError, UnknownName
from fedmerge.simulation import Experiment, compare, make_config
from fedmerge.simulation.runs.results import write_results


def read(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a comparison of a kind of task; the rows of each method's record."""

    def made(kind, **changes):
        monkeypatch.syspath_prepend(task_data.__file__.rpartition("/")[0])
        config = make_config(task_data.settings(kind), changes)
        folders, failed = compare(config, tmp_path, lambda _: None)
        assert not failed, failed
        return {folder.name: read(folder) for folder in folders}

    return made


BESIDES = {
    "regression": {"mae", "r2"},
    "multilabel": {"f1", "auroc"},
    "segmentation": {"iou"},
    "language model": {"perplexity"},
}


@pytest.mark.parametrize("kind", BESIDES)
def test_every_kind_of_task_learns_and_is_judged_by_its_metrics(kind, run):
    first, *_, last = run(kind)["fedavg-seed0"]
    assert {key for key in last if key.startswith("test_")} == {"test_loss", "test_accuracy"} | {
        f"test_{name}" for name in BESIDES[kind]
    }
    assert last["test_loss"] < 0.8 * first["test_loss"]
    if kind == "regression":
        assert last["test_accuracy"] is None
        assert last["test_mae"] < first["test_mae"]
    else:
        assert last["test_accuracy"] > first["test_accuracy"]
    if kind == "language model":
        assert 1 <= last["test_perplexity"] < first["test_perplexity"] <= 10
        assert last["test_perplexity"] == pytest.approx(torch.tensor(last["test_loss"]).exp().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["regression", "multilabel"])
@pytest.mark.parametrize("method", ["fedkfac", "fedfisher", "regmean", "fedavg+natural_gradient", "fedavg+ridge_head"])
def test_methods_of_statistics_are_no_worse_than_fedavg(kind, method, run):
    found = run(kind, methods=["fedavg", method], rounds=1, model={"apart": True}, training={"epochs": 8})
    average, other = (rows[-1]["test_loss"] for rows in found.values())
    assert other != average
    assert other < average


def test_a_server_judges_by_the_task(run):
    method = "fedfisher(variant=kfac,early_stopping=true)"
    found = run("regression", methods=["fedavg", method], rounds=1, server_examples=20, model={"apart": True})
    average, other = (rows[-1]["test_loss"] for rows in found.values())
    assert other < average


def test_tables_and_pictures_of_a_regression_show_its_loss(run, tmp_path, capsys):
    run("regression", methods=["fedavg", "fednova"], references=True, seeds=[0, 1])
    folders = sorted(tmp_path.glob("*-seed*"))
    rows, target, paths = write_results(make_config(task_data.settings("regression")), folders, tmp_path)
    assert target is None
    assert all(path.stat().st_size > 0 for path in paths)
    with (tmp_path / "summary.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [*(row["method"] for row in rows[:2]), "(ensemble)", "(best client)"]
    assert table[0]["final_accuracy_mean"] == ""
    assert 0 < float(table[0]["final_loss_mean"]) <= float(table[1]["final_loss_mean"])
    assert float(table[0]["final_mae_mean"]) > 0
    assert float(table[2]["final_loss_mean"]) > 0
    show(summary_table(rows, target))
    with Progress(2, 1) as progress:
        progress(read(folders[0])[-1])
    told = capsys.readouterr().out
    assert "Test loss" in told
    assert "mae" in told
    assert "test loss" in told


def test_a_loss_and_a_metric_of_ones_own(run):
    rows = run("regression", task={"name": None, "loss": "task_data:pinball", "metrics": ["task_data:within_one"]})
    first, *_, last = rows["fedavg-seed0"]
    assert last["test_loss"] < 0.8 * first["test_loss"]
    assert last["test_accuracy"] is None
    assert 0 <= first["test_within_one"] < last["test_within_one"] <= 1


def test_a_task_of_ones_own_decides_what_the_model_is_called_with_and_what_it_gives(run):
    plain, own = (
        run("regression", task={"name": name, "metrics": ["mae"], "options": options}, rounds=1)["fedavg-seed0"]
        for name, options in (("regression", {}), ("task_data:Doubled", {"factor": 1.0}))
    )
    assert [row["test_loss"] for row in own] == [row["test_loss"] for row in plain]
    other = run("regression", task={"name": "task_data:Doubled"}, rounds=1, training={"learning_rate": 0.01})
    first, last = (row["test_loss"] for row in other["fedavg-seed0"])
    assert first != plain[0]["test_loss"]
    assert last < 0.8 * first


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ({"name": "regresion"}, UnknownName, "regression"),
        ({"name": "classification", "options": {"smoothing": 0.1}}, UnknownName, "label_smoothing"),
        ({"name": "regression", "metrics": ["f2"]}, UnknownName, "f1"),
        ({"name": "regression", "loss": "torch.nn.functional:mse_loss"}, TaskError, "same thing"),
        ({"name": "classification", "options": {"class_weights": [-1]}}, TaskError, "zero or more"),
        ({"names": "regression"}, UnknownName, "task.name"),
    ],
)
def test_what_is_no_task_is_told_before_anything_runs(task, error, message):
    with pytest.raises(error, match=message):
        make_config({"task": task})


def test_code_that_a_task_names_is_not_run_by_reading_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "careless.py").write_text("raise SystemError('it ran')")
    monkeypatch.chdir(tmp_path)
    config = make_config({"task": {"name": "careless:Task", "metrics": ["careless:metric"]}})
    assert config.task.code == ("careless:Task", "careless:metric")
    with pytest.raises(FedMergeError, match="it ran"):
        _ = config.task.made()


def test_a_model_that_cannot_do_the_task_is_refused_before_training(run):
    with pytest.raises((TaskError, ConfigError), match="not one for each"):
        run("regression", model={"name": "task_data:one_output", "options": {}})


def test_a_task_tells_how_many_outputs_a_model_needs(monkeypatch):
    monkeypatch.syspath_prepend(task_data.__file__.rpartition("/")[0])
    told = {"data": {"name": "task_data:yes_or_no"}, "model": {"name": "logistic"}}
    for task, outputs in (({"name": "binary"}, 1), ({}, 2)):
        made = Experiment(make_config(told, {"task": task}), 0)
        assert made.model_fn()(made.dataset.test_x).shape == (80, outputs)
        made.check_model()


def test_every_run_says_its_task(run, tmp_path):
    run("segmentation", task={"options": {"class_weights": [1.0, 3.0, 3.0]}}, rounds=1)
    text = (tmp_path / "fedavg-seed0" / "config.toml").read_text()
    assert "class_weights = [1.0, 3.0, 3.0]" in text.replace("\n    ", " ").replace("[ ", "[").replace(",\n]", "]")
