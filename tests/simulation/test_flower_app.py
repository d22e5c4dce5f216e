"""The Flower app, run by `flwr run` on Flower's own simulation."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fedmerge.records.run_records import read_checkpoint
from fedmerge.simulation import compare, load_config, make_config

SCRIPT = Path(__file__).parents[2] / "simulations" / "run_flower_app.py"
CONFIG = """
rounds = 2
fraction_train = 0.7
batch_norm = "recalibrate"
[partition]
clients = 3
[model]
name = "resnet8"
options = {width = 2}
[training]
steps = 2
"""

QUESTIONED = """
rounds = 2
engine = "serial"
[partition]
clients = 3
[model]
options = {hidden = [8]}
[training]
steps = 5
"""

FROZEN = """
rounds = 2
engine = "serial"
[partition]
clients = 3
[model]
options = {hidden = [56, 8]}
frozen = ["layers.0"]
[training]
steps = 2
"""


@pytest.fixture
def scratch():
    """A folder with a short path: Ray's sockets lie below it, and a socket's path has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="fm") as folder:
        yield Path(folder)


def run_script(scratch, *arguments):
    """Run the script with its Flower home below `scratch`, so that what it starts can be told by that."""
    command = [sys.executable, SCRIPT, *arguments]
    environment = os.environ | {"TMPDIR": str(scratch)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


def rows(folder):
    parsed = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in parsed]


def running():
    """Command and environment of every process."""
    return subprocess.run(["ps", "axeww", "-o", "command="], capture_output=True, text=True, check=True).stdout


def assert_nothing_left(scratch):
    shown = running()
    assert "PATH=" in shown  # ps shows environments at all
    assert f"FLWR_HOME={scratch}" not in shown
    assert not list(scratch.glob("flower-*"))


def ran(tmp_path, scratch, text, method):
    """The records of a configuration's run in this process and through `flwr run`."""
    (tmp_path / "small.toml").write_text(text)
    done = run_script(scratch, tmp_path / "small.toml", "--method", method, "--out", tmp_path / "flower")
    assert done.returncode == 0, done.stdout + done.stderr
    config = make_config(load_config(tmp_path / "small.toml"), {"methods": [method]})
    (here,) = compare(config, tmp_path / "here", lambda row: None).runs
    return here, tmp_path / "flower" / f"{method}-seed0"


def assert_same_model(here, flower, tolerance):
    ours, theirs = read_checkpoint(here)[1], read_checkpoint(flower)[1]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance * float(ours[name].abs().max()))


@pytest.mark.slow
def test_flwr_run_leaves_the_record_of_an_in_process_run_and_nothing_running(tmp_path, scratch):
    here, flower = ran(tmp_path, scratch, CONFIG, "fednova")
    for theirs, ours in zip(rows(flower), rows(here), strict=True):
        wanted = {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in ours.items()}
        assert theirs == {**wanted, "engine": ours["engine"] and "messages"}
    assert_same_model(here, flower, 1e-5)
    assert_nothing_left(scratch)


@pytest.mark.study
def test_questions_about_the_merged_model_are_answered_there_as_well(tmp_path, scratch):
    assert_same_model(*ran(tmp_path, scratch, QUESTIONED, "fedkfac"), 1e-4)
    assert_nothing_left(scratch)


@pytest.mark.study
def test_a_client_that_trains_an_eighth_of_its_parameters_sends_an_eighth(tmp_path, scratch):
    """Counted in the messages, down as well."""
    here, flower = ran(tmp_path, scratch, FROZEN, "fedavg")
    trained = 56 * 8 + 8 + 8 * 10 + 10
    assert 0.13 < trained / (trained + 64 * 56 + 56) < 0.131
    for theirs, ours in zip(rows(flower), rows(here), strict=True):
        assert theirs["parameters"] == trained
        assert (theirs["bytes_up"], theirs["bytes_down"]) == (ours["bytes_up"], ours["bytes_down"])
    for row in rows(flower)[1:]:  # what is beside the numbers tells names and shapes
        assert 4 * trained < row["bytes_up"] / 3 < 4 * trained + 700
        assert 4 * trained < row["bytes_down"] / 3 < 4 * trained + 700
    assert_same_model(here, flower, 1e-5)
    assert_nothing_left(scratch)


@pytest.mark.study
def test_a_server_that_raises_fails_the_script_with_the_reason(tmp_path, scratch):
    """`flwr run` itself exits with 0 then."""
    (tmp_path / "small.toml").write_text(CONFIG)
    (tmp_path / "file").touch()
    done = run_script(scratch, tmp_path / "small.toml", "--out", tmp_path / "file")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WriteError" in done.stdout
    assert "the run ended as 'finished:failed'" in done.stderr
    assert_nothing_left(scratch)


@pytest.mark.slow
def test_ended_from_outside_it_ends_its_daemons(tmp_path, scratch):
    (tmp_path / "small.toml").write_text(CONFIG)
    command = [sys.executable, SCRIPT, tmp_path / "small.toml", "--out", tmp_path / "out"]
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert any("Successfully started run" in line for line in process.stdout)
        assert f"FLWR_HOME={scratch}" in running()
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert_nothing_left(scratch)


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("rounds = 1", ["--method", "fedvag"], "Did you mean 'fedavg'"),
        ("round = 1", [], "Did you mean 'rounds'"),
        ("rounds = = 1", [], "not valid TOML"),
    ],
)
def test_mistakes_end_before_anything_starts(tmp_path, text, arguments, words, monkeypatch, capsys):
    (tmp_path / "bad.toml").write_text(text)
    command = [SCRIPT, tmp_path / "bad.toml", *arguments, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert done.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
