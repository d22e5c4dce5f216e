"""Fractions and minima of a strategy are read when it is made."""

from __future__ import annotations

import numpy as np
import pytest

from fedmerge.errors import InvalidOption
from fedmerge.strategies import FedAvg, FedNova, MergeStrategy
from fedmerge.strategies.ordering import wanted
from fedmerge.strategies.participation import shortage


@pytest.mark.parametrize("name", ["fraction_train", "fraction_evaluate"])
@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf"), True, "0.5", None, 3, [0.5], 10**400])
def test_fractions_are_shares(name, value):
    with pytest.raises(InvalidOption, match=f"{name} must be a share of the nodes"):
        FedAvg(**{name: value})


@pytest.mark.parametrize("name", ["min_train_nodes", "min_evaluate_nodes", "min_available_nodes"])
@pytest.mark.parametrize("value", [-1, 1.5, 2.0, True, None, "2", float("nan")])
def test_minima_are_numbers_of_nodes(name, value):
    with pytest.raises(InvalidOption, match=f"{name} must be a number of nodes"):
        MergeStrategy("median", **{name: value})


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "2"])
def test_a_seed_is_a_whole_number(value):
    with pytest.raises(InvalidOption, match="seed must be an integer of at least 0"):
        FedAvg(seed=value)


def test_a_number_of_nodes_given_as_a_fraction_is_told_where_it_belongs():
    with pytest.raises(InvalidOption, match="min_evaluate_nodes"):
        FedAvg(fraction_evaluate=5)


def test_every_kind_of_number_in_the_range_is_taken():
    strategy = FedNova(
        fraction_train=np.float32(0.5), fraction_evaluate=1, min_train_nodes=np.int64(3), min_evaluate_nodes=0
    )
    assert (strategy.fraction_train, strategy.min_train_nodes) == (0.5, 3)


def test_how_many_are_asked_and_waited_for():
    assert wanted(10, 0.25, 2, 4) == (2, 4)
    assert wanted(10, 0.55, 2, 4) == (5, 5)
    assert wanted(10, 0.25, 12, 4) == (12, 12)


def test_what_is_short_is_named_by_its_settings():
    assert shortage(3, {"fraction_train": 1.0, "min_train_nodes": 3, "min_available_nodes": 3}) is None
    given = {"min_train_nodes": 5, "min_evaluate_nodes": 6, "fraction_evaluate": 2.0}
    assert shortage(3, given) == "min_train_nodes=5, min_evaluate_nodes=6, fraction_evaluate=2"
    assert shortage(3, given, ("train",)) == "min_train_nodes=5"
