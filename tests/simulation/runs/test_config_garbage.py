"""Settings of kinds that nobody would write end as errors that name them."""

from __future__ import annotations

import pytest

from fedmerge import FedMergeError, InvalidOption
from fedmerge.records.atomic_files import read_toml
from fedmerge.simulation.runs.config import make_config, parse_assignment
from fedmerge.training import LocalTraining


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"name": ["digits"]}},
        {"partition": [{"alpha": 0.3}]},
        {"partition": {"scheme": "iid", "min_examples": 10**30, "max_examples": 10**30}},
        {"partition": {"scheme": "iid", "clients": 16**5000}},
        {"training": {"batch_size": None}},
    ],
)
def test_settings_of_a_wrong_kind_are_typed_errors(settings):
    with pytest.raises(FedMergeError):
        make_config(settings)


@pytest.mark.parametrize("text", ["x = " + "[" * 50_000, "x = " + "9" * 5000, "x = \xff"])
def test_a_file_without_end_is_no_toml(tmp_path, text):
    (tmp_path / "a.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(FedMergeError, match="not valid TOML"):
        read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "weight_decay", "proximal_mu", "clip_norm", "epochs"])
def test_a_truth_value_is_no_number_to_train_with(name):
    with pytest.raises(InvalidOption, match=f"training.{name}"):
        LocalTraining(**{name: True})


def test_an_assignment_without_end_is_a_text():
    assert parse_assignment("a=" + "[" * 50_000)["a"].startswith("[[[")
