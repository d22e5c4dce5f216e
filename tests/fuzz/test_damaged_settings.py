"""Damaged settings end with a typed error, or are settings: as they stand in TOML, as text, as assignments."""

from __future__ import annotations

from hypothesis import strategies as st

from fedmerge.records.atomic_files import read_toml
from fedmerge.simulation.runs.config import make_config, parse_assignment
from tests.fuzz.damage import EDITS, TEXTS, changed_settings, damaged
from tests.fuzz.survey import survey, tries

KNOWN = make_config({}).model_dump(mode="json")
TEXT = b'methods = ["fedavg"]\nrounds = 3\n[partition]\nscheme = "iid"\nclients = 4\n[training]\nepochs = 1\n'


@tries(60, 8000)
def test_settings_as_toml_gives_them(tried):
    fates = survey(
        lambda changes: make_config(damaged(KNOWN, changes)),
        changed_settings(KNOWN, "attack", "statistics", "target"),
        tried,
    )
    assert fates["fine"]
    assert fates["typed"]


@tries(30, 2500)
def test_text_of_a_file(tmp_path, tried):
    path = tmp_path / "config.toml"

    def read(drawn):
        changes, end = drawn
        path.write_bytes(damaged(TEXT, changes) + end)
        make_config(read_toml(path))

    ends = st.sampled_from((b"", b"", b"x = " + b"[" * 3000, b"x = " + b"9" * 5000, b"x=0x" + b"f" * 5000))
    assert survey(read, st.tuples(EDITS, ends), tried)["typed"]


@tries(30, 200)
def test_assignments_of_a_command_line(tried):
    keys = st.sampled_from(("rounds", "partition.alpha", "a.b", "", "data"))
    values = st.sampled_from((*TEXTS, "[" * 3000, "3"))
    assert survey(lambda drawn: make_config(parse_assignment("=".join(drawn))), st.tuples(keys, values), tried)["typed"]
