"""A round stays short to read: how many files of the package it crosses."""

from __future__ import annotations

import pytest

from benchmarks.round_files import files_of


@pytest.mark.parametrize(("method", "most"), [("fedavg", 25), ("fedkfac", 75)])
def test_a_round_crosses_few_files(method, most):
    files = files_of(method)
    assert {f"aggregators/{method}.py", "clients/road.py", "merging/pipeline.py", "strategies/rounds.py"} <= files
    assert len(files) <= most, sorted(files)


def test_parts_that_a_method_does_not_have_are_not_visited():
    parts = {"edits/edit.py", "refine/guard.py", "personal/personal_part.py", "merging/statistics_reader.py"}
    assert parts.isdisjoint(files_of("fedavg"))
    assert "edits/edit.py" in files_of("trim+fedavg")
