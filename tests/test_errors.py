"""Errors: each names the culprit and the remedy, and all have one base."""

from __future__ import annotations

import pickle

import pytest

import fedmerge
from fedmerge import errors
from fedmerge.errors import BadUpdate, FedMergeError, MissingStatistic, UnknownName, nearest


def test_all_have_one_base_and_are_offered_by_the_package():
    for name in errors.__all__:
        if name not in ("nearest", "shown"):
            assert issubclass(getattr(errors, name), FedMergeError)
            assert getattr(fedmerge, name) is getattr(errors, name)
            assert name in fedmerge.__all__


def test_a_bad_update_names_client_reason_and_remedy():
    error = BadUpdate(7, "tensor 'w' is missing", "Send it.")
    assert str(error) == "update of client 7: tensor 'w' is missing. Send it."
    assert (error.client, error.reason) == (7, "tensor 'w' is missing")


def test_a_missing_statistic_is_a_bad_update_that_says_who_sends_it():
    with pytest.raises(
        MissingStatistic, match=r"client 3: statistic 'gram' is missing.*client_app.*statistics="
    ) as got:
        fedmerge.ClientUpdate(3, {}).statistic("gram")
    assert isinstance(got.value, BadUpdate)
    assert got.value.client == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fedvag", "unknown method 'fedvag'. Did you mean 'fedavg'? Known: fedavg, fednova."),
        ("xyz", "unknown method 'xyz'. Known: fedavg, fednova."),
    ],
)
def test_an_unknown_name_shows_the_nearest_and_all_known(name, words):
    error = UnknownName("method", name, ["fednova", "fedavg"])
    assert str(error) == words
    assert (error.kind, error.name) == ("method", name)


def test_an_unknown_name_may_say_what_to_do():
    assert str(UnknownName("key", "a", [], "In 'x.toml'.")) == "unknown key 'a'. In 'x.toml'."


def test_nearest():
    assert nearest("stepsize", ["step_size", "noise"]) == "step_size"
    assert nearest("zzz", ["step_size", "noise"]) is None
    assert nearest("a", []) is None


@pytest.mark.parametrize("error", [BadUpdate(1, "reason", "Remedy."), UnknownName("method", "a", ["b"])])
def test_errors_travel_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
