"""The table is complete, and its excuses are of laws that exist."""

from __future__ import annotations

import importlib

import fedmerge
from fedmerge.lookup.method_names import parse_method
from tests.contract.laws import LAWS
from tests.contract.table import ROWS

MOVE_THE_BASE = {"flora", "fedex_lora"}
"""They add to frozen weights, of which the models here have none; tests of folding rules hold them to laws."""


def test_every_registered_method_has_a_row():
    parts = {part.name for row in ROWS for part in parse_method(row.method)}
    assert set(fedmerge.methods()) <= parts | MOVE_THE_BASE


def test_rows_are_excused_from_laws_that_exist_for_reasons_in_words():
    for file in ("merging", "bad_updates", "settings"):  # laws enter the list as their files are read
        importlib.import_module(f"tests.contract.test_{file}")
    for row in ROWS:
        assert set(row.excused) <= LAWS, row
        assert all(len(reason.split()) > 4 for reason in row.excused.values()), row
