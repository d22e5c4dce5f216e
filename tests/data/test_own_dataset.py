"""A data set that a function of the user's gives, in every form; and what its parts may be."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fedmerge.data import Dataset, PartitionSettings, load_dataset, make_partition
from fedmerge.data.own_dataset import as_dataset
from fedmerge.errors import DataError, PartitionError, UnknownName

X = torch.arange(24.0).view(12, 2)
Y = torch.arange(12) % 3


class Hub:
    """Behaves like a data set of Hugging Face's."""

    def __init__(self, rows=range(12)):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"pixels": X[self.rows[i]].numpy(), "label": int(Y[self.rows[i]])}


class Vision(TensorDataset):
    """Has labels to itself, as torchvision's have, and would rather not be read for them."""

    targets = Y.tolist()

    def __getitem__(self, i):
        if i >= 1:
            raise OSError("read")
        return super().__getitem__(i)


FORMS = {
    "Dataset": lambda: Dataset("mine", X, Y, X[:3], Y[:3], num_classes=3),
    "four arrays": lambda: (X.numpy(), Y.numpy(), X[:3].numpy(), Y[:3].numpy()),
    "two pairs": lambda: ((X, Y), (X[:3], Y[:3])),
    "two data sets": lambda: (TensorDataset(X, Y), TensorDataset(X[:3], Y[:3])),
    "DatasetDict": lambda: {"train": Hub(), "test": Hub(range(3)), "validation": Hub(range(2))},
    "mapping": lambda: {"train": (X, Y), "test": Hub(range(3)), "num_classes": 3},
}


@pytest.fixture
def mine(monkeypatch):
    module = types.ModuleType("own_data_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_examples_clients_and_labels(form, mine):
    mine.load = FORMS[form]
    found = load_dataset("own_data_of_a_test:load")
    assert (len(found.train), len(found.test), found.input_shape, found.outputs) == (12, 3, (2,), 3)
    assert found.train_labels.tolist() == Y.tolist()
    settings = PartitionSettings("pathological", clients=3, classes_per_client=1, held_out=0.25)
    partition = make_partition(found, settings, seed=1)
    for client in range(3):
        data = partition.client_data(found, client)
        x, y = next(data.train.in_order())
        assert torch.equal(x, X[partition.train[client]])
        assert set(y.tolist()) == {client}  # a client without some classes is a client
        assert next(data.held_out.in_order())[1].tolist() == [client]


def test_options_and_the_folder_reach_the_function(mine, tmp_path):
    mine.load = lambda data_dir, size=1: (X[:size], Y[:size], X, Y) if data_dir == tmp_path else None
    assert len(load_dataset("own_data_of_a_test:load", tmp_path, size=6).train) == 6
    with pytest.raises(UnknownName, match="size"):
        load_dataset("own_data_of_a_test:load", tmp_path, sise=6)


def test_clients_by_name_are_natural_clients():
    found = as_dataset("mine", {"train": Hub(), "test": Hub(), "clients": ["b", "a", "c"] * 4})
    partition = make_partition(found, PartitionSettings("natural", held_out=0), seed=0)
    assert partition.client_names == ("a", "b", "c")
    assert [rows.tolist() for rows in partition.train] == [[1, 4, 7, 10], [0, 3, 6, 9], [2, 5, 8, 11]]


def test_labels_are_taken_from_a_data_set_that_has_them_without_reading_it():
    found = as_dataset("mine", {"train": Vision(X, Y), "test": (X, Y), "num_classes": 3})
    assert found.known_labels.tolist() == found.train_labels.tolist() == Y.tolist()
    silent = as_dataset("mine", {"train": Hub(), "test": (X, Y), "num_classes": 3})
    assert silent.known_labels is None
    assert silent.train_labels.tolist() == silent.known_labels.tolist() == Y.tolist()


def test_labels_with_fractions_are_a_regression():
    found = as_dataset("mine", (X, X, X, X))
    assert (found.num_classes, found.outputs) == (0, 2)
    with pytest.raises(PartitionError, match=r"numbers to be regressed on.*iid"):
        make_partition(found, PartitionSettings("dirichlet", clients=2), seed=0)
    assert len(make_partition(found, PartitionSettings("iid", clients=2), seed=0).train) == 2


def test_several_inputs_come_as_they_are():
    inputs = {"left": X[:, :1], "right": X[:, 1:]}
    found = as_dataset("mine", {"train": (inputs, Y), "test": (inputs, Y)})
    assert set(found.example[0]) == {"left", "right"}
    (x, _), *_ = make_partition(found, PartitionSettings("iid", clients=2), 0).client_data(found, 0).train.in_order()
    assert len(x["left"]) == len(x["right"]) == 5


HOLE = X.clone()
HOLE[4, 1] = torch.nan

UNUSABLE = {
    "nothing": (None, "the function returned None: return .train, test"),
    "one part": ({"train": (X, Y)}, "returned no 'test' part"),
    "three parts": ((X, Y, X), r"return \(train, test\)"),
    "nan": ((HOLE, Y, X, Y), "training part: inputs hold NaN, in 1 of 12 examples, first in example 4"),
    "nan in the test part": ((X, Y, HOLE, Y), "test part: inputs hold NaN"),
    "empty": ((X[:0], Y[:0], X, Y), "training part: no examples"),
    "lengths": ((X[:5], Y, X, Y), "give each example a label"),
    "clients": ({"train": (X, Y), "test": (X, Y), "clients": [0, 1]}, "one int64 client number for each of the 12"),
    "columns": ({"train": (X, Y), "test": (X, Y), "columns": {"ward": [1]}}, "column 'ward': 1 values for 12"),
    "labels": ({"train": (X, Y), "test": (X, Y), "num_classes": 2}, r"labels run from 0 to 2, outside 0\.\.1"),
    "below": ((X, Y - 7, X, Y), "labels go down to -7: number classes from 0"),
    "a part of its own": ({"train": (X, Y), "test": (X, Y), "classes": 3}, "unknown part of data set .*'classes'"),
    "unread": ({"train": [0, 1], "test": (X, Y)}, "a batch is a Tensor"),
    "function": ({"train": lambda *_: [(X, Y)], "test": (X, Y), "num_classes": 3}, "cannot be divided: return a map"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_data_set_is_refused_in_words(kind, mine):
    given, words = UNUSABLE[kind]
    mine.load = lambda: given

    def load_and_divide():
        found = load_dataset("own_data_of_a_test:load")
        return make_partition(found, PartitionSettings("iid", clients=2), 0).client_data(found, 0)

    with pytest.raises((DataError, UnknownName), match=words):
        load_and_divide()


def test_a_function_that_fails_or_is_missing_is_told(mine):
    mine.load = lambda: 1 / 0
    mine.table = {}
    for name, words in (
        ("load", "the function fails .ZeroDivisionError"),
        ("gone", "no .*'gone'|has no"),
        ("table", "is a dict: name a function"),
    ):
        with pytest.raises(DataError, match=words):
            load_dataset(f"own_data_of_a_test:{name}")
    with pytest.raises(DataError, match="Run from the directory that holds the module"):
        load_dataset("no_such_module_anywhere:load")


DIVISIONS = {
    "rows": (lambda data, clients, rng: [[0, 1], np.arange(2, 12)], ("client-0", "client-1"), [2, 10]),
    "names": (lambda data, clients, rng: {"a": range(4), "b": [11]}, ("a", "b"), [4, 1]),
    "owners": (lambda data, clients, rng: data.train_labels - 1, ("client-0", "client-1"), [4, 4]),
    "drawn": (lambda data, clients, rng: np.array_split(rng.permutation(12), clients or 3), None, [4, 4, 4]),
}


@pytest.mark.parametrize("kind", DIVISIONS)
def test_a_function_divides(kind, mine):
    mine.divide, names, sizes = DIVISIONS[kind]
    found = as_dataset("mine", (X, Y, X, Y))
    settings = PartitionSettings("own_data_of_a_test:divide", held_out=0)
    partition = make_partition(found, settings, seed=3)
    assert partition.client_names == (names or partition.client_names)
    assert [len(rows) for rows in partition.train] == sizes
    again = make_partition(found, settings, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(partition.train, again.train, strict=True))
    assert type(partition).from_tensors(partition.to_tensors()).settings == settings


@pytest.mark.parametrize(
    ("divide", "words"),
    [
        (lambda *_: [[0, 1], [1]], "gave row 1 2 times"),
        (lambda *_: [[0, 12]], "gave row 12, the training examples are 0 to 11"),
        (lambda *_: [], "made no clients"),
        (lambda *_: [0, 1], "a client for 2 of 12 examples"),
        (lambda *_: [[0.5]], "whole numbers"),
        (lambda *_: 1 / 0, "the function fails .ZeroDivisionError"),
        (lambda *_: [[0], []], "'client-1' has 0 .*Have own_data_of_a_test:divide give each client more rows"),
    ],
)
def test_what_is_no_division_is_refused_in_words(divide, words, mine):
    mine.divide = divide
    with pytest.raises(PartitionError, match=words):
        make_partition(as_dataset("mine", (X, Y, X, Y)), PartitionSettings("own_data_of_a_test:divide"), seed=0)


def test_a_function_makes_as_many_clients_as_were_asked_for(mine):
    mine.divide = DIVISIONS["drawn"][0]
    found = as_dataset("mine", (X, Y, X, Y))
    assert len(make_partition(found, PartitionSettings("own_data_of_a_test:divide", clients=4), 0).train) == 4
    mine.divide = DIVISIONS["rows"][0]
    with pytest.raises(PartitionError, match="made 2 clients, 4 were asked for"):
        make_partition(found, PartitionSettings("own_data_of_a_test:divide", clients=4), 0)


def test_a_column_divides_into_its_values():
    found = as_dataset("mine", {"train": (X, Y), "test": (X, Y), "columns": {"ward": list("cab") * 4}})
    partition = make_partition(found, PartitionSettings("column", column="ward", clients=2, held_out=0), 0)
    assert partition.client_names == ("a", "b")
    assert [rows.tolist() for rows in partition.train] == [[1, 4, 7, 10], [2, 5, 8, 11]]
    bad = {
        "no such column. Columns .*: ward": {"column": "floor"},
        "it has 3 values": {"column": "ward", "clients": 4},
    }
    for words, settings in bad.items():
        with pytest.raises(PartitionError, match=words):
            make_partition(found, PartitionSettings("column", **settings), 0)


def test_a_partition_of_another_package_goes_by_its_name(monkeypatch):
    from fedmerge import registry

    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry.register("every_other", kind="partition")(
        lambda dataset, clients, generator, first=0: [range(first, 12, 2)]
    )
    settings = PartitionSettings("every_other", options={"first": 1}, held_out=0)
    partition = make_partition(as_dataset("mine", (X, Y, X, Y)), settings, 0)
    assert partition.train[0].tolist() == [1, 3, 5, 7, 9, 11]
    with pytest.raises(UnknownName, match="module:function"):
        PartitionSettings("every_othr")


def test_flipped_labels_want_classes():
    from fedmerge.data import ClientData
    from fedmerge.errors import ConfigError
    from fedmerge.simulation.scenarios.attacks import LabelFlip

    with pytest.raises(ConfigError, match="these labels are numbers"):
        LabelFlip().poisoned(ClientData(X, X), 0, np.random.default_rng(0))
