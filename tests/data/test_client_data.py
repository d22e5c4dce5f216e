"""What a client's examples may be: converted where it is certain what they mean, refused in words otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge.data import ClientData
from fedmerge.data.client_data import client_data
from fedmerge.data.example_sets import checked_examples
from fedmerge.errors import DataError
from fedmerge.simulation.scenarios.attacks import LabelFlip

X = torch.arange(12.0).view(4, 3)
Y = torch.tensor([0, 2, 1, 0])


def held(x, y):
    return ClientData(x, y, x[:0], y[:0])


@pytest.mark.parametrize(
    "labels",
    [
        Y.int(), Y.to(torch.uint8), Y.short(), Y[:, None], Y[:, None, None].int(), Y.numpy(),
        Y.numpy().astype(np.uint16), Y.numpy()[:, None], Y.numpy()[::-1].copy()[::-1],
    ],
)  # fmt: skip
def test_class_numbers_of_any_whole_type_become_int64(labels):
    found = held(X, labels)
    assert found.train_y.dtype == found.held_out_y.dtype == torch.int64
    assert torch.equal(found.train_y, Y)


def test_booleans_are_two_classes():
    assert held(X, Y > 0).train_y.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [
        (X.double().numpy(), torch.float32), (X.numpy(), torch.float32), (X.numpy().astype(np.float16), torch.float16),
        (X.double(), torch.float64), (X.numpy().astype(np.int32), torch.int32), (X.numpy()[:, ::-1], torch.float32),
    ],
)  # fmt: skip
def test_arrays_become_tensors(inputs, dtype):
    found = held(inputs, Y).train_x
    assert found.dtype == dtype
    assert np.array_equal(found.numpy(), np.asarray(inputs).astype(found.numpy().dtype))


def test_an_array_that_must_not_be_written_to_is_copied():
    array = X.numpy().copy()
    array.flags.writeable = False
    found = held(array, Y).train_x
    found[0, 0] = 9.0
    assert array[0, 0] == 0


def test_tensors_of_the_right_kind_are_not_copied():
    found = held(X, Y)
    assert found.train_x is X
    assert found.train_y is Y


@pytest.mark.parametrize("x", [torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 1, 6)])
def test_labels_of_sequences_of_length_one_keep_their_axis(x):
    assert held(x, Y[:, None]).train_y.shape == (4, 1)


@pytest.mark.parametrize("x", [X, torch.zeros(4, 1, 8, 8), torch.zeros(4, 32, 32, 3)])
def test_labels_in_a_column_lose_it(x):
    assert held(x, Y[:, None]).train_y.shape == (4,)


def test_fractions_stay_for_whoever_has_a_loss_for_them():
    assert held(X, X).train_y is X


def with_hole(value):
    x = X.clone()
    x[2, 1] = value
    return x


BAD = {
    "lengths": (X, Y[:3], r"\[4, 3\], labels \[3\].*each example a label"),
    "no axis": (X, torch.tensor(1), "each example a label"),
    "nan": (with_hole(torch.nan), Y, "NaN, in 1 of 4 examples, first in example 2"),
    "infinite": (with_hole(-torch.inf), Y, "infinite values, in 1 of 4 examples, first in example 2"),
    "nan in an array": (with_hole(torch.nan).numpy(), Y, "NaN"),
    "nan labels": (X, with_hole(torch.nan), "labels hold NaN"),
    "list": (X.tolist(), Y, "inputs are a list: pass a tensor"),
    "lists in a dict": ({"x": X.tolist()}, Y, "inputs 'x' are a list"),
    "text": (X, np.array(["a", "b", "a", "b"]), "array of <U1: pass numbers"),
    "objects": (X, np.array([1, None, 2, 3], dtype=object), "array of object"),
    "complex": (X, Y * 1j, "complex"),
    "sparse": (X.to_sparse(), Y, "to_dense"),
}


@pytest.mark.parametrize("kind", BAD)
def test_the_rest_is_refused_in_words(kind):
    x, y, words = BAD[kind]
    with pytest.raises(DataError, match=words):
        checked_examples(x, y)
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    for part, given in (("training", (x, y, *empty)), ("held-out", (*empty, x, y))):
        with pytest.raises(DataError, match=f"{part} examples: .*{words}"):
            ClientData(*given)
        with pytest.raises(DataError, match="client 7: "):
            client_data(lambda _, __, given=given: ClientData(*given), 7, 9)


@pytest.mark.parametrize("found", [None, (X, Y), {"x": X}, torch.utils.data.DataLoader([1])])
def test_what_is_no_client_data_is_refused_with_the_client(found):
    with pytest.raises(DataError, match=f"client 3: data_fn returned a {type(found).__name__}: return fedmerge.data"):
        client_data(lambda *_: found, 3, 4)


def test_errors_of_ones_own_pass():
    def fail(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        client_data(fail, 0, 1)


def test_flipped_labels_leave_padding_alone():
    data = held(X, torch.tensor([[0, -100], [2, 1], [1, -100], [0, 0]]))
    assert LabelFlip().poisoned(data, 3, np.random.default_rng(0)).train_y.tolist() == [
        [2, -100],
        [0, 1],
        [1, -100],
        [2, 2],
    ]
