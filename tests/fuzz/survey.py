"""Many drawn examples of one case: a few hundred with every run of the tests, thousands with ``make fuzz``."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fedmerge import FedMergeError
from tests.fuzz.guard import fate, little_memory, quiet, resident

AT_ONCE = 1000
"""Examples of one search: Hypothesis remembers all that it has drawn, and forgets it after each."""
GROWTH = 64
"""MiB that a long survey may end with more than after its first search: caches fill, leaks go on."""
SETTINGS = {"deadline": None, "database": None, "phases": (Phase.generate, Phase.shrink),
            "suppress_health_check": tuple(HealthCheck)}  # fmt: skip


@dataclass(frozen=True)
class Tries:
    """How many examples to draw; `begin` is the seed, None for those that are drawn in every run of the tests."""

    number: int
    begin: int | None = None


def tries(few: int, many: int) -> pytest.MarkDecorator:
    """So many examples in every run of the tests, and in the study."""
    study = pytest.param(Tries(many, 1), id="many", marks=pytest.mark.study)
    return pytest.mark.parametrize("tried", [pytest.param(Tries(few), id="few"), study])


def survey(
    case: Callable[[Any], object],
    drawn: st.SearchStrategy[Any],
    tried: Tries,
    allowed: tuple[type[Exception], ...] = (FedMergeError,),
) -> Counter[str]:
    """How often a case was ``fine`` and how often it ended with a ``typed`` error.

    Anything else is a failure, with the smallest example that Hypothesis finds; in a long survey, a growing memory too.
    """
    fates: Counter[str] = Counter()

    def holds(example):
        fates[fate(lambda: case(example), allowed)] += 1

    long, warm = tried.begin is not None, 0.0
    with quiet(), warnings.catch_warnings(), little_memory():
        warnings.simplefilter("ignore")
        for done in range(0, tried.number, AT_ONCE):
            number = min(AT_ONCE, tried.number - done)
            search = settings(max_examples=number, derandomize=not long, **SETTINGS)(given(drawn)(holds))
            if long:
                search = seed(tried.begin + done)(search)
            search()
            warm = warm or (resident() if long else 0.0)
    if long:
        grown = resident() - warm
        print(f"{sum(fates.values())} cases, {fates['typed']} typed errors, {grown:.0f} MiB more")
        assert grown < GROWTH
    return fates
