"""``fedmerge bench``, as a person runs it."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks.rounds import WORKLOADS, Measured, Task, Workload, find_workload, measure, rows, speed_table
from benchmarks.rounds.child import Reading
from benchmarks.rounds.command import run_bench
from benchmarks.rounds.usage import Usage
from fedmerge import cli
from fedmerge.errors import ConfigError, FedMergeError, InvalidOption, UnknownName

TINY = Workload("tiny", "digits", 30, 4, 20, "dealt", (8,), 10, 0.1, 3)
KEYS = ["workload", "system", "cpu_ms_per_update", "cpu_ratio", "wall_ratio", "peak_mib", "accuracy"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)


def test_json_gives_a_line_for_each_system(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedmerge", "bench", "--json", "--workloads", "tiny"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["system"] for line in lines] == ["loop", "stacked", "fedmerge"]
    for line in lines:
        assert list(line)[: len(KEYS)] == KEYS
        assert line["workload"] == "tiny"
        assert line["cpu_ms_per_update"] > 0
        assert line["wall_ratio"] > 0
        assert line["peak_mib"] > 50
        assert line["cpu_seconds_to_first_round"] > 0
        assert line["seconds_to_first_round"] > 0
        assert (line["rounds"], line["workers"], line["device"], line["data"]) == (3, 1, "cpu", "digits")
    assert [line["engine"] for line in lines[:2]] == ["autograd", "by hand"]
    assert lines[2]["engine"] in ("serial", "stacked")
    loop = lines[0]
    assert loop["cpu_ratio"] == loop["wall_ratio"] == 1
    assert {line["accuracy"] for line in lines} == {loop["accuracy"]}


def test_measured_rounds_add_up_and_make_a_table():
    readings = tuple(
        Reading(cpu, 2 * cpu, 5 + cpu, 100 + cpu, 0.5, "by hand", "digits") for cpu in (9.0, 1.0, 3.0, 2.0)
    )
    one = Measured("stacked", Task(TINY, 4), 7.0, readings)
    loop = Measured("loop", Task(TINY, 4), 7.0, tuple(r._replace(cpu=2 * r.cpu) for r in readings))
    assert (one.cpu_seconds, one.wall_seconds, one.peak_mib) == (2.0, 4.0, 109.0)  # the first round is left out
    assert rows([one])[0]["cpu_ratio"] is None
    both = rows([one, loop])
    assert [(row["cpu_ratio"], row["wall_ratio"]) for row in both] == [(0.5, 1.0), (1.0, 1.0)]
    assert [row["cpu_ms_per_update"] for row in both] == [500.0, 1000.0]  # four clients a round
    assert both[0]["cpu_seconds_to_first_round"] == 14.0
    assert speed_table(both).row_count == 2


def test_unknown_names_are_answered_with_the_nearest(capsys, monkeypatch):
    with pytest.raises(UnknownName, match="Did you mean 'W3-million'"):
        find_workload("W3-milion")
    with pytest.raises(UnknownName, match="Did you mean 'stacked'"):
        measure(Task(TINY, 2), ["staked"])
    monkeypatch.setattr(sys, "argv", ["fedmerge", "bench", "--workloads", "W4"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    assert "unknown workload 'W4'. Did you mean" in capsys.readouterr().err


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ConfigError, match="at least one"):
        next(run_bench([], ["loop"]))
    with pytest.raises(InvalidOption, match="at least 2"):
        measure(Task(TINY, 1), ["loop"])
    with pytest.raises(InvalidOption, match="cannot be sampled"):
        Workload("bad", "digits", 3, 4, 20, "dealt", (8,), 10, 0.1, 3)


def test_a_system_that_fails_says_why(tmp_path):
    task = Task(Workload(**{**TINY.__dict__, "dataset": "mnist"}), 2, data_dir=tmp_path / "missing")
    with pytest.raises(FedMergeError, match=r"loop on tiny: DataError: .*missing"):
        measure(task, ["loop"])


@pytest.mark.parametrize(("gpu", "devices"), [(False, ["cpu", "cpu"]), (True, ["cpu", "cpu", "cuda"])])
def test_rows_on_the_gpu_come_where_there_is_one(monkeypatch, capsys, gpu, devices):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    asked = []

    def noted(task, systems):
        asked.append((task.workload.name, task.device, *systems))
        return []

    monkeypatch.setattr("benchmarks.rounds.command.measure", noted)
    assert list(run_bench(["W1", "W3"], ["loop", "stacked", "fedmerge"], device="cuda")) == []
    assert [device for _, device, *_ in asked] == devices
    assert ("no CUDA device" in capsys.readouterr().err) is not gpu
    if gpu:
        assert asked[-1] == ("W1", "cuda", "loop", "fedmerge")


def test_usage_counts_processes_below_this_one():
    import subprocess

    usage = Usage()
    before, _ = usage.read()
    busy = "import os\nwhile sum(os.times()[:2]) < 0.3: pass\nprint('done', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"done\n"
        started = time.process_time()
        seen, peak = usage.read()
        child.stdin.write(b"\n")
        child.stdin.close()
        child.wait()
    assert seen - before >= 0.3
    assert peak > 50
    assert usage.read()[0] >= seen  # what has ended still counts
    assert time.process_time() - started < 5


@pytest.mark.study
def test_ray_workers_are_measured_with_all_their_processes():
    loop, one, two = rows(measure(Task(TINY, 2), ["loop", "fedmerge", "fedmerge-ray"]))
    assert (one["system"], one["workers"]) == ("fedmerge", 1)
    assert (two["system"], two["workers"]) == ("fedmerge", 2)
    assert two["peak_mib"] > 1.5 * one["peak_mib"]
    assert two["accuracy"] == one["accuracy"] == loop["accuracy"]
