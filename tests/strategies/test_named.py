"""Every method has a strategy of its own name."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pickle
from pathlib import Path

import pytest

from fedmerge import strategies
from fedmerge.errors import UnknownName
from fedmerge.registry import entries
from fedmerge.strategies import flower_names, named
from fedmerge.strategies.named import strategy_methods, stub

NAMES = sorted(strategy_methods())


def test_every_registered_method_has_one():
    classes = {found.cls.__name__ for found in entries("aggregator").values()}
    assert classes - set(flower_names.__all__) == set(NAMES)
    assert {"FedNova", "Rebasin", "RegMean", "FedKfac", "PFNM"} <= set(NAMES)
    assert set(strategies.__all__) <= set(dir(strategies)) | set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_one_class_wherever_it_is_asked_for_and_can_be_pickled(name):
    made = getattr(strategies, name)
    assert made is getattr(named, name)
    assert pickle.loads(pickle.dumps(made)) is made
    assert (made.__module__, made.__qualname__) == ("fedmerge.strategies.named", name)
    assert issubclass(made, strategies.MergeStrategy)
    assert not made.reads_messages
    assert str(inspect.signature(made)) == "(**keywords: 'Any') -> 'None'"


@pytest.mark.parametrize("name", NAMES)
def test_its_documentation_names_the_method_and_has_an_example_that_runs(name):
    made = getattr(strategies, name)
    assert entries("aggregator")[made.method].cls.__name__ in made.__doc__
    tests = doctest.DocTestFinder().find(made, name, globs={name: made})
    runner = doctest.DocTestRunner(verbose=False)
    for one in tests:
        runner.run(one)
    assert runner.summarize(verbose=False) == (0, 1)


def test_options_of_the_method_are_keywords_and_misspelt_ones_are_named():
    made = strategies.FedNova(server_momentum=0.9, fraction_train=0.5)
    assert (made.pipeline.aggregator.server_momentum, made.fraction_train) == (0.9, 0.5)
    with pytest.raises(UnknownName, match="server_momentum"):
        strategies.FedNova(server_momentun=0.9)


def test_names_that_nobody_has_are_told():
    with pytest.raises(AttributeError, match="has no attribute 'FedNowhere'"):
        _ = strategies.FedNowhere
    with pytest.raises(ImportError, match="FedNowhere"):
        exec("from fedmerge.strategies import FedNowhere", {})


def test_a_method_that_is_registered_later_has_one_in_the_next_process(monkeypatch):
    found = entries("aggregator")["fedavg"]
    monkeypatch.setattr(named, "entries", lambda kind: {"mine": type("E", (), {"cls": type("MyMethod", (), {})})()})
    assert strategy_methods.__wrapped__() == {"MyMethod": "mine"}
    assert found.cls.__name__ in NAMES


def test_type_checkers_see_all_of_them():
    """Where this fails a method has gone: write what ``stub()`` gives into ``named.pyi``. One that has just come is
    seen as a strategy all the same, by the last line."""
    file = Path(importlib.import_module("fedmerge.strategies.named").__file__).with_suffix(".pyi")
    listed, known = file.read_text().splitlines(), stub().splitlines()
    assert [line for line in listed if line not in known] == []
    assert listed[-1] == known[-1]
    assert listed[-1].startswith("def __getattr__(name: str) -> type[Named]")
    assert {"class FedNova(Named): ...", "class Rebasin(Named): ...", "class RegMean(Named): ..."} <= set(listed)
