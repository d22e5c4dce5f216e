"""Comparisons on Ray killed with SIGKILL forty times, most of them while rounds run: what resumes is the same run.

Run with ``make study`` (half an hour: every start of Ray takes its time).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from fedmerge.simulation import compare, make_config
from fedmerge.simulation.runs.unfinished import PLAN, find_unfinished
from tests.outcomes import outcomes

KILLS = 40
PER_RUN = 5
ROUNDS = 15
LONGEST = 600
"""Seconds that one start may take before it hangs."""
BASE = {"rounds": ROUNDS, "seeds": [0], "partition": {"clients": 4, "alpha": 0.5}, "workers": "ray"}
RUNS = {
    "personal buffers and server_adam": {
        "methods": ["fedavg+server_adam"],
        "batch_norm": "local",
        "model": {"name": "resnet8", "options": {"width": 2}},
    },
    "fedkfac": {"methods": ["fedkfac"], "model": {"name": "mlp", "options": {"hidden": [8]}}},
}


def ignore(_row):
    pass


def work(out: Path, settings: dict) -> None:
    """What a person does: start the comparison, or resume it if it left word that it was begun."""
    if not (out / PLAN).exists():
        assert not compare(make_config(BASE, settings), out, ignore).failed
        return
    for config in find_unfinished(out).configs:
        assert not compare(config, out, ignore, resume=True).failed


def rows(out: Path) -> int:
    """How many rounds have been written."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*/rounds.jsonl"))


def below(number: int) -> set[int]:
    """Processes that a process has started, and they in turn."""
    try:
        return {child.pid for child in psutil.Process(number).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def lives(number: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_agent(number: int) -> bool:
    """Whether it is one of the two agents that Ray starts beside its raylet, which see late that it is gone."""
    try:
        return any("Agent" in word for word in psutil.Process(number).cmdline())
    except psutil.Error:
        return False


def left_behind(numbers: set[int], seconds: float = 60.0) -> tuple[int, int]:
    """How many of these outlive their driver by so long, Ray's agents apart; they are ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(lives(number) and not is_agent(number) for number in numbers):
        time.sleep(0.2)
    staying = [number for number in numbers if lives(number)]
    agents = sum(map(is_agent, staying))
    for number in staying:
        os.kill(number, signal.SIGKILL)
    return len(staying) - agents, agents


def killed(process, out: Path, draw: random.Random) -> set[int] | None:
    """Kill a run at a random moment: one in five while Ray starts, the others while rounds run.

    Its processes as they were, or None where it was done before.
    """
    if draw.random() < 0.2:
        process.join(draw.uniform(0, 10))
    else:
        before, deadline = rows(out), time.monotonic() + LONGEST
        while process.exitcode is None and rows(out) <= before and time.monotonic() < deadline:
            time.sleep(0.05)
        process.join(draw.uniform(0, 3))
    if process.exitcode is not None:
        assert process.exitcode == 0
        return None
    found = below(process.pid)
    process.kill()
    process.join()
    return found


def finished(process) -> None:
    """Let a run come to its end."""
    process.join(LONGEST)
    assert process.exitcode == 0


@pytest.mark.study
@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_runs_on_ray_that_are_killed_again_and_again_equal_the_undisturbed_run(settings, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedmerge.simulation", "tests.outcomes", "sklearn.datasets", "ray"])

    def started(out):
        process = context.Process(target=work, args=(out, settings))
        process.start()
        return process

    finished(started(tmp_path / "undisturbed"))
    expected = outcomes(tmp_path / "undisturbed")
    kills, equal, staying, agents, runs, wanted = 0, 0, 0, 0, 0, KILLS // len(RUNS)
    while kills < wanted:
        out, draw = tmp_path / f"run-{runs}", random.Random(runs)
        runs += 1
        for _ in range(min(PER_RUN, wanted - kills)):
            processes = killed(started(out), out, draw)
            if processes is None:  # done before the blow fell
                break
            kills += 1
            others, late = left_behind(processes)
            staying, agents = staying + others, agents + late
            print(f"kill {kills}, of {len(processes)} processes, after {rows(out)} rows", flush=True)
        if (out / PLAN).exists() or not rows(out):
            finished(started(out))
        equal += outcomes(out) == expected
    print(f"{runs} runs killed {kills} times: {equal} equal the undisturbed run")
    print(f"left behind: {staying} processes, and {agents} agents of Ray")
    assert (equal, staying) == (runs, 0)
