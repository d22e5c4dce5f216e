"""A ServerApp that dies and is started again goes on where its strategy left a checkpoint."""

from __future__ import annotations

import logging

import pytest
from flwr.app import ArrayRecord

from fedmerge.errors import InvalidOption, RecordError
from fedmerge.records.checkpoints import checkpoint_files, load_checkpoint
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import FedAvg, FedNova, MergeStrategy
from tests.federation import CLIENTS, initial, tiny_app

FEW = {"fraction_train": 0.7, "min_train_nodes": 1, "min_evaluate_nodes": 1}


class Died(BaseException):
    """Of the server."""


def strategy(folder, **keywords):
    return MergeStrategy("fednova+server_adam", checkpoint_dir=folder, **{**FEW, **keywords})


def started(strategy, rounds, *, die_in=None, where="train", evaluate=None, start=None):
    """Run on fresh virtual clients; with `die_in` the server dies in that round."""
    grid = SimulationGrid(tiny_app(), CLIENTS, engine="serial")
    if die_in is not None:
        name = {"train": "order_train", "after the merge": "configure_evaluate"}[where]
        original = getattr(strategy, name)

        def dying(server_round, *arguments):
            if server_round == die_in:
                raise Died
            return original(server_round, *arguments)

        setattr(strategy, name, dying)
        with pytest.raises(Died):
            strategy.start(grid, initial(), rounds, evaluate_fn=evaluate)
        return None
    return strategy.start(grid, start or initial(), rounds, evaluate_fn=evaluate)


def same(one: ArrayRecord, two: ArrayRecord):
    return list(one) == list(two) and all(one[name].data == two[name].data for name in one)


@pytest.mark.parametrize("where", ["train", "after the merge"])
@pytest.mark.parametrize("round", [1, 2, 4])
def test_a_server_that_dies_ends_as_one_that_did_not(tmp_path, round, where):
    undisturbed = started(strategy(None), 4)
    started(strategy(tmp_path), 4, die_in=round, where=where)
    again = strategy(tmp_path)
    result = started(again, 4)
    assert same(result.arrays, undisturbed.arrays)
    done = round - 1 if where == "train" else round
    for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        expected = {number: dict(m) for number, m in getattr(undisturbed, name).items() if number > done}
        assert {number: dict(metrics) for number, metrics in getattr(result, name).items()} == expected
    assert again.memory
    assert not {"configure_train", "order_train"} & set(vars(again))  # nothing stays shifted


def test_it_says_so_and_what_it_says_is_true(tmp_path, caplog):
    started(FedAvg(checkpoint_dir=tmp_path, keep_checkpoints=2), 3)
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "round-000002.safetensors",
        "round-000003.safetensors",
    ]
    with caplog.at_level(logging.INFO, "fedmerge"):
        result = started(FedAvg(checkpoint_dir=tmp_path), 5)
    assert f"continuing after round 3 of 5, from {tmp_path}" in caplog.text
    assert list(result.train_metrics_clientapp) == [4, 5]


def test_the_model_that_was_merged_last_is_evaluated_again(tmp_path):
    """The server may have died in between; a test that is made twice tells the same twice."""
    seen = []

    def evaluate(server_round, arrays):
        seen.append(server_round)

    started(strategy(tmp_path), 3, die_in=2, where="after the merge", evaluate=evaluate)
    started(strategy(tmp_path), 3, evaluate=evaluate)
    assert seen == [0, 1, 2, 3]


def test_when_all_rounds_are_done_the_model_is_the_result(tmp_path, caplog):
    first = started(strategy(tmp_path), 2)
    again = started(strategy(tmp_path), 2)
    assert same(first.arrays, again.arrays)
    assert "choose another checkpoint_dir" in caplog.text


def test_a_damaged_checkpoint_costs_a_round_and_no_more(tmp_path, caplog):
    undisturbed = started(strategy(None), 4)
    started(strategy(tmp_path), 4, die_in=4)
    last = checkpoint_files(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:-9])
    assert same(started(strategy(tmp_path), 4).arrays, undisturbed.arrays)
    assert "round-000003.safetensors" in caplog.text
    for path in checkpoint_files(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(RecordError, match="restore one from a backup, or delete"):
        started(strategy(tmp_path), 4)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda folder: strategy(folder, seed=3), "seed was 0, is 3"),
        (lambda folder: strategy(folder, fraction_train=1.0), "fraction_train was 0.7, is 1.0"),
        (lambda folder: FedNova(checkpoint_dir=folder, **FEW), "method was "),
    ],
)
def test_another_configuration_is_refused(tmp_path, other, words):
    started(strategy(tmp_path), 1)
    before = [path.read_bytes() for path in checkpoint_files(tmp_path)]
    with pytest.raises(RecordError, match=words):
        started(other(tmp_path), 2)
    assert [path.read_bytes() for path in checkpoint_files(tmp_path)] == before


def test_another_model_is_refused(tmp_path):
    started(strategy(tmp_path), 1)
    other = ArrayRecord({f"body.{name}": array for name, array in initial().items()})
    with pytest.raises(RecordError, match="another model"):
        started(strategy(tmp_path), 2, start=other)


def test_batch_norms_that_clients_kept_are_gone_and_it_says_so(tmp_path, caplog):
    started(strategy(tmp_path, batch_norm="local"), 1)
    started(strategy(tmp_path, batch_norm="local"), 2)
    assert "lost what they kept" in caplog.text


def test_a_merge_outside_of_start_is_saved_too(tmp_path):
    from fedmerge.strategies import from_arrays
    from tests.federation import noisy_states, reply

    arrays, _ = FedAvg(checkpoint_dir=tmp_path).aggregate_train(7, [reply(10, noisy_states()[0], 5)])
    (path,) = checkpoint_files(tmp_path)
    saved = load_checkpoint(path)
    assert saved.round == 7
    assert all((saved.section("state")[name] == tensor).all() for name, tensor in from_arrays(arrays).items())


def test_none_is_not_a_number_of_checkpoints(tmp_path):
    with pytest.raises(InvalidOption, match="at least 1"):
        FedAvg(checkpoint_dir=tmp_path, keep_checkpoints=0)
