"""Comparisons are resumed from any folder: what lay where they were started is found there again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmerge import cli
from fedmerge.commands.origin import at_origin, from_elsewhere, note_origin

NET = """
from torch import nn

def net(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_classes))
"""
CONFIG = """
methods = ["fedavg", "fednova"]
rounds = 1
workers = 1
[data]
name = "wards.csv"
label = "ill"
[model]
name = "its_net:net"
[partition]
clients = 2
scheme = "iid"
"""


@pytest.fixture(autouse=True)
def paths(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FEDMERGE_DATA", raising=False)


def fedmerge(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    captured = capsys.readouterr()
    return done.value.code or 0, captured.out, captured.err


def as_in_a_new_process(monkeypatch, path):
    """Nothing of the first command is left in this one."""
    sys.modules.pop("its_net", None)
    monkeypatch.setattr(sys, "path", list(path))


def losses(out):
    rows = (out / "fednova-seed0" / "rounds.jsonl").read_text().splitlines()
    return [json.loads(row)["test_loss"] for row in rows]


def test_what_lay_beside_the_configuration_is_found_from_another_folder(tmp_path, monkeypatch, capsys):
    project, start, other = (tmp_path / name for name in ("project", "start", "other"))
    for folder in (project, start, other):
        folder.mkdir()
    (project / "its_net.py").write_text(NET)
    (project / "c.toml").write_text(CONFIG)
    rng = np.random.default_rng(0)
    rows = [f"{a:.3f},{b:.3f},{int(a > b)}" for a, b in rng.normal(size=(60, 2))]
    (project / "wards.csv").write_text("\n".join(["a,b,ill", *rows]))
    (other / "wards.csv").write_text("\n".join(["a,b,ill", *rows[:20]]))  # of the same name, and another table
    path = list(sys.path)

    monkeypatch.chdir(start)
    code, _, err = fedmerge(monkeypatch, capsys, "compare", "../project/c.toml", "--out", "o")
    assert code == 0, err
    out = start / "o"
    before = losses(out)
    shutil.rmtree(out / "fednova-seed0" / "checkpoint")  # as a kill in the first round leaves it
    (out / "fednova-seed0" / "rounds.jsonl").unlink()
    (out / "fednova-seed0").rename(out / "fednova-seed0.partial")

    as_in_a_new_process(monkeypatch, path)
    monkeypatch.chdir(other)
    code, _, err = fedmerge(monkeypatch, capsys, "resume", "../start/o", "--no-code")
    assert code == 2
    assert "model its_net:net" in err
    assert f"begun in {start}" in err
    code, said, err = fedmerge(monkeypatch, capsys, "resume", "../start/o")
    assert code == 0, err
    assert Path.cwd() == other
    assert str(out / "summary.csv") in said
    assert losses(out) == before
    sys.modules.pop("its_net", None)


def test_a_folder_that_is_gone_leaves_everything_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    note_origin(tmp_path, tmp_path / "gone" / "c.toml")
    monkeypatch.chdir(tmp_path)
    assert from_elsewhere(tmp_path) == str(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with at_origin(tmp_path):
        assert Path.cwd() == tmp_path
    assert str(tmp_path / "gone") not in sys.path


def test_comparisons_of_nothing_of_ones_own_note_no_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ("compare", "--rounds", 1, "--clients", 2, "--model", "logistic", "--methods", "fedavg", "--out", "o")
    assert fedmerge(monkeypatch, capsys, *command)[0] == 0
    assert not (tmp_path / "o" / "origin.toml").exists()
