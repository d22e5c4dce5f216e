"""Damaged files of every kind are read whole or refused by a typed error, in little time and memory."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from fedmerge.data import PartitionSettings, load_dataset
from fedmerge.data.partition import Partition, make_partition
from fedmerge.models import build_model
from fedmerge.offline.merge_files import merge_files
from fedmerge.offline.model_files import read_inputs
from fedmerge.plotting.runs import read_runs
from fedmerge.records.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from fedmerge.records.model_tensors import read_state
from fedmerge.records.run_records import RunRecord
from fedmerge.simulation.runs.snapshot import restore
from tests.answered import asked
from tests.fuzz.damage import EDITS, changed_settings, damaged
from tests.fuzz.damaged_files import FILES, FORGERIES, dumped, partitions
from tests.fuzz.survey import survey, tries
from tests.hostile.kinds import STATES, draws, kinds

MODEL = build_model("mlp", (1, 8, 8), 10, seed=0).state_dict()
WHOLE = save(MODEL)


def both(fates):
    """Whether damage does what it should: some does no harm, some is told."""
    return bool(fates["fine"] and fates["typed"])


@tries(100, 12_000)
def test_a_file_of_a_model(tmp_path, tried):
    path = tmp_path / "damaged.safetensors"

    def read(change):
        path.write_bytes(change(WHOLE))
        read_state(path)

    assert both(survey(read, FILES, tried))


@tries(40, 4000)
def test_a_file_of_inputs(tmp_path, tried):
    path, inputs = tmp_path / "damaged.safetensors", save({"inputs": torch.zeros(3, 1, 8, 8)})

    def read(change):
        path.write_bytes(change(inputs))
        read_inputs(path)

    assert survey(read, FILES, tried)["typed"]


@tries(20, 2000)
def test_a_file_that_is_merged_with_a_good_one(tmp_path, tried):
    good, path = tmp_path / "good.safetensors", tmp_path / "damaged.safetensors"
    good.write_bytes(WHOLE)

    def merge(change):
        path.write_bytes(change(WHOLE))
        merge_files([good, path], tmp_path / "out.safetensors", model="mlp", input_shape=(1, 8, 8))

    assert survey(merge, FILES, tried)["typed"]


@tries(40, 2000)
def test_a_whole_file_with_the_model_of_a_hostile_client(tmp_path, tried):
    path = tmp_path / "hostile.safetensors"

    def read(drawn):
        kind, rng = drawn
        state = kind(rng, MODEL, MODEL) or MODEL
        path.write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}))
        read_state(path)

    assert survey(read, st.tuples(kinds(STATES), draws()), tried)["fine"]


@pytest.fixture
def begun(tmp_path):
    """A run with a round and a checkpoint, and the path of that."""
    run = RunRecord(tmp_path / "run", {"rounds": 3})
    run.append({"round": 0})
    state = {"w": torch.ones(3), "b": torch.zeros(())}
    run.checkpoint(1, state, {"m": torch.ones(2)}, facts={"random": [1], "strategy": {"dict": []}})
    return next((tmp_path / "run.partial" / "checkpoint").iterdir())


FACTS = {"config": {"rounds": 3}, "position": 13, "random": [1], "strategy": {"dict": []}}
CHECKPOINTS = EDITS | st.tuples(changed_settings(FACTS, "clients", "engine"), FORGERIES)


def forged(path, drawn) -> bytes:
    """A checkpoint with other bytes, or with other facts and a digest that fits."""
    if isinstance(drawn, list):
        return damaged(path.read_bytes(), drawn)
    changes, forgery = drawn
    state = {"state": {"w": torch.ones(3), "b": torch.zeros(())}}
    return forgery(save_checkpoint(path.parent, Checkpoint(1, state, damaged(FACTS, changes))).read_bytes())


@tries(60, 5000)
def test_a_checkpoint_of_which_a_run_is_restored(begun, tried):
    strategy, whole = asked("fedavg").strategy, begun.read_bytes()

    def resume(drawn):
        begun.write_bytes(whole)
        begun.write_bytes(forged(begun, drawn))
        restore(load_checkpoint(begun), strategy, None)

    assert survey(resume, CHECKPOINTS, tried)["typed"]


@tries(60, 5000)
def test_a_checkpoint_of_a_record_that_is_opened_again(tmp_path, begun, tried):
    whole = begun.read_bytes()

    def reopen(drawn):
        begun.write_bytes(whole)
        begun.write_bytes(forged(begun, drawn))
        (tmp_path / "run.partial" / "rounds.jsonl").write_bytes(b'{"round": 0}\n')
        RunRecord.reopen(tmp_path / "run", {"rounds": 3})

    assert both(survey(reopen, CHECKPOINTS, tried))


ROW = {"method": "fedavg", "seed": 0, "round": 0, "clients_ok": 3, "clients_failed": 0, "bytes_down": 5,
       "bytes_up": 5, "parameters": 9, "seconds_train": 0.1, "seconds_merge": 0.1, "seconds_evaluate": 0.1,
       "test_loss": 1.0, "test_accuracy": 0.5, "train_loss": None}  # fmt: skip


@tries(70, 12_000)
def test_rows_of_a_run(tmp_path, tried):
    path = tmp_path / "drawn" / "rounds.jsonl"
    path.parent.mkdir()

    def draw(drawn):
        changes, end, edits = drawn
        rows = [dumped(ROW), dumped(damaged({**ROW, "round": 1}, changes))]
        path.write_bytes(damaged(b"\n".join(rows) + end, edits))
        read_runs([path.parent])

    ends = st.sampled_from((b"\n", b"", b"[" * 5000))
    assert both(survey(draw, st.tuples(changed_settings(ROW), ends, st.just([]) | EDITS), tried))


@tries(80, 2500)
def test_a_partition_and_a_data_set_that_is_read_by_what_came_out(tried):
    dataset = load_dataset("digits")
    tensors = make_partition(dataset, PartitionSettings("iid", clients=4), 0).to_tensors()
    facts = changed_settings(json.loads(bytes(tensors["about"].tolist())), "settings")

    def read(changes):
        partition = Partition.from_tensors(damaged(tensors, changes))
        for client in range(min(3, len(partition.train))):
            partition.client_data(dataset, client)

    assert both(survey(read, partitions(facts), tried))


def mnist():
    images = struct.pack(">IIII", 2051, 6, 28, 28) + bytes(6 * 784)
    labels = struct.pack(">II", 2049, 6) + bytes(range(6))
    return {f"{part}-{kind}-ubyte": content for part in ("train", "t10k")
            for kind, content in (("images-idx3", images), ("labels-idx1", labels))}  # fmt: skip


def heart_disease():
    table = io.BytesIO()
    np.savetxt(table, np.random.default_rng(0).integers(0, 2, (12, 14)), delimiter=",", fmt="%d")
    return {f"processed.{name}.data": table.getvalue() for name in ("cleveland", "hungarian", "switzerland", "va")}


def shakespeare():
    return {"tinyshakespeare.txt": b"All:\nSpeak, speak.\n\nFirst:\nYou are all resolved rather to die.\n" * 20}


@tries(10, 400)
@pytest.mark.parametrize(
    ("name", "folder", "whole"),
    [
        ("mnist", "MNIST/raw", mnist()),
        ("heart_disease", "heart-disease", heart_disease()),
        ("shakespeare", "shakespeare", shakespeare()),
    ],
    ids=["mnist", "heart_disease", "shakespeare"],
)
def test_files_of_a_data_set(name, folder, whole, tmp_path, tried):
    (tmp_path / folder).mkdir(parents=True)

    def load(drawn):
        victim, changes = drawn
        for file, content in whole.items():
            (tmp_path / folder / file).write_bytes(damaged(content, changes) if file == victim else content)
        load_dataset(name, tmp_path)

    assert survey(load, st.tuples(st.sampled_from(sorted(whole)), EDITS), tried)
