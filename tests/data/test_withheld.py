"""Examples that a base was trained on: drawn by the seed, told in its file, given to no client."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedmerge.data import Dataset, PartitionSettings, make_partition
from fedmerge.data.withheld import KEY, base_metadata, rows_for_base, withheld_rows
from fedmerge.errors import ConfigError, InvalidOption, ModelError, PartitionError


def toy(n=40, name="toy", shift=0, **more):
    labels = (torch.arange(n) + shift) % 4
    return Dataset(name, torch.arange(n * 2.0).view(n, 2), labels, torch.zeros(4, 2), labels[:4], num_classes=4, **more)


def test_rows_are_a_share_of_all_or_of_some_classes():
    data = toy()
    rows = rows_for_base(data, 0.25, (), seed=3)
    assert len(rows) == 10
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows.equal(rows_for_base(data, 0.25, (), seed=3))
    assert not rows.equal(rows_for_base(data, 0.25, (), seed=4))
    some = rows_for_base(data, 0.5, (1, 3), seed=0)
    assert len(some) == 10
    assert set(data.train_y[some].tolist()) == {1, 3}


@pytest.mark.parametrize(
    ("share", "classes"), [(0, ()), (1.5, ()), (1.0, ()), (0.001, ()), (1.0, (7,)), (1.0, (0, 1, 2, 3))]
)
def test_a_base_that_leaves_nothing_or_wants_what_is_not_there_is_refused(share, classes):
    with pytest.raises(InvalidOption):
        rows_for_base(toy(), share, classes, seed=0)


def test_rows_come_back_from_the_metadata_for_the_same_data_alone():
    data, rows = toy(), torch.tensor([0, 7, 8, 39])
    told = base_metadata(data, rows, {"model": "mlp"})
    assert withheld_rows(told, data, "base").equal(rows)
    assert withheld_rows(told, toy(name="same data under another name"), "base").equal(rows)
    assert withheld_rows(told, toy(n=60, name="other"), "base") is None
    assert withheld_rows({}, data, "base") is None
    with pytest.raises(ConfigError, match=r"data\.withhold = false"):
        withheld_rows(told, toy(shift=1), "base")


@pytest.mark.parametrize(
    "change", [{"rows": "!"}, {"rows": ""}, {"examples": 5}, {"total": "many"}, {"labels": None, "rows": 3}]
)
def test_metadata_that_were_edited_are_refused(change):
    told = base_metadata(toy(), torch.tensor([1, 2]), {})
    with pytest.raises(ModelError, match="cannot be read"):
        withheld_rows({KEY: json.dumps({**json.loads(told[KEY]), **change})}, toy(), "base")


def _divide_odd(dataset, clients, generator):
    assert len(dataset.train) == 30  # it sees what is left alone
    return {"odd": np.arange(1, 30, 2), "even": np.arange(0, 30, 2)}


@pytest.mark.parametrize(
    "settings",
    [
        PartitionSettings("iid", clients=3),
        PartitionSettings("dirichlet", clients=2, alpha=100.0),
        PartitionSettings("natural"),
        PartitionSettings("column", column="site"),
        PartitionSettings(f"{__name__}:_divide_odd"),
    ],
    ids=lambda settings: settings.scheme,
)
def test_no_client_gets_what_is_withheld_and_all_else_is_divided(settings):
    owner = torch.arange(40) // 20
    data = toy(train_client=owner, client_names=("a", "b"), columns={"site": [f"s{i % 3}" for i in range(40)]})
    withheld = torch.arange(0, 40, 4)
    found = make_partition(data, settings, 0, withheld)
    rows = torch.cat([*found.train, *found.held_out])
    assert sorted([*rows.tolist(), *withheld.tolist()]) == list(range(40))
    if settings.scheme == "natural":
        assert all((owner[mine] == client).all() for client, mine in enumerate(found.train))
    if settings.scheme == "column":
        assert all({int(row) % 3 for row in mine} == {client} for client, mine in enumerate(found.train))


def test_data_read_batch_by_batch_are_divided_too():
    whole = toy()
    pairs = torch.utils.data.TensorDataset(*whole.train.tensors)
    data = Dataset("lazy", train_set=pairs, test_set=pairs, num_classes=4, labels=whole.train_y)
    found = make_partition(data, PartitionSettings("by_class_groups", groups=2), 0, torch.arange(10))
    assert min(int(rows.min()) for rows in found.train) == 10
    x, y = found.client_data(data, 1).train.first(3)
    assert set(y.tolist()) <= {2, 3}
    assert x[:, 0].tolist() == [2.0 * row for row in found.train[1][:3].tolist()]


def test_withholding_everything_is_refused():
    with pytest.raises(PartitionError, match="leave clients some"):
        make_partition(toy(), PartitionSettings("iid", clients=2), 0, torch.arange(40))
