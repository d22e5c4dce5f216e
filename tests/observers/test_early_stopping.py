"""When a run has got no better for long enough."""

from __future__ import annotations

import math

import pytest

from fedmerge.errors import InvalidOption
from fedmerge.observers import EarlyStopping, Run


def stops_after(observer, values, column="test_loss"):
    """The first round after which the observer wants to end."""
    observer.began(Run("fedavg", 0, len(values)))
    for round, value in enumerate(values):
        observer.round_done({"round": round, column: value}, {})
        if observer.should_stop():
            return round
    return None


@pytest.mark.parametrize(
    ("options", "values", "round"),
    [
        ({"patience": 1}, [1.0, 0.9, 0.9], 2),
        ({"patience": 2}, [1.0, 0.9, 0.95, 0.8, 0.8, 0.81], 5),
        ({"patience": 2}, [1.0, 0.9, 0.8, 0.7], None),
        ({"patience": 1, "min_delta": 0.25}, [1.0, 0.7, 0.5], 2),
        ({"patience": 2, "min_delta": 0.25}, [1.0, 0.9, 0.7], None),  # of the best, not of the last
        ({"patience": 2}, [1.0, math.nan, math.inf], 2),
        ({"patience": 2}, [1.0, None, None], 2),
        ({"patience": 2}, [None, None, None], 2),
        ({"patience": 2}, [math.nan, 3.0, 2.0, 1.0], None),
        ({"patience": 1, "mode": "max"}, [1.0, 2.0, 1.5], 2),
    ],
)
def test_it_waits_as_long_as_it_is_patient(options, values, round):
    assert stops_after(EarlyStopping(**options), values) == round


@pytest.mark.parametrize("column", ["test_accuracy", "references/accuracy", "auroc", "macro_f1"])
def test_of_accuracies_more_is_better(column):
    observer = EarlyStopping(column=column, patience=1)
    nested = [{"references": {"accuracy": value}, column: value} for value in (0.1, 0.5, 0.6, 0.6)]
    observer.began(Run("fedavg", 0, 3))
    wanted = []
    for round, row in enumerate(nested):
        observer.round_done({"round": round, **row}, {})
        wanted.append(observer.should_stop())
    assert wanted[:3] == [None, None, None]
    assert wanted[3] == f"{column} has not been above 0.6 for 1 round"


def test_the_rows_of_before_count_and_another_run_does_not():
    rows = [{"round": 0, "test_loss": 1.0}, {"round": 1, "test_loss": 0.5}, {"round": 2, "test_loss": 0.6}]
    observer = EarlyStopping(patience=2)
    observer.began(Run("fedavg", 0, 9, done=2, rows=tuple(rows)))
    assert observer.should_stop() is None
    observer.round_done({"round": 3, "test_loss": 0.7}, {})
    assert observer.should_stop() == "test_loss has not been below 0.5 for 2 rounds"
    observer.began(Run("fednova", 0, 9))
    assert observer.should_stop() is None


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 0},
        {"patience": 1.5},
        {"patience": True},
        {"min_delta": -0.1},
        {"min_delta": math.nan},
        {"mode": "least"},
        {"column": "seconds_train"},
    ],
)
def test_what_cannot_be_meant_is_refused(options):
    with pytest.raises(InvalidOption, match="early_stopping"):
        EarlyStopping(**options)


@pytest.mark.parametrize("row", [{"round": 1, "test_accuracy": 0.5}, {"round": 1, "test_loss": "low"}])
def test_a_column_that_rows_lack_or_that_holds_no_numbers_is_named(row):
    with pytest.raises(InvalidOption, match="test_loss"):
        EarlyStopping().round_done(row, {})


def test_reasons_tell_the_margin_and_what_never_was_a_number():
    close, blind = EarlyStopping(patience=1, min_delta=0.5), EarlyStopping(patience=1)
    assert stops_after(close, [1.0, 0.75]) == 1
    assert close.should_stop() == "test_loss has not been below 1 by more than 0.5 for 1 round"
    assert stops_after(blind, [None, None]) == 1
    assert blind.should_stop() == "test_loss has been no number for 1 round"
