"""``fedmerge models``, ``datasets`` and ``list``."""

from __future__ import annotations

import json
import sys

import pytest

from fedmerge import cli
from fedmerge.lookup.kinds import KINDS
from fedmerge.registry import entries


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedmerge", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        told = capsys.readouterr()
        return done.value.code or 0, told.out, told.err

    monkeypatch.setenv("COLUMNS", "160")
    return run


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("models",), "model"),
        (("datasets",), "data set"),
        (("list", "attacks"), "attack"),
        (("list", "observer"), "observer"),
        (("list", "server-steps"), "server step"),
        (("list", "methods"), "aggregator"),
        (("list", "Statistics"), "statistic"),
    ],
)
def test_everything_registered_is_listed_with_options_and_defaults(command, words, kind):
    code, out, _ = command(*words)
    assert code == 0
    code, told, _ = command(*words, "--json")
    facts = json.loads(told)
    assert facts.keys() == entries(kind).keys()
    for name, found in entries(kind).items():
        assert name in out
        assert facts[name]["summary"] == found.summary != ""
        assert list(facts[name]["options"]) == list(found.options)


def test_one_is_told_of_whole(command):
    code, out, _ = command("list", "observers", "early_stopping")
    assert code == 0
    assert "defaults: column=test_loss, patience=5" in out
    assert "So many rounds in a row may pass" in out
    assert "Examples" not in out
    _, told, _ = command("models", "mlp", "--json")
    assert json.loads(told)["mlp"]["options"]["hidden"] == [100]


def test_kinds_are_listed_with_where_packages_announce_theirs(command):
    _, out, _ = command("list")
    assert all(kind.group in out for kind in KINDS.values())
    _, told, _ = command("list", "--json")
    assert json.loads(told)["datasets"] == {"entry_points": "fedmerge.datasets"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("list", "modles"), "Did you mean 'models'"),
        (("models", "mpl"), "Did you mean 'mlp'"),
        (("list", "statistics", "os:getcwd"), "unknown statistic"),
    ],
)
def test_what_there_is_not_is_told(command, words, told):
    code, _, err = command(*words)
    assert code == 2
    assert told in err


def test_a_file_is_told_of_as_the_data_set_that_reads_it(command):
    code, out, _ = command("datasets", "wards.csv")
    assert code == 0
    assert out == command("datasets", "table")[1]
    assert "standardise=True" in out
