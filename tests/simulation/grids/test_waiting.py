"""Nobody waits for ever, and says nothing, for nodes that will not come."""

from __future__ import annotations

import itertools
import logging

import pytest
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Krum as FlowerKrum
from flwr.serverapp.strategy import strategy_utils

from fedmerge.errors import InvalidOption
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids import waiting as waiting_module
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.grids.numbered_grid import NumberedGrid
from fedmerge.strategies import FedAvg, FedNova, MergeStrategy
from fedmerge.strategies import ordering as sampling_module
from fedmerge.strategies.ordering import sample_nodes
from tests.federation import CLIENTS, initial, tiny_app

TOO_MUCH = [
    ({"min_train_nodes": 8}, "3 nodes.*: min_train_nodes=8"),
    ({"min_available_nodes": 4}, "min_available_nodes=4"),
    ({"min_evaluate_nodes": 4}, "min_evaluate_nodes=4"),
    ({"min_train_nodes": 5, "min_available_nodes": 6}, "min_train_nodes=5, min_available_nodes=6"),
]
around = pytest.mark.parametrize(
    "around",
    [
        lambda grid: grid,
        lambda grid: MeasuredGrid(MeasuredGrid(grid)),
        lambda grid: NumberedGrid(grid, CLIENTS),
    ],
    ids=["bare", "measured", "numbered"],
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Flower's loop asks again without sleeping in between."""
    monkeypatch.setattr(strategy_utils, "sleep", lambda seconds: None)


@around
@pytest.mark.parametrize(("settings", "words"), TOO_MUCH)
@pytest.mark.parametrize("strategy", [FedAvg, FedNova, FlowerFedAvg, FlowerKrum])
def test_more_nodes_than_there_are_is_an_error_at_once(strategy, settings, words, around):
    with SimulationGrid(tiny_app(), CLIENTS) as grid, pytest.raises(InvalidOption, match=words):
        strategy(**settings).start(around(grid), initial(), num_rounds=1)


@pytest.mark.parametrize("strategy", [FedAvg, FlowerFedAvg])
def test_one_client_with_the_usual_minima_is_an_error_with_a_remedy(strategy):
    with SimulationGrid(tiny_app(), 1) as grid:
        with pytest.raises(InvalidOption, match=r"1 node.*min_train_nodes=2.*at most 1.*simulate more clients"):
            strategy().start(grid, initial(), num_rounds=1)
        ones = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
        assert strategy(**ones).start(grid, initial(), num_rounds=1).arrays


def test_a_fraction_of_flowers_that_is_too_large_is_named():
    with SimulationGrid(tiny_app(), CLIENTS) as grid, pytest.raises(InvalidOption, match=r"fraction_train=1\.5"):
        FlowerFedAvg(fraction_train=1.5).start(grid, initial(), num_rounds=1)


@pytest.mark.parametrize("strategy", [MergeStrategy, FlowerFedAvg])
def test_settings_of_an_exchange_that_is_off_do_not_count(strategy):
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        strategy(fraction_evaluate=0.0, min_evaluate_nodes=9).start(grid, initial(), num_rounds=1)


def test_who_asks_for_nodes_often_for_a_reason_of_his_own_is_not_refused(monkeypatch, caplog):
    clock = itertools.count()
    monkeypatch.setattr(waiting_module.time, "monotonic", lambda: float(next(clock)))

    class Curious(FlowerFedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            for _ in range(50):
                assert len(list(grid.get_node_ids())) == CLIENTS
            return super().configure_train(server_round, arrays, config, grid)

    with SimulationGrid(tiny_app(), CLIENTS) as grid, caplog.at_level(logging.WARNING, "fedmerge"):
        assert Curious().start(grid, initial(), num_rounds=2).arrays
    # A loop of a second each looks like waiting: it is told now and then, and goes on.
    told = [record.getMessage() for record in caplog.records if "no more will come" in record.getMessage()]
    assert 2 <= len(told) <= 6
    assert "this federation has 3" in told[0]


def test_asking_often_without_time_passing_is_not_even_told(caplog):
    with SimulationGrid(tiny_app(), CLIENTS) as grid, caplog.at_level(logging.WARNING, "fedmerge"):
        for _ in range(1000):
            grid.get_node_ids()
    assert not caplog.records


def test_a_deployment_is_waited_for_with_a_warning_now_and_then(monkeypatch, caplog):
    seconds = []

    class Growing:
        def get_node_ids(self):
            return [7, 9] if len(seconds) < 65 else [9, 7, 5]

    monkeypatch.setattr(sampling_module.time, "sleep", seconds.append)
    with caplog.at_level(logging.WARNING, "fedmerge"):
        assert sample_nodes(Growing(), 1.0, 3, 2, seed=0, purpose="sampling", round=4) == [5, 7, 9]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3  # after 0, 30 and 60 seconds
    assert told[0].startswith("round 4 waits for nodes: 2 connected, 3 wanted")
    assert "min_train_nodes" in told[0]
