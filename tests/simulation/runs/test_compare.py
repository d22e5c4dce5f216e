"""Comparisons and the records they leave."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from fedmerge.errors import NoUsableUpdates, PartitionError, RecordError
from fedmerge.records.run_records import RunRecord, read_checkpoint
from fedmerge.simulation import compare, make_config
from fedmerge.simulation.runs.compare import check_output
from fedmerge.simulation.runs.experiment import Experiment

BASE = {
    "methods": ["fedavg", "fednova"],
    "rounds": 2,
    "seeds": [0, 1],
    "partition": {"clients": 4, "alpha": 0.5},
    "model": {"name": "logistic"},
}
KEYS = {
    *(
        "local_steps",
        "method",
        "seed",
        "round",
        "test_loss",
        "test_accuracy",
        "train_loss",
        "clients_ok",
        "clients_failed",
    ),
    *("bytes_down", "bytes_up", "seconds_train", "seconds_merge", "seconds_evaluate", "parameters"),
    "local_steps",
}


def rows(folder, *, times=True):
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return parsed if times else [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in parsed]


def ignore(_row):
    pass


def test_every_run_leaves_a_whole_record(tmp_path):
    seen = []
    folders, failed = compare(make_config(BASE), tmp_path, seen.append)
    assert not failed
    assert sorted(f.name for f in folders) == ["fedavg-seed0", "fedavg-seed1", "fednova-seed0", "fednova-seed1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in folders)
    for folder in folders:
        record = rows(folder)
        assert [row["round"] for row in record] == [0, 1, 2]
        assert all(set(row) >= KEYS for row in record)
        assert record[0]["bytes_up"] == 0
        assert record[2]["clients_ok"] == 4
        assert record[2]["test_accuracy"] > record[0]["test_accuracy"]
        assert (folder / "config.toml").exists()
        assert (folder / "partition.safetensors").exists()
        number, state, _ = read_checkpoint(folder)
        assert number == 2
        assert record[2]["parameters"] == sum(tensor.numel() for tensor in state.values()) == 650
    assert len(seen) == 4 * 3


def test_the_same_command_twice_gives_the_same_rows_but_for_times(tmp_path):
    config = make_config(BASE, {"seeds": [0]})
    one, two = (compare(config, tmp_path / name, ignore).runs for name in ("a", "b"))
    for first, second in zip(one, two, strict=True):
        assert rows(first, times=False) == rows(second, times=False)
        assert (first / "partition.safetensors").read_bytes() == (second / "partition.safetensors").read_bytes()


def test_methods_share_clients_and_start_and_seeds_do_not(tmp_path):
    compare(make_config(BASE), tmp_path, ignore)
    start = {
        name: rows(tmp_path / name, times=False)[0]["test_loss"]
        for name in ("fedavg-seed0", "fednova-seed0", "fedavg-seed1")
    }
    assert start["fedavg-seed0"] == start["fednova-seed0"] != start["fedavg-seed1"]
    parts = [
        (tmp_path / name / "partition.safetensors").read_bytes()
        for name in ("fedavg-seed0", "fednova-seed0", "fedavg-seed1")
    ]
    assert parts[0] == parts[1] != parts[2]


def test_a_record_is_a_configuration_that_gives_itself_again(tmp_path):
    from fedmerge.simulation import load_config

    (folder, *_) = compare(make_config(BASE, {"seeds": [3]}), tmp_path / "a", ignore).runs
    again = compare(make_config(load_config(folder / "config.toml")), tmp_path / "b", ignore).runs
    assert [f.name for f in again] == ["fedavg-seed3"]
    assert rows(again[0], times=False) == rows(folder, times=False)


def test_a_foreign_flower_strategy_takes_part_and_equals_ours(tmp_path):
    name = "flwr.serverapp.strategy:FedAvg"
    config = make_config(BASE, {"methods": ["fedavg", name], "seeds": [0]})
    ours, theirs = (rows(folder) for folder in compare(config, tmp_path, ignore).runs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)
        assert mine["bytes_up"] == other["bytes_up"]


def test_partial_participation_and_no_client_evaluation(tmp_path):
    config = make_config(BASE, {"fraction_train": 0.5, "evaluate_clients": False, "seeds": [0], "methods": ["fedavg"]})
    (folder,) = compare(config, tmp_path, ignore).runs
    assert [row["clients_ok"] for row in rows(folder)] == [0, 2, 2]
    assert all(row["client_accuracy"] is None and row["bytes_evaluate"] == 0 for row in rows(folder))


def test_local_steps_of_all_stages_are_counted(tmp_path):
    settings = {"methods": ["fedavg", "fedma"], "seeds": [0], "model": {"name": "mlp", "options": {"hidden": [8]}}}
    config = make_config(BASE, settings, {"training": {"epochs": 2, "batch_size": 32}, "rounds": 1})
    fedavg, fedma = (rows(folder) for folder in compare(config, tmp_path, ignore).runs)
    held = Experiment(config, 0).partition.train
    epoch = sum(-(-len(indices) // 32) for indices in held)
    assert [row["local_steps"] for row in fedavg] == [0, 2 * epoch]
    assert [row["local_steps"] for row in fedma] == [0, 2 * epoch + epoch]  # one stage, of one epoch


def test_a_record_of_another_configuration_is_not_replaced(tmp_path):
    config = make_config(BASE, {"seeds": [0], "methods": ["fedavg"]})
    (folder,) = compare(config, tmp_path, ignore).runs
    before = (folder / "rounds.jsonl").read_bytes()
    check_output(config, tmp_path)
    check_output(make_config(BASE, {"seeds": [0], "methods": ["fedavg"], "workers": 2, "threads": 2}), tmp_path)
    with pytest.raises(RecordError, match=r"training\.learning_rate.*--overwrite"):
        check_output(make_config(BASE, {"methods": ["fedavg"], "training": {"learning_rate": 0.3}}), tmp_path)
    assert (folder / "rounds.jsonl").read_bytes() == before


def test_nothing_is_written_when_the_federation_cannot_be_made(tmp_path):
    impossible = make_config(BASE, {"partition": {"clients": 400, "alpha": 0.01}})
    with pytest.raises(PartitionError):
        compare(impossible, tmp_path / "out", ignore)
    assert not (tmp_path / "out").exists()


def test_a_run_in_which_every_client_diverges_ends_with_the_reason(tmp_path):
    config = make_config(
        BASE, {"training": {"learning_rate": 1e38, "momentum": 0.9}, "seeds": [0], "methods": ["fedavg"]}
    )
    (failed,) = compare(config, tmp_path, ignore).failed
    assert isinstance(failed.error, NoUsableUpdates)
    assert "NaN or infinite" in str(failed.error)
    assert [p.name for p in tmp_path.iterdir()] == ["fedavg-seed0.partial"]
    assert [row["round"] for row in rows(tmp_path / "fedavg-seed0.partial")] == [0]


def test_a_failing_client_is_in_the_record(tmp_path, monkeypatch):
    """Client 2 cannot read its data: its traceback is recorded, the others go on."""
    from fedmerge.data import Partition

    original = Partition.client_data

    def broken(self, dataset, client):
        if client == 2:
            raise OSError("cable pulled")
        return original(self, dataset, client)

    monkeypatch.setattr(Partition, "client_data", broken)
    (folder,) = compare(make_config(BASE, {"seeds": [0], "methods": ["fedavg"]}), tmp_path, ignore).runs
    last = rows(folder)[-1]
    assert (last["clients_ok"], last["clients_failed"]) == (3, 1)
    assert any("cable pulled" in f["reason"] and "Traceback" in f["reason"] for f in last["failures"])


def test_a_client_whose_training_diverges_is_in_the_record(tmp_path, monkeypatch):
    """Client 1's inputs are huge, hence its model diverges: left out, listed, and counted as failed."""
    from fedmerge.data import ClientData, Partition

    original = Partition.client_data

    def poisoned(self, dataset, client):
        data = original(self, dataset, client)
        if client != 1:
            return data
        return ClientData(data.train_x * 1e30, data.train_y, data.held_out_x, data.held_out_y)

    monkeypatch.setattr(Partition, "client_data", poisoned)
    (folder,) = compare(make_config(BASE, {"seeds": [0], "methods": ["fedavg"]}), tmp_path, ignore).runs
    last = rows(folder)[-1]
    assert (last["clients_ok"], last["clients_failed"]) == (3, 1)
    assert [bad["client"] for bad in last["dropped"]] == [1]
    assert "NaN" in last["dropped"][0]["reason"]
    assert last["train_loss"] is not None


def test_foreign_strategies_that_sample_from_the_global_generator_are_repeatable(tmp_path):
    import random

    name = "flwr.serverapp.strategy:FedAvg"
    config = make_config(BASE, {"methods": [name], "seeds": [0], "fraction_train": 0.5, "rounds": 4})
    random.seed(1)
    (one,) = compare(config, tmp_path / "a", ignore).runs
    random.seed(2)
    (two,) = compare(config, tmp_path / "b", ignore).runs
    assert rows(one, times=False) == rows(two, times=False)


def test_all_clients_failing_ends_the_run(tmp_path, monkeypatch):
    from fedmerge.data import Partition

    def broken(self, dataset, client):
        raise OSError("cable pulled")

    monkeypatch.setattr(Partition, "client_data", broken)
    (failed,) = compare(make_config(BASE, {"seeds": [0], "methods": ["fedavg"]}), tmp_path, ignore).failed
    assert str(failed.error) == "fedavg: all clients failed in round 1; the first: client 0: OSError: cable pulled"


def test_a_method_that_fails_does_not_stop_the_others(tmp_path):
    wild = {"server_momentum": {"learning_rate": 1e38}}
    methods = ["fedavg+server_momentum", "fedavg"]
    config = make_config(BASE, {"methods": methods, "options": wild, "seeds": [0]})
    runs, failed = compare(config, tmp_path, ignore)
    assert [folder.name for folder in runs] == ["fedavg-seed0"]
    assert [run.folder.name for run in failed] == ["fedavg+server_momentum-seed0"]
    assert "ServerMomentum left the range" in str(failed[0].error)


def test_global_generators_are_left_alone(tmp_path):
    import random

    import numpy as np

    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    compare(make_config(BASE, {"seeds": [0]}), tmp_path, ignore)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()


def test_initial_model_is_the_same_in_every_process():
    a, b = (Experiment(make_config(BASE), 0).initial_arrays() for _ in range(2))
    assert all(a[name].data == b[name].data for name in a)


def test_checkpoints_are_whole_or_refused(tmp_path):
    record = RunRecord(tmp_path / "run", {"rounds": 1})
    record.checkpoint(4, {"w": torch.ones(2)}, {"m": torch.zeros(1)})
    folder = record.finish()
    number, state, memory = read_checkpoint(folder)
    assert number == 4
    assert torch.equal(state["w"], torch.ones(2))
    assert torch.equal(memory["m"], torch.zeros(1))
    (path,) = (folder / "checkpoint").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RecordError, match="none of the 1 checkpoints"):
        read_checkpoint(folder)


@pytest.mark.study
def test_two_ray_workers_give_the_same_record(tmp_path):
    one = compare(make_config(BASE), tmp_path / "here", ignore).runs
    two = compare(make_config(BASE, {"workers": 2}), tmp_path / "ray", ignore).runs
    for first, second in zip(one, two, strict=True):
        a, b = read_checkpoint(first)[1], read_checkpoint(second)[1]
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5 * float(a[name].abs().max()))


def test_what_flower_says_of_strategies_that_do_not_judge_stays_out_of_the_progress(tmp_path, caplog):
    settings = BASE | {"methods": ["fedavg"], "rounds": 1, "seeds": [0], "evaluate_clients": False}
    caplog.handler.setLevel(0)
    flower = logging.getLogger("flwr")
    flower.addHandler(caplog.handler)
    try:
        compare(make_config(settings), tmp_path / "runs")
    finally:
        flower.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.name == "flwr"] == []
