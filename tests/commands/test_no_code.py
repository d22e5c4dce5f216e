"""What a configuration may run is told before it is imported, and refused with ``--no-code``."""

from __future__ import annotations

import sys
import tomllib

import pytest

from fedmerge import cli
from fedmerge.lookup.own_code import named_code
from fedmerge.models import build_model
from fedmerge.records.run_records import write_tensors

CODE = """
from pathlib import Path
Path("ran").touch()
from dataclasses import dataclass
from torch import nn
from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.observers import Observer
from fedmerge.simulation.scenarios.attacks import Attack
from flwr.serverapp.strategy import FedAvg

def model(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def method():
    return FedAvg(min_train_nodes=2)

def fit(model, batches, settings):
    return {"steps": len(batches), "loss": 1.0}

def falling(position, length):
    return 1 / (1 + position)

@dataclass(frozen=True)
class Firsts(Aggregator):
    def merge(self, updates, context, memory):
        return dict(next(iter(updates)).state), {}

class Noting(Observer):
    def __init__(self, path: str = "notes"):
        self.path = path

    def round_done(self, row, state):
        with open(self.path, "a") as file:
            print(row['method'], row['round'], len(state), file=file)

@dataclass(frozen=True)
class Zeros(Attack):
    "Send zeros."
    def sent(self, state, base, generator):
        return {name: 0 * tensor for name, tensor in state.items()}
"""
RUN = """
rounds = 1
methods = [{method}]
seeds = [0]
model.name = "{model}"
partition = {{clients = 3}}
"""
COMMANDS = {
    "run": ("run", "c.toml", "--out", "o"),
    "compare": ("compare", "c.toml", "--out", "o"),
    "merge": ("merge", "a.safetensors", "b.safetensors", "--model", "theirs:model", "--out", "o"),
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("theirs", None)
    (tmp_path / "theirs.py").write_text(CODE)
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", build_model("logistic", (1, 8, 8), 10, seed=0).state_dict())
    return tmp_path


def fedmerge(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code or 0, capsys.readouterr().err


def written(folder, model="logistic", method='"fedavg"'):
    (folder / "c.toml").write_text(RUN.format(model=model, method=method))


@pytest.mark.parametrize("command", COMMANDS)
def test_code_is_refused_before_it_is_imported(command, monkeypatch, capsys, tmp_path):
    written(tmp_path, model="theirs:model")
    code, err = fedmerge(monkeypatch, capsys, *COMMANDS[command], "--no-code")
    assert code == 2
    assert "runs code: model theirs:model" in err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "o").exists()


def test_a_method_of_others_is_code_and_a_strategy_of_flower_is_not(monkeypatch, capsys, tmp_path):
    written(tmp_path, method='"theirs:method", "flwr.serverapp.strategy:FedAvg"')
    code, err = fedmerge(monkeypatch, capsys, "compare", "c.toml", "--out", "o", "--no-code")
    assert (code, "method theirs:method" in err) == (2, True)
    assert "flwr" not in err
    assert not (tmp_path / "ran").exists()
    for name in ("flwr.serverapp.strategy:os", "flwr.serverapp.strategy.fedavg:FedAvg", "os:system"):
        assert named_code([], [f"{name}(command=true)"]) == [f"method {name}"]


def test_what_runs_is_told_where_it_is_allowed(monkeypatch, capsys, tmp_path):
    written(tmp_path, model="theirs:model")
    code, err = fedmerge(monkeypatch, capsys, "run", "c.toml", "--out", "o")
    assert code == 0, err
    assert "c.toml runs code: model theirs:model" in err
    assert (tmp_path / "ran").exists()


def test_resume_refuses_the_code_of_what_was_begun(monkeypatch, capsys, tmp_path):
    written(tmp_path, model="theirs:model")
    (tmp_path / "o").mkdir()
    (tmp_path / "c.toml").rename(tmp_path / "o" / "unfinished.toml")
    code, err = fedmerge(monkeypatch, capsys, "resume", "o", "--no-code")
    assert (code, "runs code: model theirs:model" in err) == (2, True)
    assert not (tmp_path / "ran").exists()


OTHERS = {
    "observer theirs:Noting": "observers=['theirs:Noting(path=here)']",
    "attack theirs:Zeros": "attack.kind=theirs:Zeros",
    "training function theirs:fit": "training.train_fn=theirs:fit",
    "method theirs:Firsts": "methods=['c2m3(combine=theirs:Firsts)']",
    "schedule theirs:falling": "training.schedule=warmup(length=2)+theirs:falling",
}


def test_a_combination_in_a_table_of_options_is_code_too_and_is_recorded(monkeypatch, capsys, tmp_path):
    written(tmp_path, method='"c2m3"')
    command = ("run", "c.toml", "--out", "o", "--set", "options.c2m3.combine=theirs:Firsts")
    code, err = fedmerge(monkeypatch, capsys, *command, "--no-code")
    assert (code, "runs code: method theirs:Firsts." in err) == (2, True)
    assert not (tmp_path / "ran").exists()
    assert fedmerge(monkeypatch, capsys, *command)[0] == 0
    resolved = tomllib.loads(next((tmp_path / "o").glob("*/config.toml")).read_text())
    assert resolved["options"]["c2m3"]["combine"] == "theirs:Firsts"


@pytest.mark.parametrize("what", OTHERS)
def test_observers_and_attacks_of_ones_own_are_code_too(monkeypatch, capsys, tmp_path, what):
    written(tmp_path)
    command = ("run", "c.toml", "--out", "o", "--set", OTHERS[what])
    code, err = fedmerge(monkeypatch, capsys, *command, "--no-code")
    assert (code, f"runs code: {what}." in err) == (2, True)
    assert not (tmp_path / "ran").exists()
    code, err = fedmerge(monkeypatch, capsys, *command)
    assert code == 0, err
    assert f"c.toml runs code: {what}" in err
    (tmp_path / "ran").unlink()
    sys.modules.pop("theirs")
    code, err = fedmerge(monkeypatch, capsys, "resume", "o", "--no-code")
    assert (code, f"runs code: {what}." in err) == (2, True)
    assert not (tmp_path / "ran").exists()


def test_an_observer_in_a_file_beside_the_configuration_watches(monkeypatch, capsys, tmp_path):
    written(tmp_path, method='"fedavg", "fednova"')
    code, err = fedmerge(
        monkeypatch, capsys, "compare", "c.toml", "--out", "o", "--observers", "theirs:Noting(path=here),early_stopping"
    )
    assert code == 0, err
    assert (tmp_path / "here").read_text().split("\n")[:-1] == [
        f"{method} {round} 2" for method in ("fedavg", "fednova") for round in (0, 1)
    ]


def test_without_code_nothing_is_refused(monkeypatch, capsys, tmp_path):
    written(tmp_path)
    code, err = fedmerge(monkeypatch, capsys, "run", "c.toml", "--out", "o", "--no-code")
    assert code == 0, err
    assert "runs code" not in err
