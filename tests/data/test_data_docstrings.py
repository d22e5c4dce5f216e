from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import fedmerge.data

MODULES = ["fedmerge.data", *(f"fedmerge.data.{found.name}" for found in pkgutil.iter_modules(fedmerge.data.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", fedmerge.data.__all__)
def test_everything_public_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(fedmerge.data, name))
