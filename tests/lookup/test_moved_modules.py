"""Modules under their old names: what was in them is found, with a warning that says where it is."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from fedmerge.lookup.moved_modules import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_brings_what_is_in_the_new_ones(old):
    sys.modules.pop(f"fedmerge.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"fedmerge.{MOVED[old][0]}"):
        module = importlib.import_module(f"fedmerge.{old}")
    for home in MOVED[old]:
        found = importlib.import_module(f"fedmerge.{home}")
        assert {name for name in found.__all__ if getattr(module, name) is not getattr(found, name)} == set()


def test_what_users_wrote_against_old_names_still_runs():
    code = (
        "from fedmerge.aggregators.base import Aggregator, Fold, check_range\n"
        "from fedmerge.pipeline import build_pipeline\n"
        "from fedmerge.merge_files import merge_files\n"
        "from fedmerge.statistics.compression import decode, encode\n"
        "from fedmerge.statistics import compute_statistics\n"
        "import fedmerge; assert compute_statistics is fedmerge.compute_statistics"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_never_was_is_no_module():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fedmerge.aggregators.bass")
