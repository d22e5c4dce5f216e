"""Settings of kinds that nobody would write end as errors that name them."""

from __future__ import annotations

import pytest

from fedmerge import FedMergeError, InvalidOption
from fedmerge.errors import ConfigError, UnknownName
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


def test_a_value_that_may_be_of_two_types_is_named_by_its_key_once():
    with pytest.raises(ConfigError) as told:
        make_config({"workers": [1], "rounds": 0})
    assert str(told.value).count("workers") == 1
    assert "workers = [1]: " in str(told.value)
    assert "rounds = 0" in str(told.value)


def test_a_setting_without_which_its_section_means_nothing_is_asked_for():
    with pytest.raises(ConfigError, match=r"privacy\.noise\.noise_multiplier is missing here"):
        make_config({"privacy": {"noise": {"clip": 1.0}}})
    with pytest.raises(ConfigError, match=r"attack\.kind is missing here"):
        make_config({"attack": {"share": 0.5}})


@pytest.mark.parametrize(
    ("settings", "guess"),
    [
        ({"privacy": {"noise": {"clipp": 1.0, "noise_multiplier": 1.0}}}, "privacy.noise.clip"),
        ({"faults": {"crahs": 0.5}}, "faults.crash"),
        ({"attack": {"kind": "sign_flip", "fraction": 0.5}}, None),
        ({3: 4}, None),
    ],
)
def test_keys_of_sections_that_may_be_left_out_are_checked_too(settings, guess):
    with pytest.raises(UnknownName) as told:
        make_config(settings)
    assert guess is None or told.value.guess == guess
    assert told.value.known  # those of the same section
