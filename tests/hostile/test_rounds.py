"""Rounds with one hostile client among six, by every method and every kind: none is ended, none is taken over.

A few of each method with every run of the tests; 20,000 with ``make fuzz``.
"""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.guard import little_memory, resident
from tests.hostile.rounds import METHODS, PLACES, TABLES, federation, is_slow, kinds_of, tables_of

ROUNDS = 20_000
WARM = 2_000
"""Rounds after which every method has loaded and cached what it needs: memory is compared from there on."""
GROWTH = 64
"""MiB that the rounds after that may leave behind."""
ROWS = [pytest.param(i, id=str(row)) for i, row in enumerate(METHODS)]


def tried(row, examples):
    """A property of rounds by this method, on so many of them, which are others by another."""
    kinds = kinds_of(METHODS[row])
    first = 37 * row % len(kinds)

    # A kind is as simple as it gets: nothing to shrink.
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.sampled_from(kinds[first:] + kinds[:first]), st.sampled_from(PLACES), st.integers(0, 2**32))
    def holds(kind, place, seed):
        fate = federation(row).round(kind, place, seed)
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
    fates = (federation(row, kind.name.startswith("tied")).round(kind, PLACES[first % 3], 7) for row in rows)
    fate = next((fate for fate in fates if fate.how != "none"), None)
    assert fate is not None
    assert not fate.fault, fate.fault


@pytest.mark.study
def test_twenty_thousand_rounds():
    rng, fates, faults, ended = random.Random(0), {}, Counter(), Counter()
    shares = [1 if is_slow(row) else 12 for row in METHODS]
    begin, done, slowest = time.perf_counter(), 0, 0.0
    with little_memory():
        for row in range(len(METHODS)):  # fills caches
            for place in PLACES:
                federation(row).without(place)
        before = 0.0
        while done < ROUNDS:
            (row,) = rng.choices(range(len(METHODS)), shares)
            table = TABLES[rng.choice(tables_of(METHODS[row]))]
            kind, started = rng.choice(list(table.values())), time.perf_counter()
            fate = federation(row, kind.name.startswith("tied")).round(kind, rng.choice(PLACES), done)
            slowest = max(slowest, time.perf_counter() - started)
            if fate.how == "none":
                continue
            done += 1
            fates.setdefault(str(kind), Counter())[fate.how] += 1
            if fate.fault:
                print(f"{METHODS[row]}: {kind}: {fate.fault}", flush=True)
                faults[f"{METHODS[row]}: {kind}: {fate.fault}"] += 1
                ended[fate.fault.partition(" ")[0] if fate.how == "ended" else "taken over"] += 1
            if done == WARM:
                before = resident()
            if done % 2000 == 0:
                print(f"{done} rounds, {resident():.0f} MiB, {sum(faults.values())} with a fault", flush=True)
        after = resident()
    print(f"{'kind':70} dropped accepted ended")
    for name, fate in sorted(fates.items()):
        print(f"{name[:70]:70} {fate['dropped']:7} {fate['accepted']:8} {fate['ended']:5}")
    total = sum(fates.values(), Counter())
    print(f"{'all':70} {total['dropped']:7} {total['accepted']:8} {total['ended']:5}")
    print(f"{time.perf_counter() - begin:.0f} s, the slowest round {slowest:.1f} s, faults {dict(ended)}")
    print(f"{before:.0f} MiB after {WARM} rounds, {after:.0f} MiB after {done}")
    assert not faults, f"{sum(faults.values())} rounds: " + "\n".join(
        f"{n} {text}" for text, n in faults.most_common(60)
    )
    assert after - before < GROWTH
