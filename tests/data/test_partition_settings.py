from __future__ import annotations

import pytest

from fedmerge.data import PartitionSettings
from fedmerge.errors import InvalidOption, UnknownName


def test_unknown_scheme_names_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'dirichlet'"):
        PartitionSettings("dirichelt")


@pytest.mark.parametrize(
    "field", ["clients", "classes_per_client", "shards_per_client", "min_examples", "max_examples"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_counts_must_be_positive_integers(field, value):
    with pytest.raises(InvalidOption, match=f"{field}={value!r}"):
        PartitionSettings(**{field: value})


@pytest.mark.parametrize("field", ["classes_per_client", "shards_per_client", "min_examples"])
def test_only_clients_and_max_examples_may_be_none(field):
    with pytest.raises(InvalidOption, match=f"{field}=None"):
        PartitionSettings(**{field: None})


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "0.3", None, True])
def test_alpha_must_be_finite_and_positive(value):
    with pytest.raises(InvalidOption, match="alpha="):
        PartitionSettings(alpha=value)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), None])
def test_held_out_must_be_a_share(value):
    with pytest.raises(InvalidOption, match="held_out="):
        PartitionSettings(held_out=value)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "pathological", "shard", "quantity"])
def test_without_a_number_natural_takes_all_clients_and_others_ten(scheme):
    assert PartitionSettings(scheme).clients == 10
    assert PartitionSettings("natural").clients is None


def test_max_examples_must_leave_room_for_min_examples():
    with pytest.raises(InvalidOption, match=r"max_examples=10.*min_examples=10"):
        PartitionSettings(max_examples=10, min_examples=10, held_out=0.2)
    assert PartitionSettings(max_examples=10, min_examples=10, held_out=0.0).max_examples == 10


@pytest.mark.parametrize("held_out", [0.0, 0.05, 0.1, 1 / 3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("min_examples", [1, 2, 3, 10, 57])
def test_fewest_rows_is_the_smallest_that_leaves_min_examples(held_out, min_examples):
    settings = PartitionSettings(held_out=held_out, min_examples=min_examples)
    left = {rows: rows - settings.held_out_of(rows) for rows in range(1, 7000)}
    assert settings.fewest_rows == min(rows for rows, count in left.items() if count >= min_examples)


def test_share_held_out_is_rounded_and_leaves_one():
    assert [PartitionSettings(held_out=0.1).held_out_of(n) for n in (1, 5, 6, 100)] == [0, 0, 1, 10]
    assert [PartitionSettings(held_out=0.99).held_out_of(n) for n in (1, 2, 3)] == [0, 1, 2]
