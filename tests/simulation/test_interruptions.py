"""A full disk, Ctrl-C, memory that runs out, clients that hang or take their process with them."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedmerge.checkpoints import newest_checkpoint
from fedmerge.errors import WriteError
from fedmerge.files import append_line, write_atomically
from fedmerge.simulation import SimulationGrid, cohort_work, compare, make_config
from fedmerge.simulation.exchanges import MeasuredGrid
from fedmerge.simulation.unfinished import PLAN, find_unfinished
from fedmerge.strategies import MergeStrategy, client_app, from_arrays
from fedmerge.strategies.client_side import ClientSide
from tests.federation import CLIENTS, TRAINING, hanging_data, initial, tiny_data, tiny_model
from tests.outcomes import outcomes

CONFIG = {
    "methods": ["fedavg", "fedavg+server_momentum"],
    "rounds": 2,
    "partition": {"clients": 4, "alpha": 1.0},
    "model": {"name": "logistic"},
    "engine": "serial",
}


def ignore(_row):
    pass


def full_at(monkeypatch, number):
    """The disk is full at the `number`-th flush and stays so."""
    count, real = itertools.count(1), os.fsync

    def fsync(handle):
        if next(count) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the runs leave on a disk with room."""
    out = tmp_path_factory.mktemp("undisturbed")
    compare(make_config(CONFIG), out, ignore)
    return outcomes(out)


@pytest.mark.parametrize("number", [3, 6, 8, 9, 10, 11, 14, 19, 25, 30])
def test_a_disk_that_fills_up_costs_the_round_under_way_at_most(number, undisturbed, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        full_at(patch, number)
        with pytest.raises(WriteError, match=f"No space left.*Free some space; then `fedmerge resume {tmp_path}`") as e:
            compare(make_config(CONFIG), tmp_path, ignore)
    assert str(e.value.path) in str(e.value)
    assert not list(tmp_path.rglob("*.tmp"))
    for rows in tmp_path.rglob("rounds.jsonl"):
        assert rows.read_bytes().endswith(b"\n") or not rows.read_bytes()
    for config in find_unfinished(tmp_path).configs:
        assert not compare(config, tmp_path, ignore, resume=True).failed
    assert outcomes(tmp_path) == undisturbed
    assert not (tmp_path / PLAN).exists()


def test_a_line_or_file_that_finds_no_room_leaves_what_was_there(tmp_path):
    rows, whole = tmp_path / "rows", tmp_path / "whole"
    assert append_line(rows, b"first") == 6
    write_atomically(whole, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # the system takes a part, then no more
    try:
        with pytest.raises(WriteError, match=r"rows cannot be written: File too large. Free some space"):
            append_line(rows, b"x" * 5000)
        with pytest.raises(WriteError, match="whole cannot be written"):
            write_atomically(whole, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert rows.read_bytes() == b"first\n"
    assert whole.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "whole"]
    assert append_line(rows, b"second") == 13


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="Choose another place"):
        compare(make_config(CONFIG), tmp_path / "file" / "out", ignore)


class Messages(MergeStrategy):
    """One that looks at replies, and so gets messages."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, list(replies))


@pytest.mark.parametrize("error", [MemoryError("4 GB"), torch.OutOfMemoryError("4 GB")], ids=["host", "device"])
@pytest.mark.parametrize(
    ("kind", "engine"), [(MergeStrategy, "serial"), (MergeStrategy, "stacked"), (Messages, "serial")]
)
def test_a_client_that_does_not_fit_into_memory_alone_is_left_out(kind, engine, error, monkeypatch):
    real = ClientSide.fit

    def fit(self, *arguments, client, **keywords):
        if client == 1:
            raise error
        return real(self, *arguments, client=client, **keywords)

    def no_room(*_arguments, **_keywords):
        raise error

    monkeypatch.setattr(ClientSide, "fit", fit)
    monkeypatch.setattr(cohort_work, "train_cohort", no_room)
    app = client_app(tiny_model, tiny_data, training=TRAINING)
    with SimulationGrid(app, CLIENTS, engine=engine) as grid:
        measured, strategy = MeasuredGrid(grid), kind(model_fn=tiny_model, fraction_evaluate=0.0)
        strategy.start(measured, initial(), num_rounds=1)
    (failure,) = measured.exchanges[0].failures
    assert failure.reason.startswith(f"client 1: {type(error).__name__}: 4 GB")
    assert strategy.last_report.accepted == (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MergeStrategy, Messages])
def test_clients_that_hang_or_kill_their_worker_are_left_out_and_no_others(kind, ray_here):
    app = client_app(tiny_model, hanging_data, training=TRAINING)
    with SimulationGrid(app, 6, workers=2, engine="serial", client_timeout=12.0) as grid:
        measured, strategy = MeasuredGrid(grid), kind(model_fn=tiny_model, fraction_evaluate=0.0)
        result = strategy.start(measured, initial(), num_rounds=1)
    (exchange,) = measured.exchanges
    hung, died = exchange.failures
    assert hung.reason.startswith("client 1: CutOff: cut off: it had computed for 12 s")
    assert died.reason.startswith(("client 4: ActorDiedError", "client 4: ActorUnavailableError"))
    assert strategy.last_report.accepted == (0, 2, 3, 5)
    assert all(tensor.isfinite().all() for tensor in from_arrays(result.arrays).values())


@pytest.fixture
def ray_here():
    """Ray, however it is started; ended after the test."""
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


def marked(out: Path) -> list[int]:
    """Processes that the command for `out` has started, itself included."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and f"FEDMERGE_TEST_OUT={out}".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.fixture
def heeding_ctrl_c():
    """Whoever runs tests in the background has it ignored, and so would have the commands that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_ctrl_c_gives_up_the_round_says_how_to_go_on_and_leaves_no_process(workers, tmp_path, heeding_ctrl_c):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedmerge.cli"]
    options = ["--rounds", "100000", "--clients", "4", "--model", "logistic", "--methods", "fedavg", "--seeds", "1"]
    process = subprocess.Popen(
        [*command, "compare", *options, "--workers", workers, "--out", str(out)],
        env={**os.environ, "FEDMERGE_TEST_OUT": str(out)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        rows, deadline = out / "fedavg-seed0.partial" / "rounds.jsonl", time.monotonic() + 120
        while not (rows.exists() and rows.read_bytes().count(b"\n") > 3) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(marked(out)) > (1 if workers == "2" else 0)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group, Ray's processes too
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"fedmerge resume {out}" in told
    assert "Traceback" not in told
    deadline = time.monotonic() + 20
    while marked(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert marked(out) == []
    done = rows.read_bytes().count(b"\n")
    assert rows.read_bytes().endswith(b"\n")
    assert find_unfinished(out).whole
    assert newest_checkpoint(out / "fedavg-seed0.partial" / "checkpoint").round in (done - 1, done - 2)
