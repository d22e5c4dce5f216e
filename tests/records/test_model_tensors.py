"""Tensors of a model in one file, in shards with an index, under other names."""

from __future__ import annotations

import json

import pytest
import torch

from fedmerge.errors import InvalidOption, ModelError, UnknownName
from fedmerge.records.atomic_files import write_tensors
from fedmerge.records.model_tensors import digest, read_metadata, read_state, renamed


@pytest.fixture
def index(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"w": torch.arange(6.0).view(2, 3), "unlisted": torch.zeros(1)})
    write_tensors(tmp_path / "b.safetensors", {"b": torch.ones(2)})
    file = tmp_path / "model.safetensors.index.json"
    _write(file, {"w": "a.safetensors", "b": "b.safetensors"})
    return file


def _write(file, shard_of):
    file.write_text(json.dumps({"metadata": {"total_size": 32, "made_by": "test"}, "weight_map": shard_of}))


def test_shards_are_read_as_one_state_with_what_the_index_lists(index):
    state = read_state(index)
    assert sorted(state) == ["b", "w"]
    assert state["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_metadata(index) == {"made_by": "test"}


def test_a_shard_outside_of_the_folder_is_not_read(index):
    write_tensors(index.parent.parent / "other.safetensors", {"w": torch.zeros(1)})
    _write(index, {"w": "../other.safetensors"})
    with pytest.raises(ModelError, match="name of a file beside it"):
        read_state(index)


@pytest.mark.parametrize(
    ("shard_of", "words"),
    [({"w": "c.safetensors"}, "there is no file"), ({"v": "a.safetensors"}, "lacks 'v'"), ({}, "no index")],
)
def test_an_index_that_promises_what_is_not_there_is_refused(index, shard_of, words):
    _write(index, shard_of)
    with pytest.raises(ModelError, match=words):
        read_state(index)


def test_the_digest_of_an_index_changes_with_a_shard(index):
    before = digest(index)
    assert digest(index) == before
    write_tensors(index.parent / "b.safetensors", {"b": torch.zeros(2)})
    assert digest(index) != before


def test_the_longest_beginning_is_replaced():
    state = {"model.body.w": torch.zeros(1), "model.head.w": torch.zeros(1)}
    assert list(renamed(state, {"model.": "", "model.head.": "classifier."}, "file")) == ["body.w", "classifier.w"]
    assert list(renamed(state, {"": "net."}, "file")) == ["net.model.body.w", "net.model.head.w"]


def test_beginnings_that_fit_nothing_or_make_names_alike_are_refused():
    state = {"a.w": torch.zeros(1), "b.w": torch.zeros(1)}
    with pytest.raises(UnknownName, match=r"'module\.'"):
        renamed(state, {"module.": ""}, "file")
    with pytest.raises(InvalidOption, match=r"named 'w'"):
        renamed(state, {"a.": "", "b.": ""}, "file")
