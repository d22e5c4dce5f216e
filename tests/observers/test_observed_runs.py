"""Observers of a comparison: they see every round, may end a run, and leave its record as it is."""

from __future__ import annotations

import csv
import json
import random
import time
from pathlib import Path

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from fedmerge.errors import NothingMerged, ObserverFailed
from fedmerge.observers import Observer
from fedmerge.records.run_records import read_toml
from fedmerge.simulation import compare, load_config, make_config
from fedmerge.simulation.runs.results import write_results
from fedmerge.simulation.runs.unfinished import find_unfinished
from tests.outcomes import outcomes

BASE = {
    "methods": ["fedavg"],
    "rounds": 3,
    "seeds": [0],
    "partition": {"clients": 3, "alpha": 0.5, "max_examples": 40},
    "model": {"name": "logistic"},
    "engine": "serial",
}
FLOWERS = "flwr.serverapp.strategy:FedAvg"


class Killed(BaseException):
    """Nothing in fedmerge catches it, as nothing catches SIGKILL."""


class Noting(Observer):
    """Writes down what it is told, and meddles with whatever it can reach."""

    def __init__(self):
        self.notes = []

    def began(self, run):
        self.notes.append((run.method, run.seed, run.done, len(run.rows), run.folder.name))

    def round_done(self, row, state):
        self.notes.append((row["round"], sorted(state), row["test_loss"]))
        for tensor in state.values():
            tensor.zero_()
        row.clear()
        random.seed(1), torch.manual_seed(1)

    def ended(self, ending):
        self.notes.append((ending.round, ending.stopped, ending.error))


class StopsAfter(Observer):
    """Ends the run after a round."""

    def __init__(self, round: int = 1):
        self.round = round

    def began(self, run):
        self.now = run.done

    def round_done(self, row, state):
        self.now = row["round"]

    def should_stop(self):
        return f"round {self.round} was enough" if self.now >= self.round else None


STOPPING = f"{__name__}:StopsAfter"


def rows(folder: Path):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_observers_see_all_and_the_record_is_as_without_them(tmp_path):
    config = make_config(BASE, {"methods": ["fedavg", FLOWERS], "fraction_train": 0.7})
    compare(config, tmp_path / "alone")
    seen, noting = [], Noting()
    assert not compare(config, tmp_path / "watched", seen.append, observers=[noting]).failed
    assert outcomes(tmp_path / "watched") == outcomes(tmp_path / "alone")
    assert seen == [row for run in ("fedavg-seed0", f"{FLOWERS.replace(':', '.')}-seed0") for row in
                    rows(tmp_path / "watched" / run)]  # fmt: skip
    first = noting.notes[:6]
    assert first[0] == ("fedavg", 0, 0, 0, "fedavg-seed0.partial")
    assert [note[0] for note in first[1:5]] == [0, 1, 2, 3]
    assert len(first[1][1]) == 2  # weight and bias
    assert [note[2] for note in first[1:5]] == [row["test_loss"] for row in seen[:4]]
    assert first[5] == (3, None, None)


@pytest.mark.parametrize("method", ["fedavg", FLOWERS])
def test_a_stopped_run_is_complete_tells_why_and_does_not_go_on(tmp_path, method):
    config = make_config(BASE, {"methods": [method], "observers": [f"{STOPPING}(round=2)"]})
    (run,), failed = compare(config, tmp_path)
    assert not failed
    assert [row["stopped"] for row in rows(run)] == [None, None, "round 2 was enough"]
    assert not run.with_name(f"{run.name}.partial").exists()
    _, _, (summary, *_) = write_results(config, [run], tmp_path)
    (told,) = csv.DictReader(summary.open())
    assert told["stopped"] == "seed 0 after round 2: round 2 was enough"
    assert told["rounds"] == "2"
    before = outcomes(tmp_path)
    for more in ({}, {"rounds": 5}):  # the same again, and longer
        compare(make_config(config.model_dump(mode="json"), more), tmp_path, grow=True)
        assert outcomes(tmp_path) == before
    for again in find_unfinished(tmp_path).configs:
        compare(again, tmp_path, resume=True)
    assert outcomes(tmp_path) == before


@pytest.mark.parametrize("others", [[], [f"{STOPPING}(round=3)"]])
def test_without_the_observer_that_stopped_it_a_run_goes_on(tmp_path, others):
    compare(make_config(BASE), tmp_path / "undisturbed")
    compare(make_config(BASE, {"observers": [STOPPING]}), tmp_path / "run")
    (run,), failed = compare(make_config(BASE, {"observers": others}), tmp_path / "run", grow=True)
    assert not failed
    now, whole = rows(run), rows(tmp_path / "undisturbed" / run.name)
    assert [row["test_loss"] for row in now] == [row["test_loss"] for row in whole]
    assert [row["stopped"] for row in now][:2] == [None, "round 1 was enough"]


def test_a_run_killed_once_it_was_stopped_does_not_go_on(tmp_path):
    def kill(row):
        if row["stopped"]:
            raise Killed

    config = make_config(BASE, {"observers": [STOPPING]})
    with pytest.raises(Killed):
        compare(config, tmp_path, kill)
    assert (tmp_path / "fedavg-seed0.partial").exists()
    (run,), failed = compare(find_unfinished(tmp_path).configs[0], tmp_path, resume=True)
    assert not failed
    assert [row["round"] for row in rows(run)] == [0, 1]


def test_patience_is_the_same_where_the_run_was_killed_in_between(tmp_path):
    lazy = {"training": {"learning_rate": 1e-30}, "rounds": 6, "observers": ["early_stopping(patience=3)"]}

    def kill(row):
        if row["round"] == 2:
            raise Killed

    with pytest.raises(Killed):
        compare(make_config(BASE, lazy), tmp_path, kill)
    (run,), _ = compare(find_unfinished(tmp_path).configs[0], tmp_path, resume=True)
    loss = rows(run)[0]["test_loss"]
    assert [row["stopped"] for row in rows(run)] == [
        *(None, None, None),
        f"test_loss has not been below {loss:.6g} for 3 rounds",
    ]


def test_a_run_stopped_before_it_merged_anything_ends_with_an_error(tmp_path):
    ((failed,)) = compare(make_config(BASE, {"observers": [f"{STOPPING}(round=0)"]}), tmp_path).failed
    assert isinstance(failed.error, NothingMerged)
    assert "round 0 was enough" in str(failed.error)


def test_an_observer_that_raises_ends_its_run_alone_and_what_is_kept_goes_on(tmp_path):
    class Fragile(Observer):
        def began(self, run):
            self.seed = run.seed

        def round_done(self, row, state):
            if self.seed == 1 and row["round"] == 2:
                raise ZeroDivisionError("no such luck")

    config = make_config(BASE, {"seeds": [1, 0]})
    compare(config, tmp_path / "undisturbed")
    runs, (failed,) = compare(config, tmp_path / "run", observers=[Fragile()])
    assert [run.name for run in runs] == ["fedavg-seed0"]
    assert isinstance(failed.error, ObserverFailed)
    assert str(failed.error).startswith("observer Fragile failed after round 2: ZeroDivisionError: no such luck.")
    partial = failed.folder.with_name(f"{failed.folder.name}.partial")
    assert [row["round"] for row in rows(partial)] == [0, 1, 2]
    assert (partial / "checkpoint").exists()
    compare(config, tmp_path / "run", grow=True)
    assert outcomes(tmp_path / "run") == outcomes(tmp_path / "undisturbed")


def test_an_observer_that_raises_at_the_end_leaves_a_complete_record(tmp_path):
    class Late(Observer):
        def ended(self, ending):
            raise OSError("server gone")

    (failed,) = compare(make_config(BASE), tmp_path, observers=[Late()]).failed
    assert "observer Late failed when the run ended: OSError: server gone" in str(failed.error)
    assert len(rows(tmp_path / "fedavg-seed0")) == 4


def test_the_caller_hears_of_its_own_errors_as_they_are_and_every_round_is_kept(tmp_path):
    """A pipe that nobody reads any more ends the command, not each run by itself."""

    def shown(row):
        raise BrokenPipeError("nobody reads this")

    noting = Noting()
    with pytest.raises(BrokenPipeError):
        compare(make_config(BASE, {"seeds": [0, 1]}), tmp_path, shown, observers=[noting])
    assert [row["round"] for row in rows(tmp_path / "fedavg-seed0.partial")] == [0]
    assert noting.notes[-1][0] == 0
    assert isinstance(noting.notes[-1][2], BrokenPipeError)
    assert not (tmp_path / "fedavg-seed1.partial").exists()


def test_nothing_is_written_where_an_observer_cannot_be_made(tmp_path):
    from fedmerge.errors import ConfigError, UnknownName

    with pytest.raises(UnknownName, match="Did you mean 'tensorboard'"):
        make_config(BASE, {"observers": ["tensorbord"]})
    with pytest.raises(ConfigError, match="cannot import module 'nowhere'"):
        compare(make_config(BASE, {"observers": ["nowhere:Mine"]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_observers_stand_in_the_configuration_of_a_record(tmp_path):
    config = make_config(BASE, {"rounds": 1, "observers": ["early_stopping(patience=9)"]})
    (run,), _ = compare(config, tmp_path)
    assert read_toml(run / "config.toml")["observers"] == ["early_stopping(patience=9)"]
    assert make_config(load_config(run / "config.toml")).observers == config.observers


class Slow(FedAvg):
    """Takes its time to merge, and starts in a way of its own."""

    started = 0

    def start(self, *arguments, **keywords):
        type(self).started += 1
        self.before = set(vars(self))
        result = super().start(*arguments, **keywords)
        assert set(vars(self)) == self.before | {"before"}, "somebody set attributes"
        return result

    def aggregate_train(self, server_round, replies):
        time.sleep(0.2)
        return super().aggregate_train(server_round, replies)


def test_anybodys_strategy_is_measured_without_being_touched(tmp_path):
    config = make_config(BASE, {"rounds": 1, "methods": [f"{__name__}:Slow", "fedavg"]})
    (run, ours), _ = compare(config, tmp_path)
    row, other = rows(run)[1], rows(ours)[1]
    assert Slow.started == 1
    assert 0.2 <= row["seconds_merge"] < 0.2 + row["seconds_train"] + 1
    assert other["seconds_merge"] < 0.2
    assert row["train_loss"] == pytest.approx(other["train_loss"])
    assert row["client_accuracy"] == pytest.approx(other["client_accuracy"])
