"""What a comparison cannot honour is refused before any client trains and before anything is written."""

from __future__ import annotations

import pytest

from fedmerge.errors import FedMergeError
from fedmerge.simulation import Experiment, compare, make_config

BASE = {"rounds": 1, "partition": {"clients": 2, "scheme": "iid"}, "model": {"name": "logistic"}}
HELD = {"partition": {"clients": 2, "scheme": "iid", "held_out": 0.2}}


def refused(tmp_path, words, *settings):
    with pytest.raises(FedMergeError, match=words):
        compare(make_config(BASE, *settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method",
    [
        "zipit",
        "cca",
        "mudsc",
        "neuron_alignment",
        "ste_rebasin",
        "soup(recipe=greedy)",
        "rebasin(ground=activations)",
        "otfusion(ground=activations)",
        "rebasin(combine=soup(recipe=greedy))",
        "fedfisher(early_stopping=true)",
        "lorahub(judge=server)",
    ],
)
def test_methods_that_need_data_on_the_server_say_so_and_name_the_setting(tmp_path, method):
    refused(tmp_path, "server_examples", {"methods": ["fedavg", method]})
    config = make_config(BASE, {"methods": [method], "server_examples": 20})
    assert Experiment(config, 0).strategy(method)


@pytest.mark.parametrize("method", ["soup(recipe=greedy)", "lorahub(judge=server)"])
def test_nobody_judges_whole_models_on_the_server_where_a_part_is_personal(tmp_path, method):
    settings = {"methods": [method], "server_examples": 20, "personal": ["output.bias"]}
    refused(tmp_path, "personal", HELD, settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_clients": 3}, "min_clients = 3, and a round asks 2 of 2 clients"),
        (
            {"min_clients": 2, "fraction_train": 0.5, "on_too_few": "skip"},
            r"a round asks 1 of 2 .*fraction_train = 0\.5",
        ),
    ],
)
def test_more_clients_than_a_round_asks_are_never_there(tmp_path, settings, words):
    refused(tmp_path, words, settings)
    assert Experiment(make_config(BASE, {"min_clients": 2}), 0).strategy("fedavg")
