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
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from fedmerge import cli
from fedmerge.clients import road
from fedmerge.commands.ending import heeding_signals
from fedmerge.errors import WriteError
from fedmerge.records.atomic_files import append_line, write_atomically
from fedmerge.records.checkpoints import newest_checkpoint
from fedmerge.records.locks import LOCK, held
from fedmerge.simulation import SimulationGrid, compare, make_config
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.runs.unfinished import PLAN, find_unfinished
from fedmerge.strategies import MergeStrategy, client_app, from_arrays
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
    real = road.train_one

    def train_one(*arguments, client, **keywords):
        if client == 1:
            raise error
        return real(*arguments, client=client, **keywords)

    def no_room(*_arguments, **_keywords):
        raise error

    monkeypatch.setattr(road, "train_one", train_one)
    monkeypatch.setattr(road, "train_cohort", no_room)
    app = client_app(tiny_model, tiny_data, training=TRAINING)
    with SimulationGrid(app, CLIENTS, engine=engine) as grid:
        measured, strategy = MeasuredGrid(grid), kind(model_fn=tiny_model, fraction_evaluate=0.0)
        strategy.start(measured, initial(), num_rounds=1)
    (failure,) = measured.exchanges[0].failures
    assert failure.reason.startswith(f"client 1: {type(error).__name__}: 4 GB")
    assert strategy.last_report.accepted == (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MergeStrategy, pytest.param(Messages, marks=pytest.mark.study)])
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
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FEDMERGE_TEST_OUT") == str(out):
                found.append(process.pid)
    return found


@pytest.fixture
def heeding_ctrl_c():
    """Whoever runs tests in the background has it ignored, and so would have the commands that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def begun(out: Path, workers: str, **keywords) -> subprocess.Popen[str]:
    """A comparison in a process of its own, that never ends by itself."""
    command = [sys.executable, "-m", "fedmerge.cli"]
    options = ["--rounds", "100000", "--clients", "4", "--model", "logistic", "--methods", "fedavg", "--seeds", "1"]
    return subprocess.Popen(
        [*command, "compare", *options, "--workers", workers, "--out", str(out)],
        env={**os.environ, "FEDMERGE_TEST_OUT": str(out)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **keywords,
    )


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def rounds_in(rows: Path) -> int:
    return rows.read_bytes().count(b"\n") if rows.exists() else 0


# A command that starts Ray takes many seconds: one of each kind in every run of the tests, the others in the study.
SIGNALS = [
    (signal.SIGINT, "1"),
    (signal.SIGTERM, "1"),
    pytest.param(signal.SIGTERM, "2", marks=pytest.mark.slow),
    *(
        pytest.param(*one, marks=pytest.mark.study)
        for one in [(signal.SIGHUP, "1"), (signal.SIGINT, "2"), (signal.SIGHUP, "2")]
    ),
]
TWICE = [
    ("told twice", "1"),
    *(
        pytest.param(how, n, marks=pytest.mark.study)
        for how, n in [("killed", "1"), ("killed", "2"), ("told twice", "2")]
    ),
]


@pytest.mark.parametrize(("number", "workers"), SIGNALS)
def test_signals_give_up_the_round_say_how_to_go_on_and_leave_no_process(number, workers, tmp_path, heeding_ctrl_c):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup, whose children do not heed this signal")
    out = tmp_path / "out"
    process = begun(out, workers)
    try:
        rows = out / "fedavg-seed0.partial" / "rounds.jsonl"
        wait_for(lambda: rounds_in(rows) > 3)
        assert len(marked(out)) > (1 if workers == "2" else 0)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to all of the group, Ray's processes too
        else:
            process.send_signal(number)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert told.splitlines() == [
        f"interrupted: the round under way is given up, all before it is kept: `fedmerge resume {out}` goes on"
    ]
    wait_for(lambda: marked(out) == [], 20)
    done = rounds_in(rows)
    assert rows.read_bytes().endswith(b"\n")
    assert find_unfinished(out).whole
    assert newest_checkpoint(out / "fedavg-seed0.partial" / "checkpoint").round in (done - 1, done - 2)
    assert not list(out.glob("*.lock"))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "workers"), TWICE)
def test_a_command_that_is_killed_or_told_twice_is_gone_at_once_and_its_folder_is_free(how, workers, tmp_path):
    out = tmp_path / "out"
    process = begun(out, workers)
    try:
        wait_for(lambda: rounds_in(out / "fedavg-seed0.partial" / "rounds.jsonl") > 3)
        for number in [signal.SIGKILL] if how == "killed" else [signal.SIGTERM, signal.SIGTERM]:
            process.send_signal(number)
            time.sleep(0.01)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in ((-signal.SIGKILL,) if how == "killed" else (-signal.SIGTERM, 128 + signal.SIGTERM))
    with held(out / LOCK, out):
        assert find_unfinished(out).whole
    wait_for(lambda: marked(out) == [], 120)  # nobody can end Ray's agents then: they see to it after half a minute


@pytest.mark.study
def test_sigterm_while_ray_starts_begins_nothing_and_leaves_no_process(tmp_path):
    out = tmp_path / "out"
    process = begun(out, "2")
    try:
        wait_for(lambda: len(marked(out)) > 1)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert told.splitlines() == ["interrupted: nothing was begun"]
    assert not out.exists()
    wait_for(lambda: marked(out) == [], 30)


def test_signals_that_are_ignored_stay_ignored_and_all_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with heeding_signals() as asked:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process
        assert asked == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class AsRay(KeyboardInterrupt):
    """What is raised where Ray waits, whatever signal came."""


@pytest.mark.parametrize("raised", [None, AsRay])
def test_a_signal_decides_the_exit_code_whatever_was_made_of_it(raised, monkeypatch):
    def command(**_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            if raised is not None:
                raise raised from None
            sys.exit(1)  # as click does

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(cli.typer.main, "get_command", lambda app: command)
    monkeypatch.setattr(cli, "_add_verbosity", lambda command: None)
    try:
        with pytest.raises(SystemExit) as done:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.value.code == 143
