"""Damaged replies, files, settings and messages: typed errors only, no hang, no growth of memory.

A few hundred of each kind with every run of the tests; 100,000 and more with ``make fuzz``.
"""

from __future__ import annotations

import time
import warnings

import pytest

from tests.fuzz import cases, file_cases
from tests.fuzz.guard import Tally, little_memory, quiet, resident

QUICK = ("fedavg", "fednova", "fedatt", "median", "trimmed_mean", "krum", "norm_clipping", "median_norm_clipping",
         "fisher", "regmean", "fedavg+server_adam")  # fmt: skip
SLOW = ("geometric_median", "fedfisher", "fedfisher(variant=diag)", "mats", "pfnm", "rebasin", "otfusion", "fedlpa",
        "maecho", "gradient_matching")  # fmt: skip
GROWTH = 64  # MiB that the study may end with more than after its warm-up: caches fill, leaks go on

FEW = {"quick": 220, "slow": 20, "evaluations": 200, "stages": 6, "clients": 150, "files": 300, "checkpoints": 200,
       "rows": 200, "configs": 200, "partitions": 200, "datasets": 30}  # fmt: skip
MANY = {"quick": 1650, "slow": 50, "evaluations": 3500, "stages": 6, "clients": 150, "files": 2500, "checkpoints": 600,
        "rows": 1500, "configs": 500, "partitions": 150, "datasets": 30}  # fmt: skip


def streams(folder, seed, numbers):
    """Every kind of case, so many of each."""
    yield cases.replies(seed, QUICK, numbers["quick"])
    yield cases.replies(seed + 1, SLOW, numbers["slow"])
    yield cases.evaluations(seed, numbers["evaluations"])
    yield cases.stages(seed, numbers["stages"])
    yield cases.client_messages(seed, numbers["clients"])
    yield file_cases.files(seed, numbers["files"], folder)
    yield file_cases.checkpoints(seed, numbers["checkpoints"], folder)
    yield file_cases.rows(seed, numbers["rows"], folder)
    yield file_cases.configs(seed, numbers["configs"], folder)
    yield file_cases.partitions(seed, numbers["partitions"])
    yield file_cases.datasets(seed, numbers["datasets"], folder)


def run(folder, seed, numbers, tallies):
    """Run all of them, counting by kind."""
    for stream in streams(folder, seed, numbers):
        for name, case in stream:
            tallies.setdefault(name.split()[0], Tally()).add(name, case)


def check(tallies):
    """No case went wrong, and each kind had both fates, or damage does not do what it should."""
    wrong = [text for tally in tallies.values() for text in tally.wrong]
    assert not wrong, f"{len(wrong)} cases: " + "\n".join(wrong[:40])


@pytest.fixture
def silence():
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_few_hundred_of_each_kind(silence, tmp_path):
    tallies = {}
    with little_memory():
        run(tmp_path, 0, FEW, tallies)
    check(tallies)
    for kind in ("file", "checkpoint", "rows", "config", "partition", "client"):
        assert tallies[kind].fine, kind
        assert tallies[kind].typed, kind
    assert tallies["reply"].typed == 0  # whatever two clients send, the other three make a round


@pytest.mark.study
def test_a_hundred_thousand(silence, tmp_path):
    tallies, seed, begin = {}, 1, time.perf_counter()
    with little_memory():
        run(tmp_path, 0, FEW, {})  # fills caches
        before = resident()
        while sum(tally.cases for tally in tallies.values()) < 100_000:
            run(tmp_path, seed, MANY, tallies)
            seed += 10
            print(f"{sum(t.cases for t in tallies.values())} cases, {resident():.0f} MiB", flush=True)
        after = resident()
    for kind, tally in tallies.items():
        print(f"{kind:12} {tally.cases:7} cases, {tally.typed:7} typed errors, slowest {tally.slowest:.2f} s")
    print(f"{time.perf_counter() - begin:.0f} s, {before:.0f} MiB after warm-up, {after:.0f} MiB at the end")
    check(tallies)
    assert after - before < GROWTH
