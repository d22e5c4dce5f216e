"""The examples in docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fedmerge

ELSEWHERE = ("fedmerge.data", "fedmerge.models", "fedmerge.plotting")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(fedmerge.__path__, "fedmerge.")
    if not module.name.startswith(ELSEWHERE)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    with_examples = [name for name in MODULES if any(t.examples for t in finder.find(importlib.import_module(name)))]
    assert len(with_examples) >= 15
