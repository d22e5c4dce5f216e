from __future__ import annotations

import pytest
import torch

from fedmerge.data import ClientData, Dataset
from fedmerge.errors import DataError


def build(**changes):
    fields = {
        "name": "toy",
        "train_x": torch.zeros(4, 3, 2),
        "train_y": torch.tensor([0, 1, 2, 0]),
        "test_x": torch.zeros(2, 3, 2),
        "test_y": torch.tensor([0, 1]),
        "num_classes": 3,
    }
    return Dataset(**{**fields, **changes})


def test_input_shape_is_that_of_one_example():
    assert build().input_shape == (3, 2)


def test_repr_has_sizes_and_no_tensors():
    assert repr(build()) == ("Dataset('toy', train=4, test=2, input_shape=(3, 2), num_classes=3, natural_clients=0)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_y": torch.tensor([0, 1])}, "training part: inputs have shape \\[4, 3, 2\\], labels \\[2\\]"),
        ({"test_x": torch.zeros(0, 3, 2), "test_y": torch.tensor([]).long()}, "test part: no examples"),
        ({"train_y": torch.zeros(4)}, "labels are torch.float32"),
        ({"num_classes": 2}, r"training part: labels run from 0 to 2, outside 0\.\.1"),
        ({"test_y": torch.tensor([-1, 0])}, "test part: labels run from -1"),
        ({"train_client": torch.tensor([0, 1]), "client_names": ("a", "b")}, r"shape \[2\]"),
        ({"train_client": torch.tensor([0, 1, 2, 0]), "client_names": ("a", "b")}, "client_names has 2"),
        ({"train_client": torch.zeros(4), "client_names": ("a",)}, "torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(DataError, match=message) as caught:
        build(**changes)
    assert "'toy'" in str(caught.value)


def test_length_of_client_data_is_its_training_part():
    x, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
    assert len(ClientData(x[:3], y[:3], x[3:], y[3:])) == 3
