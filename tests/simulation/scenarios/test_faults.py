"""Clients that crash, send nonsense, disappear or are late: who does, in every setting, and what the record says."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch

from fedmerge.errors import (
    ClientFailed,
    ConfigError,
    FedMergeError,
    InvalidOption,
    NothingMerged,
    NoUsableUpdates,
    UnknownName,
)
from fedmerge.records.run_records import read_checkpoint
from fedmerge.simulation import SimulationGrid, compare, load_config, make_config
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.grids.faulty_grid import FaultyGrid
from fedmerge.simulation.runs.unfinished import find_unfinished
from fedmerge.simulation.scenarios.faults import Faults, Mishaps
from fedmerge.strategies import MergeStrategy, client_app, from_arrays
from tests.federation import CLIENTS, TRAINING, initial, tiny_data, tiny_model
from tests.outcomes import outcomes

FLOWER = "flwr.serverapp.strategy:FedAvg"
CONFIG = {
    "methods": ["fedavg"],
    "rounds": 3,
    "partition": {"clients": 12, "alpha": 1.0, "min_examples": 5},
    "model": {"name": "logistic"},
    "evaluate_clients": False,
    "engine": "serial",
}
ALL = {"crash": 0.12, "nan": 0.12, "garbage": 0.12, "drop": 0.12, "slow": 0.12, "slow_seconds": 40.0}
REASONS = {"crash": "it crashed", "drop": "no reply within 30 s", "slow": "late: 40 s, the round ended at 30 s"}


def ignore(_row):
    pass


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def faulty(**faults):
    """The settings of a run in which these faults always befall somebody."""
    return make_config(CONFIG, {"faults": faults})


def test_faults_are_drawn_by_seed_client_and_round_at_their_rates():
    mishaps = Mishaps(Faults(**ALL), 3)
    drawn = {(client, round): mishaps.fault(client, round) for client in range(500) for round in (1, 2, 3, 4)}
    assert all(mishaps.fault(*key) == drawn[key] for key in reversed(drawn))
    counts = Counter(drawn.values())
    assert all(counts[kind] == pytest.approx(240, abs=60) for kind in ("crash", "nan", "garbage", "drop", "slow"))
    for other in (Mishaps(Faults(**ALL), 4), Mishaps(Faults(crash=0.12), 3)):
        assert any(other.fault(*key) != drawn[key] for key in drawn)
    assert [drawn[c, 1] for c in range(500)] != [drawn[c, 2] for c in range(500)]
    assert {Mishaps(Faults(), 0).fault(c, 1) for c in range(50)} == {None}


def test_damage_leaves_the_trained_model_alone_and_is_repeatable():
    state = tiny_model().state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    nan, garbage = Mishaps(Faults(nan=1.0), 0), Mishaps(Faults(garbage=1.0), 0)
    for client in range(20):
        sent = nan.sent(state, client, 1)
        assert sum(int(tensor.isnan().sum()) for tensor in sent.values()) == 1
        damaged = garbage.sent(state, client, 1)
        shapes = {name: tensor.shape for name, tensor in damaged.items()}
        assert shapes != {name: tensor.shape for name, tensor in state.items()}
        assert shapes == {name: tensor.shape for name, tensor in garbage.sent(state, client, 1).items()}
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert Mishaps(Faults(), 0).sent(state, 0, 1) is state


class Messages(MergeStrategy):
    """One that looks at replies, and so gets messages."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, list(replies))


def federated(kind, engine, method, clients=12):
    mishaps = Mishaps(Faults(**ALL), 1)
    app = client_app(tiny_model, lambda c, n: tiny_data(c % CLIENTS, n), training=TRAINING, mishaps=mishaps)
    with SimulationGrid(app, clients, engine=engine) as grid:
        measured = MeasuredGrid(FaultyGrid(grid, mishaps, 30.0))
        strategy = kind(method, model_fn=tiny_model, fraction_evaluate=0.0, round_timeout=30.0)
        state = from_arrays(strategy.start(measured, initial(), num_rounds=2).arrays)
    failures = [[(f.client, f.reason) for f in exchange.failures] for exchange in measured.exchanges]
    report = strategy.last_report
    return state, failures, report.accepted, [(bad.client, bad.reason) for bad in report.dropped]


@pytest.mark.parametrize("method", ["fedavg", "median", "fisher"])
def test_every_setting_has_the_same_faults(method, caplog):
    messages = federated(Messages, "serial", method)
    serial = federated(MergeStrategy, "serial", method)
    stacked = federated(MergeStrategy, "stacked", method)
    assert messages[1:] == serial[1:] == stacked[1:]
    assert sum(map(len, serial[1])) > 3
    assert serial[3]
    for name, tensor in messages[0].items():
        assert torch.isfinite(tensor).all()
        torch.testing.assert_close(serial[0][name], tensor, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stacked[0][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["fedavg", "krum", "fedatt", "fedma"])
def test_every_incident_is_in_the_record_with_client_and_reason(method, tmp_path):
    given = {"methods": [method], "faults": ALL, "round_timeout": 30.0, "model": {"name": "mlp"}}
    (folder,) = compare(make_config(CONFIG, given), tmp_path, ignore).runs
    mishaps = Mishaps(Faults(**ALL), 0)
    for row in rows_of(folder)[1:]:
        want = {client: mishaps.fault(client, row["round"]) for client in range(12)}
        failed = {entry["client"]: entry["reason"] for entry in row["failures"]}
        assert failed.keys() == {client for client, kind in want.items() if kind in REASONS}
        for client, reason in failed.items():
            assert reason.startswith(f"client {client}: {REASONS[want[client]]}")
        dropped = {entry["client"]: entry["reason"] for entry in row["dropped"]}
        assert dropped.keys() == {client for client, kind in want.items() if kind in ("nan", "garbage")}
        assert all(("NaN" in reason) == (want[client] == "nan") for client, reason in dropped.items())
        assert row["clients_failed"] == len(failed) + len(dropped)
        assert (row["clients_ok"], row["waited_for"], row["skipped"]) == (12 - row["clients_failed"], [], None)
    _, state, _ = read_checkpoint(folder)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_without_a_timeout_the_slow_are_waited_for_and_named(tmp_path):
    (folder,) = compare(faulty(slow=0.5), tmp_path / "slow", ignore).runs
    (plain,) = compare(make_config(CONFIG), tmp_path / "plain", ignore).runs
    mishaps = Mishaps(Faults(slow=0.5), 0)
    for row, same in zip(rows_of(folder)[1:], rows_of(plain)[1:], strict=True):
        late = [client for client in range(12) if mishaps.fault(client, row["round"])]
        assert [entry["client"] for entry in row["waited_for"]] == late
        assert row["waited_for"][0]["reason"] == "slow: 60 s, and the round waited"
        assert (row["clients_failed"], row["test_accuracy"]) == (0, same["test_accuracy"])
    assert "waited_for" not in (plain / "rounds.jsonl").read_text()


def test_strategies_of_flowers_get_error_replies_or_none(tmp_path):
    faults = {"crash": 0.2, "drop": 0.2, "slow": 0.2, "slow_seconds": 40.0}
    config = make_config(CONFIG, {"methods": [FLOWER, "fedavg"], "faults": faults, "round_timeout": 30.0})
    theirs, ours = map(rows_of, compare(config, tmp_path, ignore).runs)
    for one, other in zip(theirs, ours, strict=True):
        assert one["failures"] == other["failures"]
        assert one["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=0.005)
    assert sum(len(row["failures"]) for row in ours) > 8


def test_an_update_that_flowers_strategy_cannot_average_ends_its_run_only(tmp_path):
    config = make_config(CONFIG, {"methods": [FLOWER, "fedavg"], "faults": {"garbage": 0.5}})
    runs, (failed,) = compare(config, tmp_path, ignore)
    assert [folder.name for folder in runs] == ["fedavg-seed0"]
    assert type(failed.error) is FedMergeError
    assert "FedAvg cannot go on" in str(failed.error)


class Killed(BaseException):
    """Nothing in fedmerge catches it."""


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("method", ["fedavg+server_momentum", FLOWER])
def test_a_resumed_run_has_the_same_faults(method, engine, tmp_path):
    faults = {**ALL, "nan": 0.0, "garbage": 0.0} if method == FLOWER else ALL
    config = make_config(CONFIG, {"methods": [method], "faults": faults, "round_timeout": 30.0, "engine": engine})

    def kill(row):
        if row["round"] == 1:
            raise Killed

    compare(config, tmp_path / "undisturbed", ignore)
    with pytest.raises(Killed):
        compare(config, tmp_path / "killed", kill)
    for found in find_unfinished(tmp_path / "killed").configs:
        compare(found, tmp_path / "killed", ignore, resume=True)
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "undisturbed")


@pytest.mark.parametrize("method", ["fedavg", FLOWER])
def test_all_clients_failing_keeps_the_model_where_that_is_the_policy(method, tmp_path):
    """Round after round it stays, and the run that merged nothing fails in the end, also where it is taken up again."""
    config = make_config(CONFIG, {"methods": [method], "faults": {"crash": 1.0}, "on_too_few": "skip"})
    for resume in (False, True):
        runs, (failed,) = compare(config, tmp_path, ignore, resume=resume)
        assert not runs
        assert isinstance(failed.error, NothingMerged)
        assert "client 0 failed: it crashed in round 3" in str(failed.error)
    first, *rows = rows_of(failed.folder.with_name(failed.folder.name + ".partial"))
    assert len(rows) == 3
    for row in rows:
        assert (row["clients_ok"], row["clients_failed"]) == (0, 12)
        assert row["skipped"]
        assert (row["test_loss"], row["train_loss"]) == (first["test_loss"], None)
    assert first["skipped"] is None
    (failed,) = compare(make_config(CONFIG, {"methods": [method], "faults": {"crash": 1.0}}), tmp_path / "b", ignore)[1]
    assert isinstance(failed.error, NoUsableUpdates)
    assert "all clients failed in round 1; the first: client 0: it crashed" in str(failed.error)


@pytest.mark.parametrize("method", ["fedavg+server_adam", "median", FLOWER])
def test_fewer_clients_than_wanted_skip_their_round_only(method, tmp_path):
    kind = "crash" if method == FLOWER else "nan"
    given = {"methods": [method], "faults": {kind: 0.3}, "rounds": 8, "min_clients": 9, "on_too_few": "skip"}
    (folder,) = compare(make_config(CONFIG, given), tmp_path, ignore).runs
    rows = rows_of(folder)
    few = [row["clients_ok"] < 9 for row in rows[1:]]
    assert True in few
    assert False in few
    for before, row in pairwise(rows):
        assert (row["skipped"] is not None) == (row["clients_ok"] < 9) == (row["test_loss"] == before["test_loss"])
        assert row["clients_failed"] == 12 - row["clients_ok"] == len(row["failures"]) + len(row["dropped"])
    strict = make_config(CONFIG, {**given, "on_too_few": "raise"})
    (failed,) = compare(strict, tmp_path / "strict", ignore).failed
    assert isinstance(failed.error, NoUsableUpdates)
    assert "at least 9 wanted" in str(failed.error)


def test_a_run_that_ended_for_want_of_clients_goes_on_under_another_policy(tmp_path):
    given = {"faults": {"crash": 0.3}, "rounds": 8, "min_clients": 9}
    (failed,) = compare(make_config(CONFIG, given), tmp_path, ignore).failed
    path = failed.folder.with_name(failed.folder.name + ".partial") / "config.toml"
    path.write_text(path.read_text().replace('on_too_few = "raise"', 'on_too_few = "skip"'))
    (config,) = find_unfinished(tmp_path).configs
    (folder,) = compare(config, tmp_path, ignore, resume=True).runs
    assert [row["round"] for row in rows_of(folder)] == list(range(9))


@pytest.mark.parametrize("method", ["fedavg", FLOWER])
@pytest.mark.parametrize(("kind", "words"), [("crash", "it crashed in round 1"), ("drop", "no reply")])
def test_a_failing_client_ends_the_run_where_that_is_the_policy(method, kind, words, tmp_path):
    config = make_config(CONFIG, {"methods": [method], "faults": {kind: 0.3}, "on_client_error": "raise"})
    (failed,) = compare(config, tmp_path, ignore).failed
    assert isinstance(failed.error, ClientFailed)
    first = next(client for client in range(12) if Mishaps(Faults(**{kind: 0.3}), 0).fault(client, 1))
    assert (failed.error.client, failed.error.round) == (first, 1)
    assert str(failed.error).startswith(f"round 1: client {first} failed: {words}")


def test_the_record_holds_policies_and_faults(tmp_path):
    config = make_config(CONFIG, {"faults": {"crash": 0.1}, "round_timeout": 30, "on_too_few": "skip", "rounds": 1})
    (folder,) = compare(config, tmp_path, ignore).runs
    text = (folder / "config.toml").read_text()
    for line in (
        "crash = 0.1",
        "slow_seconds = 60.0",
        "round_timeout = 30.0",
        'on_too_few = "skip"',
        "min_clients = 1",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"faults": {"crsh": 0.1}}, UnknownName, "faults.crash"),
        ({"faults": {"crash": 1.5}}, InvalidOption, "crash"),
        ({"faults": {"crash": 0.6, "nan": 0.6}}, InvalidOption, "1.2 in sum"),
        ({"faults": {"nan": float("nan")}}, InvalidOption, "nan"),
        ({"faults": {"slow_seconds": -1}}, InvalidOption, "slow_seconds"),
        ({"faults": {"crash": "often"}}, ConfigError, "faults.crash"),
        ({"round_timeout": 0}, ConfigError, "round_timeout"),
        ({"min_clients": 0}, ConfigError, "min_clients"),
        ({"on_client_error": "drop"}, ConfigError, "on_client_error"),
    ],
)
def test_mistakes_in_the_configuration(settings, error, words):
    with pytest.raises(error, match=words):
        make_config(CONFIG, settings)


@pytest.mark.study
@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_a_quarter_of_the_clients_failing_costs_less_than_a_point(data, tmp_path, capsys, caplog):
    caplog.set_level(logging.ERROR, "fedmerge")
    given = load_config(Path(__file__).parents[3] / "simulations" / "faults-digits.toml")
    given |= {"methods": ["fedavg"], "data": {"name": data}}
    quiet = {"faults": {"crash": 0.0, "nan": 0.0, "slow": 0.0}}

    def last(kind, settings):
        rows = []
        runs, failed = compare(make_config(given, settings), tmp_path / kind, rows.append)
        assert not failed
        for folder in runs:
            assert all(tensor.isfinite().all() for tensor in read_checkpoint(folder)[1].values())
        incidents = sum(len(row["failures"]) + len(row["dropped"]) for row in rows)
        return [100 * row["test_accuracy"] for row in rows if row["round"] == given["rounds"]], incidents

    with_faults, incidents = last("faults", {})
    without, none = last("none", quiet)
    mishaps = [Mishaps(Faults(crash=0.1, nan=0.05, slow=0.1), seed) for seed in given["seeds"]]
    want = sum(m.fault(client, round) is not None for m in mishaps for client in range(20) for round in range(1, 21))
    with capsys.disabled():
        print(f"\n{data}: {with_faults} with {incidents} incidents, {without} without")
    assert (incidents, none) == (want, 0)
    assert abs(fmean(with_faults) - fmean(without)) < 1.0
