"""Checkpoints on disk: whole, in order, or refused."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import InvalidOption, RecordError
from fedmerge.records.checkpoints import (
    Checkpoint,
    checkpoint_files,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from fedmerge.records.run_records import RunRecord, read_checkpoint

STATE = {
    "z.weight": torch.arange(6.0).reshape(2, 3),
    "a.scalar": torch.tensor(3, dtype=torch.int64),
    "m.half": torch.ones(2, dtype=torch.bfloat16),
}


def sample(round=1, **facts):
    return Checkpoint(round, {"state": STATE, "memory": {"v": torch.zeros(2, dtype=torch.float64)}}, facts)


def test_what_is_read_is_what_was_saved_in_its_order(tmp_path):
    found = load_checkpoint(
        save_checkpoint(tmp_path, sample(7, random=[1, 2.5, None, float("inf")], text='"digest":"'))
    )
    assert found.round == 7
    assert found.facts == {"random": [1, 2.5, None, float("inf")], "text": '"digest":"'}
    assert list(found.section("state")) == ["z.weight", "a.scalar", "m.half"]
    for name, tensor in STATE.items():
        assert found.section("state")[name].dtype == tensor.dtype
        assert found.section("state")[name].shape == tensor.shape
        assert torch.equal(found.section("state")[name], tensor)
    assert found.section("memory")["v"].dtype == torch.float64
    assert found.section("clients") == {}


def test_tied_and_strided_tensors_are_kept(tmp_path):
    tied = torch.arange(6.0)
    state = {"a": tied, "b": tied, "view": tied[2:], "transposed": tied.reshape(2, 3).T}
    found = load_checkpoint(save_checkpoint(tmp_path, Checkpoint(0, {"state": state}))).section("state")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_the_last_ones_stay(tmp_path):
    for number in range(6):
        save_checkpoint(tmp_path, sample(number), keep=2)
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "round-000004.safetensors",
        "round-000005.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in checkpoint_files(tmp_path)]
    with pytest.raises(InvalidOption, match="at least 1"):
        save_checkpoint(tmp_path, sample(6), keep=0)


def test_a_damaged_newer_one_does_not_push_a_whole_one_out(tmp_path):
    (tmp_path / "round-000009.safetensors").write_bytes(b"broken")
    save_checkpoint(tmp_path, sample(4), keep=1)
    assert newest_checkpoint(tmp_path).round == 4


FILE = {}


@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(tmp_path_factory, place, flip):
    if not FILE:
        folder = tmp_path_factory.mktemp("edited")
        FILE["content"] = save_checkpoint(folder, sample(note="text")).read_bytes()
        FILE["path"] = folder / "edited.safetensors"
    content = bytearray(FILE["content"])
    content[place % len(content)] ^= flip
    FILE["path"].write_bytes(content)
    with pytest.raises(RecordError, match=r"edited\.safetensors"):
        load_checkpoint(FILE["path"])


def test_any_truncation_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, sample())
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(RecordError):
            load_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(RecordError, match="truncated or edited"):
        load_checkpoint(path)


def test_the_one_before_is_used_with_a_warning_that_names_the_file(tmp_path, caplog):
    for number in (1, 2, 3):
        path = save_checkpoint(tmp_path, sample(number))
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "fedmerge"):
        assert newest_checkpoint(tmp_path).round == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "round-000003.safetensors" in caplog.text


def test_none_at_all_is_no_error_and_none_whole_is_one(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for number in (1, 2):
        save_checkpoint(tmp_path, sample(number)).write_bytes(b"")
    with pytest.raises(RecordError, match=r"none of the 2 checkpoints in .*restore one from a backup, or delete"):
        newest_checkpoint(tmp_path)


def test_half_written_files_are_not_checkpoints(tmp_path):
    save_checkpoint(tmp_path, sample(1))
    (tmp_path / "round-000002.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "round-two.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path).round == 1


CONFIG = {"rounds": 3, "workers": 1, "training": {"epochs": 1}}


def record_with(tmp_path, rounds):
    record = RunRecord(tmp_path / "run", CONFIG)
    for number in range(rounds):
        record.append({"round": number})
        record.checkpoint(number, STATE, {})
    return record


@pytest.mark.parametrize("beyond", [b"", b'{"rou', b'{"round": 3}\n', b'{"round": 3}\n{"round'])
def test_rows_beyond_the_checkpoint_are_dropped(tmp_path, beyond):
    record = record_with(tmp_path, 3)
    rows = record.partial / "rounds.jsonl"
    before = rows.read_bytes()
    rows.write_bytes(before + beyond)
    again, checkpoint = RunRecord.reopen(tmp_path / "run", CONFIG)
    assert checkpoint.round == 2
    assert rows.read_bytes() == before
    again.append({"round": 3})
    assert again.finish().joinpath("rounds.jsonl").read_bytes() == before + b'{"round": 3}\n'


def test_rows_that_are_missing_lead_to_the_checkpoint_that_knows_them(tmp_path, caplog):
    record = record_with(tmp_path, 3)
    rows = record.partial / "rounds.jsonl"
    rows.write_bytes(rows.read_bytes()[:-4])
    _, checkpoint = RunRecord.reopen(tmp_path / "run", CONFIG)
    assert checkpoint.round == 1
    assert rows.read_bytes() == b'{"round": 0}\n{"round": 1}\n'
    assert "lacks rows" in caplog.text


def test_a_run_killed_before_its_first_checkpoint_is_new(tmp_path):
    record = RunRecord(tmp_path / "run", CONFIG)
    record.append({"round": 0})
    again, checkpoint = RunRecord.reopen(tmp_path / "run", CONFIG)
    assert checkpoint is None
    assert not (again.partial / "rounds.jsonl").exists()


def test_another_configuration_is_refused_and_another_number_of_workers_is_not(tmp_path):
    record_with(tmp_path, 2)
    with pytest.raises(RecordError, match=r"differs in training\.epochs.*restore its config\.toml, or delete"):
        RunRecord.reopen(tmp_path / "run", {**CONFIG, "training": {"epochs": 2}})
    assert RunRecord.reopen(tmp_path / "run", {**CONFIG, "workers": 2})[1].round == 1


@pytest.mark.parametrize("moment", ["before", "old moved away", "new in place"])
def test_a_kill_while_the_record_is_put_in_place_loses_nothing(tmp_path, moment):
    """A run that replaces a record of before, killed between any two renames."""
    folder, old = tmp_path / "run", tmp_path / "run.old"
    folder.mkdir()
    (folder / "rounds.jsonl").write_bytes(b"before\n")
    record = record_with(tmp_path, 2)
    if moment != "before":
        folder.rename(old)
    if moment == "new in place":
        record.partial.rename(folder)
        record = record_with(tmp_path, 2)  # and the next run finds what is left
    else:
        record, _ = RunRecord.reopen(folder, CONFIG)
    assert record.finish() == folder
    assert (folder / "rounds.jsonl").read_bytes() == b'{"round": 0}\n{"round": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert read_checkpoint(folder)[0] == 1
