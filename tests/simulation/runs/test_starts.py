"""Where clients start and what the server holds: settings of a comparison that methods of matching ask for."""

from __future__ import annotations

import pytest
import torch

from fedmerge import ConfigError
from fedmerge.simulation import Experiment, compare, make_config

BASE = {
    "methods": ["pfnm"],
    "rounds": 2,
    "partition": {"scheme": "iid", "clients": 3},
    "training": {"epochs": 1},
    "model": {"options": {"hidden": [8]}},
}


def test_the_servers_examples_leave_the_test_set():
    whole, some = (Experiment(make_config(BASE, {"server_examples": n}), 0) for n in (0, 100))
    assert len(some.dataset.test_x) == len(whole.dataset.test_x) - 100
    assert torch.equal(some.dataset.test_x, whole.dataset.test_x[100:])
    held = some.strategy("zipit")._data
    assert torch.equal(torch.cat([x for x, _ in held]), whole.dataset.test_x[:100])
    assert whole.strategy("pfnm")._data is None
    with pytest.raises(ConfigError, match="leave some to test on"):
        _ = Experiment(make_config(BASE, {"server_examples": 10**6}), 0).dataset


def test_methods_that_hear_the_model_run_in_a_comparison(tmp_path):
    settings = {"methods": ["zipit", "rebasin(ground=activations)"], "server_examples": 60, "model": {"apart": True}}
    folders, failed = compare(make_config(BASE, settings), tmp_path, lambda row: None)
    assert len(folders) == 2
    assert not failed


def test_clients_start_apart_and_at_widths_of_their_own(tmp_path):
    experiment = Experiment(make_config(BASE, {"model": {"variants": [{"hidden": [8]}, {"hidden": [12]}]}}), 0)
    rows = []
    (folder,), failed = compare(experiment.config, tmp_path, rows.append)
    assert not failed
    assert folder.is_dir()
    parameters = [row["parameters"] for row in rows]
    assert parameters[0] < parameters[1] == parameters[2]
