from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmerge.data import Partition, PartitionSettings, make_partition
from fedmerge.errors import DataError, PartitionError, RecordError

BY_SCHEME = {
    "iid": PartitionSettings("iid"),
    "dirichlet": PartitionSettings("dirichlet"),
    "pathological": PartitionSettings("pathological"),
    "shard": PartitionSettings("shard"),
    "quantity": PartitionSettings("quantity", alpha=1.0),
}
every_scheme = pytest.mark.parametrize("settings", BY_SCHEME.values(), ids=BY_SCHEME)


def same(first, second):
    return first.client_names == second.client_names and all(
        len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in ((first.train, second.train), (first.held_out, second.held_out))
    )


def rows_of(partition):
    return torch.cat([*partition.train, *partition.held_out])


def label_shares(partition, dataset):
    counts = partition.label_counts(dataset.train_y, dataset.num_classes).double()
    return counts / counts.sum(1, keepdim=True)


@every_scheme
@pytest.mark.parametrize("held_out", [0.0, 0.1])
def test_same_seed_same_partition_other_seed_another(settings, held_out, digits):
    settings = replace(settings, held_out=held_out)
    partition = make_partition(digits, settings, seed=5)
    assert same(partition, make_partition(digits, settings, seed=5))
    assert not same(partition, make_partition(digits, settings, seed=6))


@every_scheme
def test_no_row_twice_and_almost_all_used(settings, digits):
    rows = rows_of(make_partition(digits, settings, seed=0))
    assert len(rows.unique()) == len(rows)
    # Shards are of equal size: what is left over by the division stays unused.
    unused = len(digits.train_y) % 20 if settings.scheme == "shard" else 0
    assert len(rows) == len(digits.train_y) - unused


@every_scheme
def test_rows_are_sorted_int64_and_clients_named(settings, digits):
    partition = make_partition(digits, settings, seed=0)
    assert len(partition.train) == len(partition.held_out) == len(partition.client_names) == 10
    assert len(set(partition.client_names)) == 10
    for rows in (*partition.train, *partition.held_out):
        assert rows.dtype == torch.int64
        assert (rows.diff() > 0).all()


@every_scheme
@pytest.mark.parametrize("held_out", [0.0, 0.1, 0.5])
def test_held_out_share_of_each_client(settings, held_out, digits):
    partition = make_partition(digits, replace(settings, held_out=held_out), seed=1)
    for train, tested in zip(partition.train, partition.held_out, strict=True):
        assert len(train) >= 1
        assert len(tested) == min(round(held_out * (len(train) + len(tested))), len(train) + len(tested) - 1)


def test_held_out_is_a_random_choice(digits):
    settings = PartitionSettings("iid", clients=1, held_out=0.5)
    partition = make_partition(digits, settings, seed=0)
    middle = len(digits.train_y) / 2
    assert 0.4 < (partition.held_out[0] < middle).float().mean() < 0.6


@every_scheme
def test_global_generators_are_left_alone(settings, digits):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    first = make_partition(digits, settings, seed=0)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after
    random.seed(2), np.random.seed(2), torch.manual_seed(2)  # noqa: NPY002
    assert same(first, make_partition(digits, settings, seed=0))


@every_scheme
def test_nothing_is_printed_and_the_bars_of_others_stay(settings, digits, capfd):
    import datasets

    datasets.enable_progress_bars()
    make_partition(digits, settings, seed=0)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_natural_clients_and_repeated_draws_are_quiet_too(text_set, digits, capfd, recwarn):
    make_partition(text_set, PartitionSettings("natural", clients=None), seed=0)
    with pytest.raises(PartitionError):
        make_partition(digits, PartitionSettings(clients=50, alpha=0.01, min_examples=20), seed=0)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize("scheme", ["dirichlet", "quantity"])
def test_another_seed_draws_other_shares(scheme, digits):
    def sizes(seed):
        return sorted(len(rows) for rows in make_partition(digits, PartitionSettings(scheme), seed).train)

    assert sizes(0) != sizes(1)


def test_iid_is_even_and_representative(digits):
    partition = make_partition(digits, PartitionSettings("iid", clients=4, held_out=0.0), seed=0)
    assert {len(rows) for rows in partition.train} <= {359, 360}
    assert label_shares(partition, digits).max() < 0.16


def test_smaller_alpha_is_more_skewed(digits):
    def skew(alpha):
        settings = PartitionSettings(alpha=alpha, clients=5)
        return np.mean(
            [label_shares(make_partition(digits, settings, s), digits).max(1).values.mean() for s in range(3)]
        )

    extreme, usual, mild = skew(0.05), skew(0.5), skew(100.0)
    assert extreme > usual + 0.15
    assert usual > mild + 0.1
    assert mild < 0.2


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_pathological_clients_have_so_many_classes(classes, digits):
    settings = PartitionSettings("pathological", clients=12, classes_per_client=classes, held_out=0.0)
    counts = make_partition(digits, settings, seed=0).label_counts(digits.train_y, 10)
    assert (counts > 0).sum(1).tolist() == [classes] * 12
    assert (counts.sum(0) == torch.bincount(digits.train_y)).all()


def test_shards_bound_the_classes_and_even_the_sizes(digits):
    settings = PartitionSettings("shard", clients=20, shards_per_client=2, held_out=0.0)
    partition = make_partition(digits, settings, seed=0)
    assert {len(rows) for rows in partition.train} == {2 * (1437 // 40)}
    classes = (partition.label_counts(digits.train_y, 10) > 0).sum(1)
    assert classes.max() <= 4
    assert classes.float().mean() < 3.2


def test_quantity_sizes_differ_with_alpha_and_labels_do_not(digits):
    def sizes(alpha):
        partition = make_partition(digits, PartitionSettings("quantity", clients=5, alpha=alpha, held_out=0.0), seed=3)
        return partition, torch.tensor([len(rows) for rows in partition.train])

    uneven, even = sizes(0.3), sizes(1000.0)
    assert uneven[1].max() > 2 * even[1].max()
    assert even[1].max() - even[1].min() < 60
    largest = int(uneven[1].argmax())
    assert label_shares(uneven[0], digits)[largest].max() < 0.15


@pytest.mark.parametrize("alpha", [1e-4, 0.1])
def test_quantity_keeps_min_examples_however_uneven(alpha, digits):
    settings = PartitionSettings("quantity", clients=50, alpha=alpha, min_examples=9)
    partition = make_partition(digits, settings, seed=0)
    assert min(len(rows) for rows in partition.train) == 9
    assert len(rows_of(partition)) == len(digits.train_y)


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_on_digits_works_with_min_examples(seed, digits):
    # Seeds 0 and 4 need more than one draw.
    partition = make_partition(digits, PartitionSettings(alpha=0.1, min_examples=10), seed)
    assert min(len(rows) for rows in partition.train) >= 10


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_on_mnist_with_small_alpha(seed, mnist):
    partition = make_partition(mnist, PartitionSettings(clients=20, alpha=0.1), seed)
    assert len(rows_of(partition).unique()) == 60_000


def test_thousand_dirichlet_clients_on_mnist(mnist):
    partition = make_partition(mnist, PartitionSettings(clients=1000), seed=0)
    assert len(partition.train) == 1000
    assert len(rows_of(partition).unique()) == 60_000
    assert min(len(rows) for rows in partition.train) >= 1


def test_max_examples_caps_at_random(digits):
    whole = make_partition(digits, PartitionSettings("iid", clients=3, held_out=0.0), seed=0)
    capped = make_partition(digits, PartitionSettings("iid", clients=3, held_out=0.25, max_examples=40), seed=0)
    for everything, train, tested in zip(whole.train, capped.train, capped.held_out, strict=True):
        assert (len(train), len(tested)) == (30, 10)
        assert set(train.tolist() + tested.tolist()) <= set(everything.tolist())
        assert not torch.equal(train, everything[:30])


def test_natural_clients(text_set):
    partition = make_partition(text_set, PartitionSettings("natural", clients=None, held_out=0.0), seed=0)
    assert partition.client_names == ("first", "second", "third")
    assert [rows.tolist() for rows in partition.train] == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_natural_takes_the_first_clients(text_set):
    partition = make_partition(text_set, PartitionSettings("natural", clients=2, held_out=0.5), seed=0)
    assert partition.client_names == ("first", "second")
    assert sorted(rows_of(partition).tolist()) == list(range(9))
    assert [len(rows) for rows in partition.held_out] == [2, 2]


def test_client_with_one_example_trains_on_it(text_set):
    partition = make_partition(text_set, PartitionSettings("natural", clients=None, held_out=0.9), seed=0)
    assert partition.train[2].tolist() == [9]
    assert partition.held_out[2].tolist() == []


@pytest.mark.parametrize("scheme", ["iid", "quantity"])
def test_sequences_of_labels_can_be_divided_evenly_or_by_size(scheme, text_set):
    partition = make_partition(text_set, PartitionSettings(scheme, clients=3, held_out=0.0), seed=0)
    assert sorted(rows_of(partition).tolist()) == list(range(10))
    counts = partition.label_counts(text_set.train_y, 7)
    assert counts.sum() == text_set.train_y.numel()


def test_client_data_are_the_rows_of_the_data_set(digits):
    partition = make_partition(digits, PartitionSettings(clients=4, held_out=0.3), seed=0)
    data = partition.client_data(digits, 2)
    assert len(data) == len(partition.train[2])
    assert torch.equal(data.train_x, digits.train_x[partition.train[2]])
    assert torch.equal(data.train_y, digits.train_y[partition.train[2]])
    assert torch.equal(data.held_out_x, digits.train_x[partition.held_out[2]])
    assert torch.equal(data.held_out_y, digits.train_y[partition.held_out[2]])


def test_nothing_held_out_is_an_empty_tensor_of_the_right_shape(digits):
    data = make_partition(digits, PartitionSettings("iid", held_out=0.0), seed=0).client_data(digits, 0)
    assert data.held_out_x.shape == (0, 1, 8, 8)
    assert data.held_out_y.shape == (0,)


@pytest.mark.parametrize("client", [-1, 10])
def test_unknown_client(client, digits):
    with pytest.raises(PartitionError, match=rf"client {client} is not in this partition. Use 0\.\.9"):
        make_partition(digits, PartitionSettings("iid"), seed=0).client_data(digits, client)


def test_client_data_of_a_smaller_data_set(digits, text_set):
    with pytest.raises(PartitionError, match="'text' has 10 training examples"):
        make_partition(digits, PartitionSettings("iid"), seed=0).client_data(text_set, 0)


def test_label_counts_match_the_clients_labels(digits):
    partition = make_partition(digits, PartitionSettings(clients=3), seed=0)
    counts = partition.label_counts(digits.train_y, 12)
    assert counts.dtype == torch.int64
    assert counts.shape == (3, 12)
    for client in range(3):
        labels = partition.client_data(digits, client).train_y.tolist()
        assert counts[client].tolist() == [labels.count(k) for k in range(12)]


def test_label_counts_need_enough_classes(digits):
    with pytest.raises(DataError, match="Raise num_classes to 10"):
        make_partition(digits, PartitionSettings("iid"), seed=0).label_counts(digits.train_y, 9)


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_tensors_round_trip_through_a_file(held_out, digits, tmp_path):
    from safetensors.torch import load_file, save_file

    settings = PartitionSettings(clients=7, alpha=0.1 + 0.2, held_out=held_out, max_examples=100)
    partition = make_partition(digits, settings, seed=2**40 + 1)
    save_file(partition.to_tensors(), tmp_path / "partition.safetensors")
    again = Partition.from_tensors(load_file(tmp_path / "partition.safetensors"))
    assert same(partition, again)
    assert again.settings == settings
    assert again.seed == 2**40 + 1
    assert all(rows.dtype == torch.int64 for rows in (*again.train, *again.held_out))


def test_round_trip_keeps_any_client_name(text_set):
    rows = (torch.tensor([0]),)
    partition = Partition(PartitionSettings("natural", clients=None), 0, rows, rows, ("Rôle: “É”",))
    assert Partition.from_tensors(partition.to_tensors()).client_names == partition.client_names


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("about"),
        lambda tensors: tensors.pop("train_offsets"),
        lambda tensors: tensors.update(about=tensors["about"][:-3]),
        lambda tensors: tensors.update(train_rows=tensors["train_rows"][:-1]),
        lambda tensors: tensors.update(train_offsets=torch.tensor(0)),
        lambda tensors: tensors["train_offsets"][1:3].copy_(tensors["train_offsets"][1:3].flip(0)),
        lambda tensors: tensors.update(
            held_out_offsets=tensors["held_out_offsets"][[0, -1]],
        ),
    ],
)
def test_damaged_tensors_are_refused(damage, digits):
    tensors = make_partition(digits, PartitionSettings("iid"), seed=0).to_tensors()
    damage(tensors)
    with pytest.raises(RecordError, match="not the tensors of a partition"):
        Partition.from_tensors(tensors)
