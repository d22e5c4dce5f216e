"""Clients of disjoint groups of classes."""

from __future__ import annotations

import json

import pytest
import torch

from fedmerge.data import Dataset, Partition, PartitionSettings, make_partition
from fedmerge.errors import InvalidOption, PartitionError


def toy(classes=6, n=120):
    labels = torch.arange(n) % classes
    return Dataset("toy", torch.zeros(n, 1), labels, torch.zeros(6, 1), labels[:6], num_classes=classes)


def counts(data=None, **settings):
    data = data or toy()
    partition = make_partition(data, PartitionSettings("by_class_groups", held_out=0.0, **settings), 0)
    return partition.label_counts(data.train_y, data.num_classes).tolist()


def test_classes_are_cut_in_order_and_a_group_s_clients_share_its_examples():
    assert counts(groups=2, clients=2) == [[20, 20, 20, 0, 0, 0], [0, 0, 0, 20, 20, 20]]
    shared = torch.tensor(counts(groups=4, clients=8))
    assert shared.sum(0).tolist() == [20] * 6
    assert [row.nonzero().flatten().tolist() for row in shared[:4]] == [[0, 1], [2, 3], [4], [5]]
    assert (shared[:4] > 0).equal(shared[4:] > 0)
    assert shared.sum(1).tolist() == [20, 20, 10, 10, 20, 20, 10, 10]


def test_groups_may_be_told_and_leave_classes_out():
    found = counts(groups=[[5, 0], [2]])
    assert found == [[20, 0, 0, 0, 0, 20], [0, 0, 20, 0, 0, 0]]  # a client for each group


def test_without_groups_each_client_has_its_own():
    assert counts(clients=3) == [[20, 20, 0, 0, 0, 0], [0, 0, 20, 20, 0, 0], [0, 0, 0, 0, 20, 20]]
    assert torch.tensor(counts(clients=12)).gt(0).sum(1).tolist() == [1] * 12


@pytest.mark.parametrize("groups", [0, True, "two", [], [[]], [[0], [0, 1]], [[-1]], [[1.5]], [0, 1]])
def test_groups_that_are_none_are_refused(groups):
    with pytest.raises(InvalidOption, match="groups="):
        PartitionSettings("by_class_groups", groups=groups)


def test_groups_are_for_their_scheme():
    with pytest.raises(InvalidOption, match="by_class_groups"):
        PartitionSettings("iid", groups=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": 7, "clients": 7}, "more than the 6 classes"),
        ({"groups": 3, "clients": 2}, "want a client each"),
        ({"groups": [[0], [9]]}, "class 9, of which there is no example"),
    ],
)
def test_groups_that_the_data_do_not_have_are_refused(settings, words):
    with pytest.raises(PartitionError, match=words):
        counts(**settings)


def test_settings_survive_a_record():
    partition = make_partition(toy(), PartitionSettings("by_class_groups", groups=[[0, 1], [2]]), 1)
    again = Partition.from_tensors(partition.to_tensors())
    assert again.settings == partition.settings
    assert again.settings.groups == ((0, 1), (2,))
    assert json.loads(bytes(partition.to_tensors()["about"].tolist()))["settings"]["groups"] == [[0, 1], [2]]
