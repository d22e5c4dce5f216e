"""A hundred comparisons killed with SIGKILL at random moments, some of them again and again. Run with `make study`."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedmerge.simulation import compare, make_config
from fedmerge.simulation.runs.unfinished import PLAN, find_unfinished
from tests.outcomes import outcomes

RUNS = 100
AT_ONCE = 2
BASE = {
    "methods": ["fedavg+server_adam", "flwr.serverapp.strategy:FedAvgM"],
    "options": {"flwr.serverapp.strategy:FedAvgM": {"server_momentum": 0.9}},
    "rounds": 8,
    "seeds": [0],
    "partition": {"clients": 4, "alpha": 0.5},
    "model": {"name": "mlp", "options": {"hidden": [8]}},
    "fraction_train": 0.5,
}
# Which engine is the faster is measured, hence not the same in every undisturbed run either.
ENGINES = ("serial", "stacked")

IMPORTS = ["fedmerge.simulation", "tests.outcomes", "sklearn.datasets", "flwr_datasets.partitioner", "torch._dynamo"]


def ignore(_row):
    pass


def work(out: Path, engine: str) -> None:
    """What a person does: start the comparison, or resume it if it left word that it was begun."""
    if not (out / PLAN).exists():
        compare(make_config(BASE, {"engine": engine}), out, ignore)
        return
    for config in find_unfinished(out).configs:
        assert not compare(config, out, ignore, resume=True).failed


def killed_and_resumed(number: int, context, folder: Path, seconds: float) -> tuple[int, Path]:
    """Kill one comparison at least once, resume it until it is done; how often it was killed."""
    draw = random.Random(number)
    out, engine, kills = folder / f"run-{number}", ENGINES[number % len(ENGINES)], 0
    wanted = 1 + number % 3
    while True:
        process = context.Process(target=work, args=(out, engine))
        process.start()
        process.join(draw.uniform(0, seconds) if kills < wanted else 300)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        elif process.exitcode:
            raise AssertionError(f"run {number} ended with exit code {process.exitcode}")
        elif kills:
            return kills, out
        else:  # done before the blow fell: once more
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.study
def test_a_hundred_runs_killed_at_random_moments_equal_the_undisturbed_run(tmp_path):
    # Imports take longer than such a run: a server that has them done forks every process to be killed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    undisturbed, seconds = {}, 0.0
    for engine in ENGINES:
        for name in ("warm-up", "undisturbed"):
            started = time.perf_counter()
            process = context.Process(target=work, args=(tmp_path / f"{name}-{engine}", engine))
            process.start()
            process.join()
            assert process.exitcode == 0
            seconds = time.perf_counter() - started
        undisturbed[engine] = outcomes(tmp_path / f"undisturbed-{engine}")
        assert outcomes(tmp_path / f"warm-up-{engine}") == undisturbed[engine]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(lambda k: killed_and_resumed(k, context, tmp_path, AT_ONCE * seconds), range(RUNS)))
    equal, lost, doubled = 0, 0, 0
    for number, (_, out) in enumerate(done):
        expected, found = undisturbed[ENGINES[number % len(ENGINES)]], outcomes(out)
        equal += found == expected
        for name in expected:
            rounds = Counter(row["round"] for row in found[name][0])
            lost += sum(row["round"] not in rounds for row in expected[name][0])
            doubled += sum(rounds.values()) - len(rounds)
    kills = sum(count for count, _ in done)
    print(f"\n{RUNS} runs killed {kills} times: {equal} equal the undisturbed run; {lost} rows lost, {doubled} doubled")
    assert (equal, lost, doubled) == (RUNS, 0, 0)
