"""Whose time is counted as what: clients' as training, whatever they are asked for, and the server's as merging."""

from __future__ import annotations

import sys
import time

import pytest

from fedmerge.simulation import compare, make_config
from tests.simulation.runs.test_compare import BASE, ignore, rows

SOURCE = """
import time

from torch import nn


class Ticking(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, num_classes))

    def forward(self, x):
        time.perf_counter.now += 1.0
        return self.layers(x)
"""


class Clock:
    """Stands still but for what advances it."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("method", ["fedavg", "fedavg+ridge_head", "fedavg+recalibrate"])
def test_the_time_of_clients_that_are_asked_in_a_merge_is_not_the_merges(tmp_path, monkeypatch, method):
    """Time passes only while a model runs, which the server's never do in these merges."""
    (tmp_path / "ticking_for_test.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(time, "perf_counter", Clock())
    config = make_config(
        BASE, {"methods": [method], "seeds": [0], "rounds": 1, "model": {"name": "ticking_for_test:Ticking"}}
    )
    try:
        (folder,), failed = compare(config, tmp_path / "out", ignore)
    finally:
        sys.modules.pop("ticking_for_test", None)
    assert not failed
    before, row = rows(folder)
    assert row["seconds_merge"] == 0.0
    steps, clients, judging = row["local_steps"], 4, row["answers"]
    assert (judging > 0) == ("+" in method)
    assert row["seconds_train"] >= steps + clients * judging  # each client runs a model at least once an answer
    assert row["seconds_evaluate"] > before["seconds_evaluate"] > 0
