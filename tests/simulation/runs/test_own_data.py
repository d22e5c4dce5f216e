"""Data of one's own in whole runs: by configuration alone, by message and by cohort, in this process and on workers."""

from __future__ import annotations

import json
import os
import resource
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fedmerge.cli import app
from fedmerge.data import ClientData
from fedmerge.errors import DataError, ModelError
from fedmerge.simulation.runs.compare import compare
from fedmerge.simulation.runs.config import make_config
from fedmerge.simulation.runs.experiment import Experiment

MODULE = """
    import numpy as np
    import torch
    from torch.utils.data import Dataset

    class Mapped(Dataset):
        def __init__(self, path, rows):
            self.path, self.rows = str(path), rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            row = np.load(self.path, mmap_mode="r")[self.rows[i]]
            return np.array(row[:-1], dtype=np.float32), int(row[-1])

    def _rows(data_dir):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(60, 4))
        y = (x[:, 0] > 0).astype(np.int64)
        return x, y

    def tensors(data_dir):
        x, y = _rows(data_dir)
        return x[:48], y[:48], x[48:], y[48:]

    def mapped(data_dir):
        x, y = _rows(data_dir)
        path = data_dir / "rows.npy"
        np.save(path, np.column_stack([x, y]))
        rows = np.arange(60)
        return {"train": Mapped(path, rows[:48]), "test": Mapped(path, rows[48:])}

    def uneven(dataset, clients, generator, largest=20):
        order = generator.permutation(len(dataset.train))
        return {"large": order[:largest], "one patient": order[largest : largest + 1], "rest": order[largest + 1 :]}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a module of one's own, which no other test sees."""
    name = f"own_data_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield name
    sys.modules.pop(name, None)


def settings(mine, **changes):
    base = {
        "methods": ["fedavg"],
        "rounds": 2,
        "data": {"name": f"{mine}:tensors", "dir": "."},
        "partition": {"scheme": f"{mine}:uneven"},
        "model": {"name": "mlp", "options": {"hidden": [3]}},
        "training": {"batch_size": 8},
        "engine": "serial",
    }
    return {**base, **changes}


def lines(run):
    return (run / "rounds.jsonl").read_text().splitlines()


def rows_of(config, out):
    runs, failed = compare(make_config(config), out, lambda *_: None)
    assert not failed
    wanted = ("test_loss", "train_loss", "clients_ok", "bytes_up")
    return [[{key: row[key] for key in wanted} for row in map(json.loads, lines(run))] for run in runs]


def test_what_is_read_from_a_file_trains_as_tensors_do_whatever_the_engine_asked_for(mine, tmp_path):
    want = rows_of(settings(mine), tmp_path / "tensors")
    lazy = {"name": f"{mine}:mapped", "dir": "."}
    for engine in ("serial", "stacked", "auto"):
        assert rows_of(settings(mine, data=lazy, engine=engine), tmp_path / engine) == want
    assert want[0][-1]["clients_ok"] == 3  # the client with one patient is one of them


def test_one_client_of_one_example_keeps_it_for_training(mine):
    experiment = Experiment(make_config(settings(mine)), 0)
    assert experiment.partition.client_names == ("large", "one patient", "rest")
    assert (len(experiment.partition.train[1]), len(experiment.partition.held_out[1])) == (1, 0)


def test_methods_that_measure_read_what_does_not_fit_into_memory(mine, tmp_path):
    methods = ["fedfisher", "fedavg+recalibrate"]
    want = rows_of(settings(mine, methods=methods, rounds=1), tmp_path / "tensors")
    lazy = {"name": f"{mine}:mapped", "dir": "."}
    assert rows_of(settings(mine, methods=methods, rounds=1, data=lazy), tmp_path / "lazy") == want


def test_questions_of_the_server_are_answered_without_holding_all_examples(mine, tmp_path, monkeypatch):
    methods = ["fedkfac", "fedavg+natural_gradient"]
    want = rows_of(settings(mine, methods=methods, rounds=1), tmp_path / "tensors")
    monkeypatch.setattr("fedmerge.questions.answering.joined", None)  # who joins all batches holds all examples
    lazy = {"name": f"{mine}:mapped", "dir": "."}
    found = rows_of(settings(mine, methods=methods, rounds=1, data=lazy), tmp_path / "lazy")
    for one, other in zip(found, want, strict=True):
        assert one[-1]["test_loss"] == pytest.approx(other[-1]["test_loss"], rel=1e-4)
        assert one[-1]["clients_ok"] == 3


def test_one_file_beside_the_configuration_is_enough(mine, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    folder.mkdir()
    (tmp_path / f"{mine}.py").rename(folder / f"{mine}_beside.py")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    (folder / "run.toml").write_text(
        f'methods = ["fedavg"]\nrounds = 1\n[data]\nname = "{mine}_beside:mapped"\ndir = "study"\n'
        f'[partition]\nscheme = "{mine}_beside:uneven"\noptions = {{largest = 30}}\n'
    )
    arguments = ["study/run.toml", "--out", "out"]
    refused = CliRunner().invoke(app, ["compare", *arguments, "--no-code"])
    assert refused.exit_code != 0
    assert f"data set {mine}_beside:mapped, partition {mine}_beside:uneven" in str(refused.exception or refused.output)
    done = CliRunner().invoke(app, ["compare", *arguments])
    assert done.exit_code == 0, done.output
    divided = CliRunner().invoke(app, ["partition", *arguments])
    assert "one patient" in divided.output


def test_a_table_is_compared_without_a_line_of_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pairs = enumerate(rng.normal(size=(60, 2)))
    lines = [f"{a:.3f},{'xy'[int(b > 0)]},{'NS'[i % 2]},{int(a + b > 0)}" for i, (a, b) in pairs]
    (tmp_path / "wards.csv").write_text("\n".join(["age,kind,site,ill", *lines]))
    table = ["--dataset", "wards.csv", "--set", "data.label=ill", "--set", "data.client=site"]
    flags = ["--methods", "fedavg", "--rounds", "2", "--model", "logistic", "--out", "out"]
    done = CliRunner().invoke(app, ["compare", *table, *flags])
    assert done.exit_code == 0, done.output
    assert "wards.csv runs code" not in done.output
    divided = CliRunner().invoke(app, ["partition", *table, "--out", "out"])
    assert {"N", "S"} <= set(divided.output.split())
    flags = ["--partition", "column", "--set", "partition.column=kind", "--out", "p"]
    by_column = CliRunner().invoke(app, ["partition", *table, *flags])
    assert {"x", "y"} <= set(by_column.output.split())


def test_numbers_in_a_table_beside_the_configuration_are_regressed_on(tmp_path, monkeypatch):
    folder = tmp_path / "study"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [f"{a:.4f},{'NS'[i % 2]},{3 * a + 0.5:.4f}" for i, a in enumerate(rng.normal(size=60))]
    (folder / "costs.csv").write_text("\n".join(["age,site,cost", *rows]))
    (folder / "run.toml").write_text(
        'methods = ["fedavg"]\nrounds = 3\n[data]\nname = "costs.csv"\nlabel = "cost"\nclient = "site"\n'
        '[model]\nname = "logistic"\n[training]\nlearning_rate = 0.05\nepochs = 5\n'
    )
    done = CliRunner().invoke(app, ["compare", "study/run.toml", "--out", "out"])
    assert done.exit_code == 0, done.output
    first, *_, last = map(json.loads, lines(tmp_path / "out" / "fedavg-seed0"))
    assert first["test_loss"] > 1
    assert last["test_loss"] < 0.01  # a line is learnt
    assert last["test_mae"] < 0.1
    divided = CliRunner().invoke(app, ["partition", "study/run.toml", "--out", "out"])
    assert {"N", "S"} <= set(divided.output.split())


@pytest.mark.parametrize("task", [{"name": "regression"}, {"loss": "torch.nn:HuberLoss"}])
def test_whole_numbers_in_a_table_are_regressed_on_as_they_stand(tmp_path, task):
    """They are no classes, whose numbers count the values that occur."""
    (tmp_path / "stays.csv").write_text(
        "\n".join(["age,ward,days", *(f"{i},{'NS'[i % 2]},{7 * i}" for i in range(20))])
    )
    data = {"name": str(tmp_path / "stays.csv"), "label": "days"}
    dataset = Experiment(make_config({"data": data, "model": {"name": "logistic"}, "task": task}), 0).dataset
    assert {*dataset.train_y.tolist()} <= {7.0 * i for i in range(20)}
    assert dataset.train_y.max() > 19
    assert Experiment(make_config({"data": data}), 0).dataset.num_classes == 20  # classes where nobody says otherwise
    texts = make_config({"data": {**data, "label": "ward"}, "task": task})
    with pytest.raises(DataError, match="'ward': a regression wants numbers"):
        _ = Experiment(texts, 0).dataset


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"name": "digits", "label": "ill"}}, "data.label names a column of a table"),
        ({"partition": {"scheme": "column"}}, "a partition by column wants both"),
        ({"partition": {"scheme": "iid", "column": "site"}}, "a partition by column wants both"),
        ({"partition": {"scheme": "iid", "options": {"x": 1}}}, "these are for a module:function"),
        ({"data": {"name": "wards.xlsx"}}, "A file of your own ends in .csv"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, words):
    with pytest.raises(Exception, match=words):
        _ = Experiment(make_config(changes), 0).dataset


class Large(torch.utils.data.Dataset):
    """400 megabytes, of which each row is made when it is read."""

    def __len__(self):
        return 400

    def __getitem__(self, i):
        return torch.full((250_000,), float(i % 2)), i % 2


def test_data_larger_than_the_memory_that_is_left_streams():
    from fedmerge.training import LocalTraining, judge, train

    net = nn.Sequential(nn.Linear(250_000, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = ClientData(Large(), Large())
    train(net, data.train, None, LocalTraining(epochs=1, batch_size=8, learning_rate=1e-6), seed=0, client=0, round=1)
    found = judge(net, data.held_out, batch_size=8)
    assert found.labels == 400
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 150  # of 400 megabytes


@pytest.mark.slow
def test_workers_make_their_own_data_from_the_name(mine, tmp_path):
    lazy = {"name": f"{mine}:mapped", "dir": str(tmp_path)}
    want = rows_of(settings(mine, data=lazy), tmp_path / "here")
    assert os.path.exists(tmp_path / "rows.npy")  # noqa: PTH110
    assert rows_of(settings(mine, data=lazy, workers=2), tmp_path / "workers") == want


HOLES = """
    import numpy as np
    import torch

    def rows():
        x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        x[7, 2] = torch.nan
        pairs = list(zip(x, [i % 2 for i in range(20)]))
        return {"train": pairs, "test": pairs[10:], "clients": [i // 5 for i in range(20)], "num_classes": 2}
"""


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_whose_rows_hold_nan_is_left_out_of_the_round(mine, tmp_path, engine, caplog):
    (tmp_path / f"{mine}.py").write_text(textwrap.dedent(HOLES))
    config = settings(mine, data={"name": f"{mine}:rows"}, partition={"scheme": "natural"}, engine=engine)
    rows = rows_of(config, tmp_path / "out")[0]
    assert [row["clients_ok"] for row in rows[1:]] == [3, 3]
    assert "client 1" in caplog.text
    assert "inputs hold NaN" in caplog.text


class NormOfTwo(nn.Module):
    """A batch norm behind inputs of any form."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x, shift=0.0):
        return self.norm(self.linear(x + shift))


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_batch_norm_says_why_it_cannot_train_on_one_example(form):
    from fedmerge.training import LocalTraining, train

    x = torch.zeros(1, 4)
    inputs = {"tensor": x, "tuple": (x, x), "mapping": {"x": x, "shift": x}}[form]
    with pytest.raises(ModelError, match=r"client 5: batch norm cannot train on a batch of one example.*batch_size"):
        train(NormOfTwo(), inputs, torch.zeros(1).long(), LocalTraining(), seed=0, client=5, round=1)
