"""Who is told what, in which order, and what becomes of a run where an observer raises or wants it to end."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fedmerge.errors import ConfigError, InvalidOption, ObserverFailed, RecordError, UnknownName
from fedmerge.observers import Calling, Ending, Observer, Run, RunStopped, Watch, make_observers

RUN = Run("fedavg", 0, 3)


class Noting(Observer):
    """Writes down what it is told."""

    def __init__(self, notes, name="", raises="", stops=None):
        self.notes, self.name, self.raises, self.stops = notes, name, raises, stops

    def note(self, what):
        self.notes.append((self.name, what))
        if self.raises == what:
            raise ValueError("I cannot")

    def began(self, run):
        self.note("began")

    def round_done(self, row, state):
        self.note(f"round {row['round']}" + (f" ({row['stopped']})" if row["stopped"] else ""))

    def should_stop(self):
        return self.stops

    def ended(self, ending):
        self.note("ended")
        self.ending = ending


def watched(watch, rounds=2, error=None):
    with watch.over(RUN):
        for round in range(rounds):
            watch.round_done({"round": round}, {})
        if error is not None:
            raise error


def test_everybody_is_told_in_order():
    notes = []
    watched(Watch([Noting(notes, "a"), Noting(notes, "b")]))
    told = ["began", "round 0", "round 1", "ended"]
    assert notes == [(name, what) for what in told for name in "ab"]


def test_who_stands_behind_the_one_that_ends_it_sees_the_reason():
    notes = []
    first, ending, last = Noting(notes, "first"), Noting(notes, "ending", stops="enough"), Noting(notes, "last")
    watch = Watch([first, ending, last])
    watched(watch, rounds=5)
    assert [what for name, what in notes if name == "first"] == ["began", "round 0", "ended"]
    assert [what for name, what in notes if name == "last"] == ["began", "round 0 (enough)", "ended"]
    assert last.ending == Ending(0, "enough")
    assert watch.stopped == "enough"


@pytest.mark.parametrize(("wants", "reason"), [("", None), (False, None), (True, "Noting ended it"), ("x", "x")])
def test_reasons_are_words(wants, reason):
    watch = Watch([Noting([], stops=wants)])
    watched(watch)
    assert watch.stopped == reason


@pytest.mark.parametrize(
    ("raises", "when"), [("began", "when the run began"), ("round 1", "after round 1"), ("ended", "when the run ended")]
)
def test_an_observer_that_raises_is_named_and_the_others_are_told_all_the_same(raises, when):
    notes = []
    last = Noting(notes, "last")
    with pytest.raises(ObserverFailed, match=f"observer Noting failed {when}: ValueError: I cannot") as caught:
        watched(Watch([Noting(notes, "bad", raises=raises), last]))
    assert caught.value.observer == "Noting"
    told = [what for name, what in notes if name == "last"]
    assert told == ([] if raises == "began" else ["began", "round 0", "round 1", "ended"])
    if raises == "round 1":
        assert last.ending.error is caught.value


def test_the_first_failure_is_told_and_the_error_of_the_run_is_not_replaced(caplog):
    bad = Noting([], "bad", raises="ended")
    with pytest.raises(RuntimeError, match="the grid is gone"):
        watched(Watch([bad]), error=RuntimeError("the grid is gone"))
    assert "observer Noting failed when the run ended" in caplog.text


def test_files_that_cannot_be_written_end_it_as_what_they_are():
    def full(row):
        raise RecordError("no space")

    with pytest.raises(RecordError, match="no space"):
        watched(Watch([Calling(full)]))


def test_ctrl_c_in_an_observer_is_ctrl_c():
    def interrupt(row):
        raise KeyboardInterrupt

    notes = []
    with pytest.raises(KeyboardInterrupt):
        watched(Watch([Calling(interrupt), Noting(notes)]))
    assert notes == [("", "began"), ("", "ended")]


def test_an_observer_changes_neither_row_nor_model_nor_random_numbers():
    class Meddling(Observer):
        def round_done(self, row, state):
            row["list"].append(3)
            row["round"] = 17
            state["w"].fill_(5.0)
            random.seed(0), torch.manual_seed(0), np.random.seed(0)  # noqa: NPY002

    seen = []
    row, state = {"round": 1, "list": []}, {"w": torch.ones(2)}
    before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    watch = Watch([Meddling(), Calling(seen.append)])
    with watch.over(RUN):
        watch.round_done(row, state)
    assert row == {"round": 1, "list": []}
    assert seen == [{"round": 1, "list": [], "stopped": None}]
    assert torch.equal(state["w"], torch.ones(2))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_a_run_may_be_over_before_it_goes_on():
    watch = Watch([Noting([], stops="enough")])
    with watch.over(RUN):
        watch.check()
        pytest.fail("it went on")
    assert watch.stopped == "enough"
    with watch.over(RUN), pytest.raises(RunStopped):
        watch.check("long ago")
    assert watch.stopped == "long ago"


def test_nothing_that_catches_errors_takes_the_end_for_one():
    assert not issubclass(RunStopped, Exception)


def test_observers_go_by_name_as_they_are_or_as_functions(tmp_path, monkeypatch):
    (tmp_path / "my_watchers.py").write_text(
        "from fedmerge.observers import Observer\n"
        "class Mine(Observer):\n    def __init__(self, every: int = 1):\n        self.every = every\n"
        "def no_observer():\n    return 3\n"
        "class Needs(Observer):\n    def __init__(self, what):\n        pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    given = Observer()
    made = make_observers(["early_stopping(patience=3)", "my_watchers:Mine(every=2)", given, print])
    assert [type(one).__name__ for one in made] == ["EarlyStopping", "Mine", "Observer", "Calling"]
    assert (made[0].patience, made[1].every, made[2]) == (3, 2, given)
    assert make_observers("early_stopping")[0].patience == 5
    for wrong, kind, words in (
        ("early_stoping", UnknownName, "Did you mean 'early_stopping'"),
        ("early_stopping(patients=3)", UnknownName, "Did you mean 'patience'"),
        ("early_stopping(patience=soon)", InvalidOption, "patience"),
        ("early_stopping+tensorboard", ConfigError, "stand in a list"),
        ("my_watchers:no_observer", ConfigError, "but a int"),
        ("my_watchers:Needs", InvalidOption, "wants its option what"),
        ("my_watchers:Yours", ConfigError, "no name 'Yours'"),
        (Observer, ConfigError, "got <class"),
        (3, ConfigError, "got 3"),
    ):
        with pytest.raises(kind) as caught:
            make_observers([wrong])
        assert words in str(caught.value)
