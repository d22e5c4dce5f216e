"""Observers of a strategy that runs by itself, on any grid."""

from __future__ import annotations

import pytest
import torch
from flwr.app import MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as Clipped
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedmerge.data import ClientData
from fedmerge.errors import InvalidOption, NothingMerged, ObserverFailed
from fedmerge.observers import EarlyStopping, Observer
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, start_watched, to_arrays


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(2, 2)


def data(partition, _):
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(partition))
    y = (x[:, 0] > 0).long()
    return ClientData(x[:8], y[:8], x[8:], y[8:])


def judged_here(number, arrays):
    return MetricRecord({"test_loss": float(from_arrays(arrays)["weight"].sum()), "rounds": number})


def run(strategy, start=None, rounds=4, **keywords):
    start = start or strategy.start
    with SimulationGrid(client_app(model, data), 2) as grid:
        return start(grid=grid, initial_arrays=to_arrays(model().state_dict()), num_rounds=rounds, **keywords)


class Ends(Observer):
    """Ends a run after a round, and keeps all rows."""

    def __init__(self, after=2):
        self.after, self.rows, self.endings = after, [], []

    def round_done(self, row, state):
        self.rows.append((row, dict(state.items())))

    def should_stop(self):
        return "enough" if self.rows and self.rows[-1][0]["round"] >= self.after else None

    def ended(self, ending):
        self.endings.append((ending.round, ending.stopped, ending.error))


def test_rows_hold_what_strategy_clients_and_test_tell():
    observer = Ends(after=9)
    result = run(MergeStrategy("fednova", seed=3, observers=[observer]), rounds=2, evaluate_fn=judged_here)
    rows = [row for row, _ in observer.rows]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["seed"] for row in rows] == [3, 3, 3]
    for number, row in enumerate(rows[1:], 1):
        assert (row["clients_ok"], row["clients_failed"], row["skipped"]) == (2, 0, None)
        assert row["train_loss"] == result.train_metrics_clientapp[number]["train_loss"]
        assert row["eval_acc"] == result.evaluate_metrics_clientapp[number]["eval_acc"]
        assert row["test_loss"] == result.evaluate_metrics_serverapp[number]["test_loss"]
        assert row["seconds"] > 0
    assert all(torch.equal(observer.rows[-1][1][name], tensor) for name, tensor in from_arrays(result.arrays).items())
    assert observer.endings == [(2, None, None)]


@pytest.mark.parametrize("strategy", [MergeStrategy, FedAvg])
def test_a_run_that_is_ended_returns_what_a_shorter_one_would(strategy):
    observer, keywords = Ends(), {"min_available_nodes": 2}
    whole = run(strategy(**keywords), rounds=2, evaluate_fn=judged_here)
    if strategy is FedAvg:
        short = run(
            None, lambda **start: start_watched(FedAvg(**keywords), [observer], **start), evaluate_fn=judged_here
        )
    else:
        short = run(MergeStrategy(**keywords, observers=[observer]), evaluate_fn=judged_here)
        assert short.train_metrics_clientapp == whole.train_metrics_clientapp
        assert short.evaluate_metrics_clientapp == whole.evaluate_metrics_clientapp
    assert short.evaluate_metrics_serverapp == whole.evaluate_metrics_serverapp
    assert all(torch.equal(from_arrays(short.arrays)[n], t) for n, t in from_arrays(whole.arrays).items())
    assert observer.endings == [(2, "enough", None)]


def test_nobody_needs_a_test_to_watch():
    observer = Ends(after=1)
    result = run(MergeStrategy(observers=[observer]))
    assert list(result.train_metrics_clientapp) == [1]
    assert not result.evaluate_metrics_serverapp


def test_a_run_that_was_ended_does_not_go_on_while_it_is_watched(tmp_path, caplog):
    def strategy(*observers):
        return MergeStrategy(checkpoint_dir=tmp_path, observers=observers)

    ended = run(strategy(Ends(after=2)))
    observer = Ends(after=9)
    again = run(strategy(observer))
    assert "was ended after round 2: enough" in caplog.text
    assert all(torch.equal(from_arrays(again.arrays)[n], t) for n, t in from_arrays(ended.arrays).items())
    assert not again.train_metrics_clientapp
    assert list(run(strategy()).train_metrics_clientapp) == [3, 4]
    assert not (tmp_path / "stopped.toml").exists()


def test_an_observer_that_raises_is_named_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    class Fragile(Observer):
        def round_done(self, row, state):
            if row["round"] == 2:
                raise RuntimeError("disk full of ideas")

    with pytest.raises(ObserverFailed, match="Fragile failed after round 2: RuntimeError: disk full of ideas"):
        run(MergeStrategy(checkpoint_dir=tmp_path, observers=[Fragile()]))
    result = run(MergeStrategy(checkpoint_dir=tmp_path))
    whole = run(MergeStrategy())
    assert all(torch.equal(from_arrays(result.arrays)[n], t) for n, t in from_arrays(whole.arrays).items())


def test_a_run_ended_before_it_merged_anything_is_an_error():
    with pytest.raises(NothingMerged, match="enough"):
        run(MergeStrategy(observers=[Ends(after=0)]))


def test_patience_looks_at_what_the_test_returns():
    observer = EarlyStopping(column="rounds", mode="min", patience=2)  # which only grows
    result = run(MergeStrategy(observers=[observer]), evaluate_fn=judged_here)
    assert list(result.evaluate_metrics_serverapp) == [0, 1, 2]


def test_observers_of_a_strategy_within_another_are_refused_not_ignored():
    inner = MergeStrategy(observers=[Ends()])
    with pytest.raises(InvalidOption, match="start_watched"):
        run(Clipped(inner, noise_multiplier=0.0, clipping_norm=10.0, num_sampled_clients=2))
    observer = Ends()
    outer = Clipped(MergeStrategy(), noise_multiplier=0.0, clipping_norm=10.0, num_sampled_clients=2)
    run(None, lambda **start: start_watched(outer, [observer], **start), evaluate_fn=judged_here)
    assert [row["round"] for row, _ in observer.rows] == [0, 1, 2]
