"""A comparison killed anywhere and resumed ends as one that nobody disturbed, to the last bit."""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedmerge import cli
from fedmerge.errors import RecordError
from fedmerge.records.checkpoints import checkpoint_files
from fedmerge.simulation import compare, make_config
from fedmerge.simulation.runs.unfinished import PLAN, find_unfinished
from fedmerge.simulation.workers.workers import InProcess
from fedmerge.training import EngineChoice
from tests.outcomes import outcome, outcomes

BASE = {
    "methods": ["fedavg"],
    "rounds": 3,
    "seeds": [0],
    "partition": {"clients": 4, "alpha": 0.5},
    "model": {"name": "logistic"},
    "engine": "serial",
}


class Killed(BaseException):
    """Nothing in fedmerge catches it, as nothing catches SIGKILL."""


def normed() -> nn.Module:
    """A model with batch norm for the digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


class NoisyFedAvg(FedAvg):
    """Keeps an object of whose inside nobody knows."""

    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.generator = random.Random(3)

    def configure_train(self, server_round, arrays, config, grid):
        config["learning-rate"] = self.generator.choice([0.05, 0.1, 0.2])
        return super().configure_train(server_round, arrays, config, grid)


def fitted(model, batches, settings):
    """Training in which nothing is ours, but for what the method asks for."""
    optimizer, losses = torch.optim.RMSprop(model.parameters(), settings.learning_rate), []
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        batches.correct(model)
        optimizer.step()
        losses.append(loss.item())
    return {"steps": len(losses), "loss": sum(losses) / len(losses)}


def ignore(_row):
    pass


def kill_after(round, method=None):
    """Interrupt once the row of that round is written, and its checkpoint."""

    def on_row(row):
        if row["round"] == round and method in (None, row["method"]):
            raise Killed

    return on_row


def interrupted(config, out, on_row):
    with pytest.raises(Killed):
        compare(config, out, on_row)


def resumed(out):
    for config in find_unfinished(out).configs:
        assert not compare(config, out, ignore, resume=True).failed


KINDS = {
    "plain": {},
    "memory of the server": {"methods": ["fednova+server_adam"], "options": {"fednova": {"server_momentum": 0.9}}},
    "memory of the method": {"methods": ["gradient_matching"]},
    "sampled clients": {"fraction_train": 0.5},
    "stacked": {"engine": "stacked"},
    "evaluation off": {"evaluate_clients": False},
    "clients that keep batch norms": {"batch_norm": "local", "model": {"name": f"{__name__}:normed"}},
    "clients that keep heads": {"personal": ["layers.1"], "model": {"name": "mlp", "options": {"hidden": [8]}}},
    "clients that keep heads, sampled, over Flower's": {
        "methods": ["flwr.serverapp.strategy:FedAvg"],
        "fraction_train": 0.5,
        "personal": ["layers.1"],
        "model": {"name": "mlp", "options": {"hidden": [8]}},
    },
    "clients that start apart": {"model": {"name": "mlp", "options": {"hidden": [8]}, "apart": True}},
    "control variates and schedules": {
        "methods": ["scaffold"],
        "fraction_train": 0.5,
        "training": {"schedule": "warmup(length=2)+cosine", "step_schedule": "step(every=2)", "momentum": 0.0},
    },
    "dynamic regularisers, stacked": {
        "methods": ["feddyn"],
        "engine": "stacked",
        "training": {"optimizer": "adamw", "schedule": "cosine"},
    },
    "a training function of one's own": {"methods": ["feddyn"], "training": {"train_fn": f"{__name__}:fitted"}},
    "early stopping": {"training": {"patience": 1, "epochs": 3, "learning_rate": 1.0}},
    "a model that grows": {"methods": ["pfnm"], "model": {"name": "mlp", "options": {"hidden": [8]}}},
    "references": {"references": True},
    "Flower's, sampling globally": {"methods": ["flwr.serverapp.strategy:FedAvg"], "fraction_train": 0.5},
    "Flower's with moments": {"methods": ["flwr.serverapp.strategy:FedAdam"]},
    "Flower's with momentum": {
        "methods": ["flwr.serverapp.strategy:FedAvgM"],
        "options": {"flwr.serverapp.strategy:FedAvgM": {"server_momentum": 0.9}},
    },
    "Flower's that cannot be saved": {"methods": [f"{__name__}:NoisyFedAvg"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_after_any_round_and_resumed_is_the_undisturbed_run(kind, tmp_path):
    config = make_config(BASE, KINDS[kind])
    compare(config, tmp_path / "undisturbed", ignore)
    for round in (0, 1, 2, 3) if kind == "plain" else (1, 2):
        out = tmp_path / f"killed-{round}"
        interrupted(config, out, kill_after(round))
        random.seed(round)  # another process
        resumed(out)
        assert outcomes(out) == outcomes(tmp_path / "undisturbed")


def killed_at_event(monkeypatch, number):
    """Kill before the `number`-th call that changes something on disk, or trains."""
    from fedmerge.clients import answers

    left = [number]

    def counted(function):
        def call(*arguments, **keywords):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    for name in ("replace", "rename", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(InProcess, "train_by", counted(InProcess.train_by))
    monkeypatch.setattr(answers, "judge", counted(answers.judge))


TWO = make_config(BASE, {"methods": ["fedavg", "fedavg+server_momentum"], "rounds": 2, "keep_checkpoints": 1})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What two undisturbed runs leave."""
    out = tmp_path_factory.mktemp("two")
    compare(TWO, out, ignore)
    return outcomes(out)


def check_every(step, offset, undisturbed, tmp_path):
    """Kill at every `step`-th moment from `offset` on, until there is none left."""
    for number in itertools.count(1 + offset, step):
        out = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            killed_at_event(patch, number)
            try:
                compare(TWO, out, ignore)
            except Killed:
                pass
            else:
                break
        if (out / PLAN).exists():
            resumed(out)
        else:  # not one round was begun, or all are done
            compare(TWO, out, ignore)
        assert outcomes(out) == undisturbed, number
        assert not [path for path in out.iterdir() if path.suffix in (".partial", ".old", ".toml")]
    assert number > 60


def test_a_comparison_killed_between_any_two_writes_is_resumed(undisturbed, tmp_path):
    check_every(9, 4, undisturbed, tmp_path)


@pytest.mark.study
@pytest.mark.parametrize("offset", range(9))
def test_a_comparison_killed_between_any_two_writes_is_resumed_at_more_moments(offset, undisturbed, tmp_path):
    check_every(9, offset, undisturbed, tmp_path)


def test_killed_again_and_again(tmp_path):
    config = make_config(BASE, {"methods": ["fedavg+server_adam"], "rounds": 5})
    compare(config, tmp_path / "undisturbed", ignore)
    out = tmp_path / "killed"
    interrupted(config, out, kill_after(0))
    for round in (1, 2, 3, 4):
        with pytest.raises(Killed):
            compare(config, out, kill_after(round), resume=True)
    resumed(out)
    assert outcomes(out) == outcomes(tmp_path / "undisturbed")


def test_finished_runs_stay_and_those_not_begun_are_started(tmp_path):
    config = make_config(BASE, {"methods": ["fedavg", "fedatt", "fednova"]})
    interrupted(config, tmp_path, kill_after(1, "fedatt"))
    finished = (tmp_path / "fedavg-seed0" / "rounds.jsonl").stat().st_mtime_ns
    seen = []
    done = compare(config, tmp_path, seen.append, resume=True)
    assert [folder.name for folder in done.runs] == ["fedavg-seed0", "fedatt-seed0", "fednova-seed0"]
    assert [(row["method"], row["round"]) for row in seen] == [
        ("fedatt", 2), ("fedatt", 3), ("fednova", 0), ("fednova", 1), ("fednova", 2), ("fednova", 3),
    ]  # fmt: skip
    assert (tmp_path / "fedavg-seed0" / "rounds.jsonl").stat().st_mtime_ns == finished


def test_what_an_earlier_comparison_left_is_not_resumed(tmp_path):
    """Records of other settings that stand in the folder are replaced, as the command that was killed was told to."""
    old = make_config(BASE, {"methods": ["fedavg", "fednova"]})
    compare(old, tmp_path, ignore)
    interrupted(old, tmp_path, kill_after(1, "fednova"))
    new = make_config(old.model_dump(mode="json"), {"training": {"learning_rate": 0.3}})
    interrupted(new, tmp_path, kill_after(1, "fedavg"))
    resumed(tmp_path)
    compare(new, tmp_path / "undisturbed", ignore)
    expected = outcomes(tmp_path / "undisturbed")
    assert {name: outcome(tmp_path / name) for name in expected} == expected


def test_the_engine_that_was_chosen_stays(tmp_path, monkeypatch):
    """The second process would measure otherwise, and must not."""
    config = make_config(BASE, {"engine": "auto"})
    monkeypatch.setattr(InProcess, "choose", lambda *_: EngineChoice("stacked", "faster then"))
    compare(config, tmp_path / "undisturbed", ignore)
    interrupted(config, tmp_path / "killed", kill_after(1))
    monkeypatch.setattr(InProcess, "choose", lambda *_: EngineChoice("serial", "faster now"))
    resumed(tmp_path / "killed")
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "undisturbed")
    assert [row["engine"] for row in outcomes(tmp_path / "killed")["fedavg-seed0"][0]] == [None, *["stacked"] * 3]


@pytest.mark.parametrize("damage", ["truncated", "edited", "empty"])
def test_a_damaged_checkpoint_leads_to_the_one_before(damage, tmp_path, caplog):
    config = make_config(BASE)
    compare(config, tmp_path / "undisturbed", ignore)
    out = tmp_path / "killed"
    interrupted(config, out, kill_after(2))
    path = checkpoint_files(out / "fedavg-seed0.partial" / "checkpoint")[-1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"truncated": content[:-100], "edited": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING, "fedmerge"):
        resumed(out)
    assert "round-000002.safetensors" in caplog.text
    assert outcomes(out) == outcomes(tmp_path / "undisturbed")


def test_no_whole_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    config = make_config(BASE)
    interrupted(config, tmp_path, kill_after(2))
    for path in checkpoint_files(tmp_path / "fedavg-seed0.partial" / "checkpoint"):
        path.write_bytes(path.read_bytes()[:-1])
    (failed,) = compare(config, tmp_path, ignore, resume=True).failed
    assert isinstance(failed.error, RecordError)
    assert "restore one from a backup, or delete" in str(failed.error)


def test_data_that_changed_in_between_are_refused(tmp_path):
    config = make_config(BASE)
    interrupted(config, tmp_path, kill_after(1))
    path = tmp_path / "fedavg-seed0.partial" / "partition.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    (failed,) = compare(config, tmp_path, ignore, resume=True).failed
    assert "restore the data" in str(failed.error)


def test_one_run_is_found_by_its_folder_finished_or_not(tmp_path):
    config = make_config(BASE, {"methods": ["fedavg", "fednova"]})
    interrupted(config, tmp_path, kill_after(1, "fednova"))
    for name in ("fednova-seed0", "fednova-seed0.partial"):
        found = find_unfinished(tmp_path / name)
        assert (found.out, found.whole, found.configs[0].methods) == (tmp_path, False, ("fednova",))
    compare(found.configs[0], tmp_path, ignore, resume=True)
    assert (tmp_path / "fednova-seed0").is_dir()
    assert find_unfinished(tmp_path / "fednova-seed0").configs[0].methods == ("fednova",)


def test_a_folder_without_a_plan_gives_its_runs(tmp_path):
    interrupted(make_config(BASE, {"methods": ["fedavg", "fednova"]}), tmp_path, kill_after(1, "fednova"))
    (tmp_path / PLAN).unlink()
    found = find_unfinished(tmp_path)
    assert found.whole
    assert [config.methods for config in found.configs] == [("fedavg",), ("fednova",)]
    with pytest.raises(RecordError, match="is a part of a run"):
        find_unfinished(tmp_path / "fedavg-seed0" / "checkpoint")
    with pytest.raises(RecordError, match="does not exist"):
        find_unfinished(tmp_path / "nowhere")


def command(*arguments):
    return [sys.executable, "-m", "fedmerge.cli", *map(str, arguments)]


def here(monkeypatch, *arguments):
    """The command in this process, for starting another takes seconds."""
    monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code


@pytest.mark.slow
def test_the_command_killed_with_sigkill_is_resumed_by_the_command(tmp_path, monkeypatch, capsys):
    options = ("--rounds", 6, "--clients", 4, "--model", "logistic", "--methods", "fedavg,fedavg+server_adam")
    options += ("--set", 'engine="serial"', "--out")
    here(monkeypatch, "compare", *options, tmp_path / "undisturbed")
    out = tmp_path / "killed"
    with subprocess.Popen(command("compare", *options, out), stdout=subprocess.DEVNULL) as process:
        rows = out / "fedavg-seed0.partial" / "rounds.jsonl"
        deadline = time.monotonic() + 240
        while not rows.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert (out / PLAN).exists()
    here(monkeypatch, "resume", out)  # in another process than the one that was killed
    assert "summary.csv" in capsys.readouterr().out
    assert outcomes(out) == outcomes(tmp_path / "undisturbed")
    names = {path.name for path in (tmp_path / "undisturbed").iterdir()}
    assert {path.name for path in out.iterdir()} == names
