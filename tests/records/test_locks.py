"""One process writes to a folder; whoever holds it is named, and a dead one holds nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import psutil
import pytest

from fedmerge.errors import FolderInUse, RecordError, WriteError
from fedmerge.records import locks, processes
from fedmerge.records.locks import LOCK, Holder, held
from fedmerge.records.run_records import lock_of
from fedmerge.simulation import SimulationGrid, compare, make_config
from fedmerge.simulation.runs.unfinished import PLAN, begin, end, find_unfinished, run_folder
from fedmerge.strategies import MergeStrategy, client_app
from tests.federation import CLIENTS, TRAINING, initial, tiny_data, tiny_model
from tests.outcomes import outcomes

BASE = {
    "methods": ["fedavg"],
    "rounds": 1,
    "partition": {"clients": 3, "alpha": 1.0},
    "model": {"name": "logistic"},
    "engine": "serial",
}

HOLD = """
import sys, time
from pathlib import Path
from fedmerge.records.locks import held
with held(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def ignore(_row):
    pass


@pytest.fixture
def other(tmp_path):
    """Another process that holds a lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / LOCK)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def left_by(path, **facts):
    """What a process left that ended without letting go."""
    path.write_text(json.dumps(asdict(replace(Holder.here(), **facts))))


def test_a_folder_that_a_living_process_holds_is_refused_and_one_that_it_held_when_killed_is_not(other, tmp_path):
    with pytest.raises(FolderInUse) as refused, held(tmp_path / LOCK, tmp_path):
        pass
    told = str(refused.value)
    assert f"{tmp_path} is in use by process {other.pid} on {socket.gethostname()} (" in told
    assert "wait until it has ended, or end it first" in told
    assert "\n" not in told
    assert refused.value.holder.alive
    assert str(pickle.loads(pickle.dumps(refused.value))) == told
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK).exists()
    assert not refused.value.holder.alive
    with held(tmp_path / LOCK, tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_comparison_whose_folder_or_record_is_held_writes_nothing(tmp_path):
    config = make_config(BASE)
    compare(config, tmp_path, ignore)
    before = outcomes(tmp_path)
    record = run_folder(tmp_path, "fedavg", 0)
    for lock, named in ((tmp_path / LOCK, tmp_path), (lock_of(record), record)):
        for how in ({}, {"grow": True}):
            with held(lock, named), pytest.raises(FolderInUse, match=f"process {os.getpid()}") as refused:
                compare(make_config(BASE, {"rounds": 2}), tmp_path, ignore, **how)
            assert str(refused.value).startswith(f"{named} is in use")
    assert outcomes(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fedavg-seed0"]


def test_a_run_that_another_process_has_taken_up_meanwhile_fails_alone(tmp_path):
    config = make_config(BASE, {"methods": ["fedavg", "fednova"]})
    record = run_folder(tmp_path, "fednova", 0)
    taken = []

    def on_row(row):
        if not taken:
            taken.append(held(lock_of(record), record))
            taken[0].__enter__()

    done = compare(config, tmp_path, on_row)
    taken[0].__exit__(None, None, None)
    assert [folder.name for folder in done.runs] == ["fedavg-seed0"]
    assert isinstance(done.failed[0].error, FolderInUse)


def test_threads_of_one_process_are_refused_too(tmp_path):
    refused = []

    def second():
        try:
            with held(tmp_path / LOCK, tmp_path):
                pass
        except FolderInUse as error:
            refused.append(error)

    with held(tmp_path / LOCK, tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1


@pytest.mark.parametrize("way", ["gone", "its number is another's", "the machine was started anew"])
def test_what_a_dead_process_of_this_machine_left_is_taken_over(way, tmp_path, monkeypatch):
    facts = {
        "gone": {"pid": 2**22 + 1},
        "its number is another's": {"started": "1"},
        "the machine was started anew": {"machine": "before"},
    }[way]
    left_by(tmp_path / LOCK, **facts)
    with held(tmp_path / LOCK, tmp_path):
        pass
    left_by(tmp_path / LOCK, **facts)
    monkeypatch.setattr(locks, "_lock", lambda file: None)  # a file system without locks: what the file says decides
    with held(tmp_path / LOCK, tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["started"] == processes.start_of(os.getpid())


def test_a_file_system_without_locks_goes_by_what_the_file_says(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / LOCK, tmp_path), pytest.raises(FolderInUse), held(tmp_path / LOCK, tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_process_of_another_machine_is_believed_and_how_to_go_on_is_told(tmp_path):
    left_by(tmp_path / LOCK, machine="another", host="node17", pid=4242)
    with pytest.raises(FolderInUse, match="process 4242 on node17") as refused, held(tmp_path / LOCK, tmp_path):
        pass
    assert f"{tmp_path / LOCK}" in str(refused.value)
    assert "delete the file" in str(refused.value)
    assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).unlink()
    with held(tmp_path / LOCK, tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b'{"pid": 1e999}', b"\xff" * 99, b"[" * 99_999])
def test_a_lock_that_says_nothing_is_taken_over(content, tmp_path):
    (tmp_path / LOCK).write_bytes(content)
    with held(tmp_path / LOCK, tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK).read_text()


def test_what_a_lock_says_cannot_move_the_cursor(tmp_path):
    left_by(tmp_path / LOCK, machine="another", host="\x1b[2Jnode\n17" + "x" * 9000)
    with pytest.raises(FolderInUse) as refused, held(tmp_path / LOCK, tmp_path):
        pass
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 2500


def test_a_lock_that_is_a_link_leads_nowhere(tmp_path):
    (tmp_path / "dear").write_text("dear")
    (tmp_path / LOCK).symlink_to(tmp_path / "dear")
    with pytest.raises(WriteError), held(tmp_path / LOCK, tmp_path):
        pass
    assert (tmp_path / "dear").read_text() == "dear"


def test_a_folder_that_was_made_for_its_lock_goes_with_it(tmp_path):
    with held(tmp_path / "a" / "b" / LOCK, "b"):
        pass
    assert not (tmp_path / "a").exists()
    with held(tmp_path / "a" / LOCK, "a"):
        (tmp_path / "a" / "kept").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_many_who_want_one_folder_have_it_one_after_the_other(tmp_path):
    inside, most, done = [], [], []

    def want():
        while True:
            try:
                with held(tmp_path / LOCK, tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    done.append(1)
                    return
            except FolderInUse:
                continue

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), max(most)) == (8, 1)


def test_one_folder_of_checkpoints_serves_one_run_at_a_time(tmp_path):
    def strategy():
        return MergeStrategy(model_fn=tiny_model, fraction_evaluate=0.0, checkpoint_dir=tmp_path)

    class Within(MergeStrategy):
        """Has a second run begin in the middle of the first."""

        def aggregate_train(self, server_round, replies):
            with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
                strategy().start(grid, initial(), num_rounds=1)
            return super().aggregate_train(server_round, replies)

    with SimulationGrid(client_app(tiny_model, tiny_data, training=TRAINING), CLIENTS, engine="serial") as grid:
        first = Within(model_fn=tiny_model, fraction_evaluate=0.0, checkpoint_dir=tmp_path)
        first.start(grid, initial(), num_rounds=1)
        strategy().start(grid, initial(), num_rounds=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000001.safetensors", "round-000002.safetensors"]


def test_a_plan_stays_until_all_of_it_has_run(tmp_path):
    whole = make_config(BASE, {"methods": ["fedavg", "fednova"]})
    begin(whole, tmp_path)
    one = make_config(BASE)
    compare(one, tmp_path, ignore, resume=True)  # as `resume` of the folder of a run does
    assert (tmp_path / PLAN).exists()
    (config,) = find_unfinished(tmp_path).configs
    compare(config, tmp_path, ignore, resume=True)
    assert not (tmp_path / PLAN).exists()
    assert sorted(outcomes(tmp_path)) == ["fedavg-seed0", "fednova-seed0"]
    end(whole, tmp_path)  # again, where there is none


def test_runs_of_two_federations_are_not_resumed_into_one_table(tmp_path):
    compare(make_config(BASE), tmp_path, ignore)
    begin(make_config(BASE, {"methods": ["fednova"], "partition": {"alpha": 9.0}}), tmp_path)
    (tmp_path / PLAN).unlink()
    compare(make_config(BASE, {"methods": ["fednova"], "partition": {"alpha": 9.0}}), tmp_path, ignore)
    with pytest.raises(RecordError, match=r"two federations \(they differ in partition.alpha\)"):
        find_unfinished(tmp_path)


def test_processes_are_told_apart_by_when_they_began():
    assert processes.start_of(os.getpid())
    assert processes.start_of(2**22 + 1) is None
    assert processes.start_of(0) is processes.start_of(-1) is processes.start_of(2**40) is None
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        (process,) = (other for other in processes.children_of(os.getpid()) if other.pid == child.pid)
        assert processes.start_of(child.pid)
        processes.end_processes([process])
        assert processes.start_of(child.pid) is None  # it is listed until somebody asks how it ended
        assert process in processes.ended_children(os.getpid())
        assert child.wait() == -signal.SIGKILL  # nobody has asked before
    assert process not in processes.ended_children(os.getpid())


def test_a_process_that_has_got_the_number_of_an_ended_one_is_left_alone(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        process = psutil.Process(gone.pid)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        monkeypatch.setattr(process, "_pid", child.pid)
        processes.end_processes([process], patience=0.1)
        assert child.poll() is None
        child.kill()


def test_when_a_process_began_stays_when_somebody_sets_the_clock(monkeypatch):
    before, booted = processes.start_of(os.getpid()), psutil.boot_time()
    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", lambda: booted + 3600)
    assert processes.start_of(os.getpid()) == before
