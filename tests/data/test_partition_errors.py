from __future__ import annotations

import sys

import pytest
import torch

from fedmerge.data import Dataset, PartitionSettings, make_partition
from fedmerge.errors import DataError, InvalidOption, PartitionError


@pytest.fixture
def lopsided() -> Dataset:
    """Sixty examples of class 0, two of class 1."""
    x, y = torch.zeros(62, 1), torch.tensor([0] * 60 + [1] * 2)
    return Dataset("lopsided", x, y, x, y, num_classes=2)


@pytest.mark.parametrize("seed", [-1, 1.5, None])
def test_seed_must_be_a_number_from_zero(seed, digits):
    with pytest.raises(InvalidOption, match="seed="):
        make_partition(digits, PartitionSettings(), seed)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "pathological", "shard", "quantity"])
def test_more_clients_than_examples(scheme, digits):
    with pytest.raises(PartitionError, match=r"'digits'.*clients=1438.*1437 training examples.*fewer clients"):
        make_partition(digits, PartitionSettings(scheme, clients=1438), seed=0)


def test_dirichlet_that_cannot_reach_min_examples(digits):
    settings = PartitionSettings(clients=50, alpha=0.01, min_examples=20)
    with pytest.raises(PartitionError, match=r"alpha=0\.01.*larger alpha, fewer clients, a smaller min_examples"):
        make_partition(digits, settings, seed=0)


def test_too_many_classes_per_client(digits):
    with pytest.raises(PartitionError, match=r"classes_per_client=11.*only 10 classes"):
        make_partition(digits, PartitionSettings("pathological", classes_per_client=11), seed=0)


def test_class_with_too_few_examples_for_its_clients(lopsided):
    settings = PartitionSettings("pathological", clients=5, classes_per_client=2)
    with pytest.raises(PartitionError, match=r"Label: 1 .*fewer clients, another classes_per_client"):
        make_partition(lopsided, settings, seed=0)


def test_more_shards_than_examples(lopsided):
    settings = PartitionSettings("shard", clients=40, shards_per_client=2)
    with pytest.raises(PartitionError, match=r"shards_per_client=2 take more shards than the 62.*fewer clients"):
        make_partition(lopsided, settings, seed=0)


def test_short_clients_are_named_with_their_counts(text_set):
    settings = PartitionSettings("natural", clients=None, min_examples=4, held_out=0.2)
    with pytest.raises(PartitionError) as caught:
        make_partition(text_set, settings, seed=7)
    message = str(caught.value)
    assert "2 of 3 clients have fewer than min_examples=4" in message
    assert "'second' has 3, 'third' has 1" in message
    assert "'first'" not in message
    assert "seed 7" in message
    assert "smaller min_examples" in message


def test_a_long_list_of_short_clients_is_cut(digits):
    with pytest.raises(PartitionError, match="and 5 more"):
        make_partition(digits, PartitionSettings("iid", clients=10, min_examples=500), seed=0)


def test_natural_client_without_examples_is_named():
    x, y = torch.zeros(4, 1), torch.tensor([0, 1, 0, 1])
    client = torch.tensor([0, 2, 2, 0])
    data = Dataset("gap", x, y, x, y, 2, train_client=client, client_names=("a", "b", "c"))
    with pytest.raises(PartitionError, match=r"1 of 3 clients.*'b' has 0"):
        make_partition(data, PartitionSettings("natural", clients=None), seed=0)


def test_quantity_with_more_min_examples_than_there_are(digits):
    settings = PartitionSettings("quantity", clients=10, min_examples=150)
    with pytest.raises(PartitionError, match=r"1437 examples are too few.*smaller min_examples"):
        make_partition(digits, settings, seed=0)


def test_natural_without_natural_clients(digits):
    with pytest.raises(PartitionError, match=r"'digits'.*no natural clients.*heart_disease, shakespeare"):
        make_partition(digits, PartitionSettings("natural"), seed=0)


def test_more_natural_clients_than_there_are(text_set):
    with pytest.raises(PartitionError, match="clients=4, but it has 3 natural clients"):
        make_partition(text_set, PartitionSettings("natural", clients=4), seed=0)


@pytest.mark.parametrize("scheme", ["dirichlet", "pathological", "shard"])
def test_label_schemes_refuse_sequences_of_labels(scheme, text_set):
    with pytest.raises(PartitionError, match=f"{scheme}.*each example has 4 labels.*natural, iid or quantity"):
        make_partition(text_set, PartitionSettings(scheme, clients=2), seed=0)


def test_missing_library_says_what_to_install(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(DataError, match=r'pip install "fedmerge\[sim\]"'):
        make_partition(digits, PartitionSettings(), seed=0)
