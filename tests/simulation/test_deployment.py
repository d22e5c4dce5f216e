"""The Flower app on a SuperLink and SuperNodes as processes of their own: `simulations/deploy.py`."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import signal
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "simulations" / "deploy.py"
CONFIG = """
rounds = 2
evaluate_clients = false
[partition]
clients = 2
[model]
name = "mlp"
apart = true
options = {hidden = [8]}
[training]
steps = 5
"""
CARD = "fedavg,fednova,fedatt,fedfisher,pfnm,fedma,otfusion,gamf"


@pytest.fixture
def helpers(monkeypatch):
    """Imports a module that lies beside the script."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module


def deploy(folder, text, *arguments, timeout=900):
    """Run the script with its Flower home below `folder`, so that what it starts can be told by that."""
    (folder / "config.toml").write_text(text)
    command = [sys.executable, SCRIPT, folder / "config.toml", "--out", folder / "out", *arguments]
    environment = os.environ | {"TMPDIR": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)


def running():
    """Command and environment of every process."""
    return subprocess.run(["ps", "axeww", "-o", "command="], capture_output=True, text=True, check=True).stdout


def assert_nothing_left(folder):
    shown = running()
    assert "PATH=" in shown  # ps shows environments at all
    assert f"FLWR_HOME={folder}" not in shown
    assert not list(folder.glob("flower-*"))


def assert_agrees(done, folder, methods):
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(re.findall(r"^(\S+)-seed0: largest relative difference from the simulation (\S+)$", done.stdout, re.M))
    print(found)  # pytest -rP shows it
    assert list(found) == methods
    assert all(float(difference) <= 1e-5 for difference in found.values())
    for method in methods:
        rows = [json.loads(line) for line in (folder / "out" / f"{method}-seed0" / "rounds.jsonl").open()]
        assert [row["clients_failed"] for row in rows] == [0] * len(rows)
        assert all(row["clients_ok"] >= 2 for row in rows[1:])
        assert rows[-1]["engine"] == "messages"
    assert_nothing_left(folder)


@pytest.mark.study
def test_with_tls_and_authentication_it_ends_with_the_simulations_model(tmp_path):
    """With one method in one round, for every message takes seconds; `make deploy` runs three."""
    config = CONFIG.replace("rounds = 2", "rounds = 1")
    done = deploy(tmp_path, config, "--methods", "fedfisher", "--check", "--stranger")
    assert_agrees(done, tmp_path, ["fedfisher"])
    assert "the unregistered SuperNode was refused" in done.stdout


@pytest.mark.study
def test_every_method_of_the_card_ends_with_the_simulations_model(tmp_path):
    done = deploy(tmp_path, CONFIG, "--methods", CARD, "--check", timeout=3600)
    assert_agrees(done, tmp_path, CARD.split(","))


@pytest.mark.study
def test_without_tls_it_works_too(tmp_path):
    done = deploy(tmp_path, CONFIG.replace("rounds = 2", "rounds = 1"), "--methods", "fedavg", "--insecure", "--check")
    assert_agrees(done, tmp_path, ["fedavg"])


@pytest.mark.study
def test_a_server_that_raises_fails_the_script_with_the_reason(tmp_path):
    """`flwr run` itself exits with 0 then; the next run has its turn all the same."""
    (tmp_path / "out").touch()
    done = deploy(tmp_path, CONFIG, "--methods", "fedavg,fedatt", "--insecure")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NotADirectoryError" in done.stdout
    for method in ("fedavg", "fedatt"):
        assert f"error: {method}: the run ended as 'finished:failed'" in done.stderr
    assert_nothing_left(tmp_path)


@pytest.mark.study
def test_given_up_or_ended_from_outside_it_ends_its_servers(tmp_path):
    done = deploy(tmp_path, CONFIG, "--methods", "fedavg", "--timeout", "20")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "given up" in done.stderr or "did not end in time" in done.stderr
    assert_nothing_left(tmp_path)
    command = [sys.executable, SCRIPT, tmp_path / "config.toml", "--methods", "fedavg", "--out", tmp_path / "out"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    for number, code in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
            assert any("flwr-serverapp" in line for line in process.stdout)
            assert f"FLWR_HOME={tmp_path}" in running()
            process.send_signal(number)
            process.stdout.read()
            assert process.wait(timeout=60) == code
        assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        (CONFIG, ["--methods", "fedvag"], "Did you mean 'fedavg'"),
        (CONFIG, ["--stranger", "--insecure"], "choose one"),
        ('[data]\nname = "digits"\n[partition]\nclient = 2', [], "Did you mean 'partition.clients'"),
    ],
)
def test_mistakes_end_before_anything_starts(tmp_path, text, arguments, words, monkeypatch, capsys):
    (tmp_path / "config.toml").write_text(text)
    command = [SCRIPT, tmp_path / "config.toml", "--out", tmp_path / "out", *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert done.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_keys_make_a_tls_connection_that_others_do_not(tmp_path, helpers):
    keys = helpers("flower_keys")
    keys.make_keys(tmp_path / "one", 2, ("superlink.example",))
    keys.make_keys(tmp_path / "other", 0)

    def shake_hands(authority, name):
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(tmp_path / "one" / "server.pem", tmp_path / "one" / "server.key")
        client = ssl.create_default_context(cafile=tmp_path / authority / "ca.crt")
        pipes = [ssl.MemoryBIO() for _ in range(2)]
        ends = server.wrap_bio(*pipes, server_side=True), client.wrap_bio(*reversed(pipes), server_hostname=name)
        done = set()
        for _ in range(4):
            for end in reversed(ends):
                try:
                    end.do_handshake()
                    done.add(end)
                except ssl.SSLWantReadError:
                    continue
        return len(done)

    for name in ("127.0.0.1", "localhost", "superlink.example"):
        assert shake_hands("one", name) == 2
    for authority, name in (("other", "localhost"), ("one", "elsewhere.example")):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(authority, name)


def test_private_keys_are_their_owners_and_are_never_replaced(tmp_path, helpers):
    keys = helpers("flower_keys")
    keys.make_keys(tmp_path, 2)
    for name in ("server.key", "supernode-0", "supernode-1"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    public = [(tmp_path / f"supernode-{i}.pub").read_text() for i in range(2)]
    assert public[0].startswith("ecdsa-sha2-nistp384 ")
    assert public[0] != public[1]
    with pytest.raises(FileExistsError):
        keys.make_keys(tmp_path, 2)


def test_the_difference_of_models_is_that_of_their_worst_tensor(tmp_path, helpers):
    from fedmerge.records.checkpoints import Checkpoint, save_checkpoint

    largest_difference = helpers("deploy").largest_difference

    def saved(name, state):
        save_checkpoint(tmp_path / name / "checkpoint", Checkpoint(1, {"state": state, "memory": {}}, {}), keep=1)
        return tmp_path / name

    one = saved("one", {"w": torch.tensor([100.0, 1.0]), "b": torch.zeros(1), "n": torch.tensor(3)})
    near = saved("near", {"w": torch.tensor([100.0, 1.5]), "b": torch.full((1,), 0.25), "n": torch.tensor(3)})
    lost = saved("lost", {"w": torch.tensor([float("nan"), 1.0]), "b": torch.zeros(1), "n": torch.tensor(3)})
    wide = saved("wide", {"w": torch.zeros(3), "b": torch.zeros(1), "n": torch.tensor(3)})
    assert largest_difference(one, one) == 0
    assert largest_difference(one, near) == 0.25
    assert not largest_difference(one, lost) <= 1e-5
    assert largest_difference(one, wide) == float("inf")
