"""Damaged replies, files, settings and messages: typed errors only, no hang, no growth of memory.

A few hundred of each kind with every run of the tests; 100,000 and more with ``make fuzz``.
"""

from __future__ import annotations

import time
import warnings

import pytest

from tests.fuzz import cases
from tests.fuzz.guard import Tally, little_memory, quiet, resident

QUICK = ("fedavg", "fednova", "fedatt", "median", "trimmed_mean", "krum", "norm_clipping", "geometric_median",
         "fedfisher", "fisher", "regmean", "mats", "fedavg+server_adam")  # fmt: skip
MATCHING = ("pfnm", "rebasin", "otfusion", "fedlpa", "maecho", "gradient_matching")
GROWTH = 64  # MiB that the study may end with more than after its warm-up: caches fill, leaks go on


def streams(folder, seed, scale):
    """Every kind of case; `scale` 1 gives a few hundred of each that is quick."""
    yield cases.replies(seed, QUICK, 260 * scale)
    yield cases.replies(seed + 1, MATCHING, 12 + 6 * scale)
    yield cases.evaluations(seed, 200 * scale)
    yield cases.stages(seed, 4 + scale)
    yield cases.client_messages(seed, 100 * scale)
    yield cases.files(seed, 300 * scale, folder)
    yield cases.checkpoints(seed, 200 * scale, folder)
    yield cases.rows(seed, 200 * scale, folder)
    yield cases.configs(seed, 200 * scale, folder)
    yield cases.partitions(seed, 200 * scale)
    yield cases.datasets(seed, 18 + 12 * scale, folder)


def run(folder, seed, scale, tallies):
    """Run all of them, counting by kind."""
    for stream in streams(folder, seed, scale):
        for name, case in stream:
            tallies.setdefault(name.split()[0], Tally()).add(name, case)


def check(tallies):
    """No case went wrong, and each kind had both fates, or damage does not do what it should."""
    wrong = [text for tally in tallies.values() for text in tally.wrong]
    assert not wrong, f"{len(wrong)} cases: " + "\n".join(wrong[:40])


@pytest.fixture
def silence():
    quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_few_hundred_of_each_kind(silence, tmp_path):
    tallies = {}
    with little_memory():
        run(tmp_path, 0, 1, tallies)
    check(tallies)
    for kind in ("file", "checkpoint", "rows", "config", "partition", "client"):
        assert tallies[kind].fine, kind
        assert tallies[kind].typed, kind
    assert tallies["reply"].typed == 0  # whatever two clients send, the other three make a round


@pytest.mark.study
def test_a_hundred_thousand(silence, tmp_path):
    tallies, seed, begin = {}, 1, time.perf_counter()
    with little_memory():
        run(tmp_path, 0, 4, {})  # fills caches
        before = resident()
        while sum(tally.cases for tally in tallies.values()) < 100_000:
            run(tmp_path, seed, 10, tallies)
            seed += 10
            print(f"{sum(t.cases for t in tallies.values())} cases, {resident():.0f} MiB", flush=True)
        after = resident()
    for kind, tally in tallies.items():
        print(f"{kind:12} {tally.cases:7} cases, {tally.typed:7} typed errors, slowest {tally.slowest:.2f} s")
    print(f"{time.perf_counter() - begin:.0f} s, {before:.0f} MiB after warm-up, {after:.0f} MiB at the end")
    check(tallies)
    assert after - before < GROWTH
