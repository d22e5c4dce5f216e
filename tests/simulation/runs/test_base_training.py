"""A base trained by one command, federations that start from it, and clients in domains."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from fedmerge import cli
from fedmerge.data import load_dataset
from fedmerge.data.withheld import withheld_rows
from fedmerge.errors import ConfigError
from fedmerge.models import build_model
from fedmerge.plotting.summary import summarise
from fedmerge.records.model_tensors import read_metadata, read_state
from fedmerge.simulation.runs.base_training import pretrain
from fedmerge.simulation.runs.client_sources import DataFn
from fedmerge.simulation.runs.compare import compare
from fedmerge.simulation.runs.config import make_config
from fedmerge.simulation.runs.experiment import Experiment

SMALL = {
    "methods": ["fedavg"],
    "rounds": 1,
    "workers": 1,
    "model": {"name": "mlp", "options": {"hidden": [16]}},
    "training": {"steps": 2},
    "partition": {"scheme": "by_class_groups", "groups": 2, "clients": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrain(make_config(SMALL), tmp_path_factory.mktemp("base") / "base.safetensors", share=0.3, epochs=15)


def held(partition):
    return set(torch.cat([*partition.train, *partition.held_out]).tolist())


def test_a_base_learns_and_its_examples_go_to_no_client(base):
    assert base.examples == round(0.3 * 1437)
    assert base.accuracy > 0.7
    rows = withheld_rows(read_metadata(base.file), load_dataset("digits"), "base")
    config = make_config(SMALL, {"model": {"pretrained": str(base.file)}})
    mine = held(Experiment(config, 0).partition)
    assert mine.isdisjoint(rows.tolist())
    assert len(mine) == 1437 - len(rows)
    allowed = make_config(SMALL, {"model": {"pretrained": str(base.file)}, "data": {"withhold": False}})
    assert len(held(Experiment(allowed, 0).partition)) == 1437


def test_the_same_seed_gives_the_same_base(base, tmp_path):
    again = pretrain(make_config(SMALL), tmp_path / "again.safetensors", share=0.3, epochs=15)
    assert all(tensor.equal(read_state(base.file)[name]) for name, tensor in read_state(again.file).items())
    other = pretrain(make_config(SMALL), tmp_path / "other.safetensors", share=0.3, epochs=1, seed=1)
    assert read_metadata(other.file) != read_metadata(base.file)


def test_a_base_of_some_classes_knows_these(tmp_path):
    found = pretrain(make_config(SMALL), tmp_path / "five.safetensors", classes=[0, 1, 2, 3, 4], epochs=10)
    assert found.of_classes > 0.8
    assert found.accuracy < 0.6  # it has seen half of the classes
    rows = withheld_rows(read_metadata(found.file), load_dataset("digits"), "base")
    assert set(load_dataset("digits").train_y[rows].tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("settings", [{"model": {"frozen": ["*"]}}, {"data": {"domains": ["rotated"]}}])
def test_what_is_meant_for_clients_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="trained whole"):
        pretrain(make_config(SMALL, settings), tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="ends in"):
        pretrain(make_config(SMALL), tmp_path / "b.pt")


def test_the_command_takes_the_configuration_of_the_federation(tmp_path, monkeypatch, capsys):
    (tmp_path / "fed.toml").write_text(
        'methods = ["fedavg"]\npersonal = ["*.bias"]\n[model]\nname = "logistic"\npretrained = "base.safetensors"\n'
        '[data]\ndomains = ["rotated"]\n'
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    out = tmp_path / "base.safetensors"
    monkeypatch.setattr(
        sys, "argv", ["fedmerge", "pretrain", str(tmp_path / "fed.toml"), "--out", str(out), "--epochs", "1"]
    )
    with pytest.raises(SystemExit) as done:
        cli.main()
    told = capsys.readouterr()
    assert done.value.code in (0, None), told.err
    assert "trained on 431 of 1437 training examples, test accuracy" in told.out
    assert sorted(read_state(out)) == sorted(build_model("logistic", (1, 8, 8), 10, seed=0).state_dict())
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    assert "exists: choose another --out" in capsys.readouterr().err


def test_clients_have_a_domain_each_and_rows_tell_accuracies_by_domain(base, tmp_path):
    settings = {"model": {"pretrained": str(base.file)}, "data": {"domains": ["original", "inverted"]}}
    config = make_config(SMALL, settings)
    made = Experiment(config, 0)
    plain = Experiment(make_config(SMALL, {"model": settings["model"]}), 0)
    for client in (0, 1):
        x, y = DataFn(made._source)(client, 4).train.tensors
        raw, labels = DataFn(plain._source)(client, 4).train.tensors
        assert y.equal(labels)
        turned = raw.amin((2, 3), keepdim=True) + raw.amax((2, 3), keepdim=True) - raw
        assert torch.allclose(x, turned if client else raw)
    seen = []
    runs, failed = compare(config, tmp_path / "out", seen.append)
    assert not failed
    first = seen[0]
    by_domain = first["accuracy_by_domain"]
    assert list(by_domain) == ["original", "inverted"]
    assert math.isclose(sum(by_domain.values()) / 2, first["test_accuracy"], abs_tol=1e-6)  # halves of 360
    assert by_domain["original"] > 0.7
    assert by_domain["inverted"] < by_domain["original"]
    (line,) = summarise(runs, target=None)  # a mapping is no metric, and stays out of the table
    assert line["final_accuracy_mean"] == seen[-1]["test_accuracy"]
