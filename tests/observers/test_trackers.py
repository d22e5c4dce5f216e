"""What TensorBoard and MLflow are told: with stand-ins for their libraries, and with the real ones where they are."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from fedmerge.errors import MissingExtra, ObserverFailed
from fedmerge.observers import Ending, MLflow, Run, TensorBoard, Watch, make_observers
from fedmerge.simulation import compare, make_config

ROWS = [
    {"round": 0, "test_loss": 2.0, "train_loss": None, "references": {}, "skipped": None},
    {"round": 1, "test_loss": math.nan, "train_loss": 1.5, "references": {"ensemble": 0.75}, "skipped": None},
    {"round": 2, "test_loss": 1.0, "train_loss": 1.25, "references": {}, "skipped": "too few"},
]
POINTS = {
    ("test_loss", 2.0, 0),
    ("train_loss", 1.5, 1),
    ("references/ensemble", 0.75, 1),
    ("test_loss", 1.0, 2),
    ("train_loss", 1.25, 2),
}


def watched(observer, run, rows, error=None):
    with Watch([observer]).over(run) as watch:
        for row in rows:
            watch.round_done(row, {})
        if error is not None:
            raise error


class Writer:
    """Stands in for TensorBoard's."""

    made = ()

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.points, self.open = folder, purge_step, set(), True
        self.texts = []
        type(self).made += (self,)

    def add_scalar(self, name, value, step):
        self.points.add((name, value, step))

    def add_text(self, name, text, step):
        self.texts.append((name, text, step))

    def close(self):
        self.open = False


@pytest.fixture
def writers(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = type("Fresh", (Writer,), {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return module.SummaryWriter


def test_curves_stand_in_each_runs_folder(writers, tmp_path):
    run = Run("fedavg", 3, 2, folder=tmp_path / "a.partial", final=tmp_path / "a")
    watched(TensorBoard(), run, ROWS)
    (writer,) = writers.made
    assert writer.folder == str(tmp_path / "a.partial" / "tensorboard")
    assert (writer.points, writer.open, writer.purge_step) == (POINTS, False, None)
    assert writer.texts == []


def test_rounds_that_are_done_again_are_drawn_once(writers, tmp_path):
    watched(TensorBoard(dir=str(tmp_path)), Run("fedavg", 3, 2, done=1, rows=tuple(ROWS[:2])), ROWS[2:])
    (writer,) = writers.made
    assert writer.purge_step == 2
    assert writer.folder == str(tmp_path / "fedavg-seed3")


def test_why_a_run_was_stopped_is_written(writers, tmp_path):
    observer = TensorBoard(dir=str(tmp_path))
    observer.began(Run("fedavg", 0, 2))
    observer.ended(Ending(1, "enough"))
    assert writers.made[0].texts == [("stopped", "enough", 1)]


def test_a_run_without_a_folder_wants_one(writers):
    with pytest.raises(ObserverFailed, match="set dir"):
        watched(TensorBoard(), Run("fedavg", 0, 2), ROWS)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_a_library_that_is_missing_is_named_with_its_extra_before_anything_runs(monkeypatch, tmp_path, name, module):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    config = make_config({"observers": [name], "methods": ["fedavg"], "model": {"name": "logistic"}})
    with pytest.raises(MissingExtra, match=rf"observer '{name}' cannot be used .* pip install \"fedmerge\[{name}\]\""):
        compare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Client:
    """Stands in for MLflow's."""

    experiments: dict[str, str]
    runs: dict[str, SimpleNamespace]

    def __init__(self, tracking_uri=None):
        self.uri = tracking_uri

    def get_experiment_by_name(self, name):
        known = self.experiments.get(name)
        return None if known is None else SimpleNamespace(experiment_id=known)

    def create_experiment(self, name):
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment, tags, run_name):
        number = str(len(self.runs))
        info = SimpleNamespace(run_id=number)
        self.runs[number] = SimpleNamespace(
            info=info, tags=dict(tags), name=run_name, points=set(), params={}, experiment=experiment, status="RUNNING"
        )
        return self.runs[number]

    def search_runs(self, experiments, wanted, max_results):
        folder = wanted.removeprefix("tags.folder = '").removesuffix("'")
        return [run for run in self.runs.values() if run.tags["folder"] == folder][:max_results]

    def update_run(self, run, status):
        self.runs[run].status = status

    def log_param(self, run, name, value):
        assert name not in self.runs[run].params
        self.runs[run].params[name] = value

    def log_metric(self, run, name, value, step):
        self.runs[run].points.add((name, value, step))

    def set_tag(self, run, name, value):
        self.runs[run].tags[name] = value

    def set_terminated(self, run, status):
        self.runs[run].status = status


@pytest.fixture
def server(monkeypatch):
    module = ModuleType("mlflow")
    module.MlflowClient = type("Fresh", (Client,), {"experiments": {}, "runs": {}})
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module.MlflowClient


def test_a_run_is_logged_with_its_configuration_and_goes_on_under_its_number(server, tmp_path):
    run = Run("fedavg", 0, 2, final=tmp_path / "a", config={"rounds": 2, "training": {"epochs": 1}})
    with pytest.raises(KeyboardInterrupt):
        watched(MLflow(), run, ROWS[:2], KeyboardInterrupt())
    (logged,) = server.runs.values()
    assert (logged.name, logged.status) == ("a", "FAILED")
    assert logged.params == {"rounds": "2", "training.epochs": "1"}
    again = Run("fedavg", 0, 2, done=1, rows=tuple(ROWS[:2]), final=tmp_path / "a", config={"rounds": 2})
    watched(MLflow(), again, ROWS[2:])
    assert server.runs == {"0": logged}
    assert (logged.points, logged.status, logged.tags["stopped"]) == (POINTS, "FINISHED", "")
    watched(MLflow(), run, [])  # a new run in the same folder is another
    assert len(server.runs) == 2
    assert server.experiments == {"fedmerge": "0"}


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@installed("tensorboard")
def test_tensorboard_itself_reads_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny = {"rounds": 2, "methods": ["fedavg"], "model": {"name": "logistic"}, "partition": {"clients": 2}}
    rows = []
    (run,), failed = compare(make_config({**tiny, "observers": ["tensorboard"]}), tmp_path, rows.append)
    assert not failed
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    points = found.Scalars("test_accuracy")
    assert [(one.step, one.value) for one in points] == [
        (row["round"], pytest.approx(row["test_accuracy"])) for row in rows
    ]


@installed("mlflow")
def test_mlflow_itself_shows_the_run(tmp_path):
    import mlflow

    place = f"sqlite:///{tmp_path}/runs.db"
    (observer,) = make_observers([f"mlflow(tracking_uri='{place}')"])
    run = Run("fedavg", 0, 2, final=tmp_path / "a", config={"rounds": 2, "methods": ["fedavg"]})
    watched(observer, run, ROWS[:2])
    watched(observer, Run("fedavg", 0, 2, done=1, rows=tuple(ROWS[:2]), final=tmp_path / "a"), ROWS[2:])
    client = mlflow.MlflowClient(place)
    experiment = client.get_experiment_by_name("fedmerge").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.data.params == {"rounds": "2", "methods": "['fedavg']"}
    assert found.data.metrics == {"test_loss": 1.0, "train_loss": 1.25, "references/ensemble": 0.75}
    assert [point.step for point in client.get_metric_history(found.info.run_id, "test_loss")] == [0, 2]
    assert found.info.status == "FINISHED"
