"""Rounds with one hostile client among six, by every method and every kind: none is ended, none is taken over.

A few of each method with every run of the tests; tens of thousands with ``make fuzz``.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.guard import little_memory, resident
from tests.fuzz.survey import SETTINGS
from tests.hostile.kinds import draws
from tests.hostile.rounds import METHODS, PLACES, TABLES, federation, is_slow, kinds_of, tables_of

GROWTH = 64
"""MiB that many rounds by a method may leave behind, after a few have filled its caches."""
ROWS = [pytest.param(i, id=str(row)) for i, row in enumerate(METHODS)]


def tried(row, examples):
    """A property of rounds by this method, on so many of them, which are others by another."""
    kinds = kinds_of(METHODS[row])
    first = 37 * row % len(kinds)

    @settings(max_examples=examples, derandomize=True, **SETTINGS)
    @given(st.sampled_from(kinds[first:] + kinds[:first]), st.sampled_from(PLACES), draws())
    def holds(kind, place, rng):
        fate = federation(row, kind.name.startswith("tied")).round(kind, place, rng)
        assert not fate.fault, f"{kind}, client {place} of six: {fate.fault}"

    return holds


@pytest.mark.parametrize("row", ROWS)
def test_no_kind_of_client_ends_a_round_or_is_obeyed(row):
    tried(row, 1 if is_slow(METHODS[row]) else 4)()


# Answers go with questions, which take their time: by methods, above, and in test_statistics.py.
KINDS = [kind for place, table in TABLES.items() for kind in table.values() if place != "answer"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_has_its_fate_in_a_round_of_a_method_that_listens(kind):
    first = sum(map(ord, str(kind)))
    rows = [row for row, one in enumerate(METHODS) if kind.place in tables_of(one) and not is_slow(one)]
    rows = rows[first % len(rows) :] + rows[: first % len(rows)]
    fates = (
        federation(row, kind.name.startswith("tied")).round(kind, PLACES[first % 3], random.Random(7)) for row in rows
    )
    fate = next((fate for fate in fates if fate.how != "none"), None)
    assert fate is not None
    assert not fate.fault, fate.fault


@pytest.mark.study
@pytest.mark.parametrize("row", ROWS)
def test_many_rounds_are_none_ended_and_leave_no_memory_behind(row):
    examples = 30 if is_slow(METHODS[row]) else 220
    with little_memory():
        tried(row, examples // 10)()  # fills caches
        before = resident()
        tried(row, examples)()
        assert resident() - before < GROWTH
