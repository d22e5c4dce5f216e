"""SimulationGrid under Flower's own strategies and under clients that misbehave."""

from __future__ import annotations

import random
from contextlib import closing

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)

from fedmerge.errors import ConfigError
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.grids.simulation_grid import make_workers, parse_workers
from fedmerge.strategies import from_arrays
from tests.federation import CLIENTS, initial, tiny_app

STOCK = {
    "FedAvg": FedAvg,
    "FedAdam": FedAdam,
    "FedMedian": FedMedian,
    "Krum": lambda: Krum(num_malicious_nodes=0),
    "FedAvgM": FedAvgM,
    "FedAdagrad": FedAdagrad,
    "FedYogi": FedYogi,
    "FedProx": lambda: FedProx(proximal_mu=0.1),
    "FedTrimmedAvg": FedTrimmedAvg,
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=0, num_nodes_to_select=2),
}


@pytest.mark.parametrize("name", STOCK)
def test_flowers_own_strategies_run_unmodified(name):
    random.seed(0)
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        result = STOCK[name]().start(grid, initial(), num_rounds=3)
    assert set(result.train_metrics_clientapp) == {1, 2, 3}
    assert set(result.evaluate_metrics_clientapp) == {1, 2, 3}
    before, after = from_arrays(initial())["0.weight"], from_arrays(result.arrays)["0.weight"]
    assert torch.isfinite(after).all()
    assert not torch.allclose(before, after.float())


def test_is_a_flower_grid_with_stable_nodes():
    grid = SimulationGrid(tiny_app(), 4)
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [2, 3, 4, 5]
    assert grid.run.run_id == 1


def failing_app():
    """Client 1 raises; the others count their messages in their context."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("disk on fire")
        seen = context.state.get("seen", MetricRecord({"n": 0}))["n"] + 1
        context.state["seen"] = MetricRecord({"n": seen})
        arrays = message.content["arrays"]
        if len(arrays) != len(initial()):
            raise RuntimeError("another client has emptied my message")
        arrays.to_torch_state_dict(keep_input=False)  # empties the record, as a client may
        content = RecordDict({"arrays": initial(), "metrics": MetricRecord({"num-examples": 1, "seen": seen})})
        return Message(content, reply_to=message)

    return app


def test_one_failing_client_gives_one_error_reply_with_its_traceback_and_the_round_goes_on():
    grid = MeasuredGrid(SimulationGrid(failing_app(), CLIENTS))
    result = FedAvg(fraction_evaluate=0.0).start(grid, initial(), num_rounds=3)
    assert [exchange.ok for exchange in grid.exchanges] == [2, 2, 2]
    assert [exchange.local_steps for exchange in grid.exchanges] == [None] * 3  # this app does not tell
    (failure,) = grid.exchanges[0].failures
    assert failure.reason.startswith("client 1: RuntimeError: disk on fire")
    assert "Traceback" in failure.reason
    assert 'raise RuntimeError("disk on fire")' in failure.reason
    # Every client emptied the record it was handed, and still the next one had all of it.
    assert result.train_metrics_clientapp[3]["seen"] == 3


def test_messages_to_nobody_and_to_nobody_known():
    grid = SimulationGrid(tiny_app(), 2)
    assert list(grid.send_and_receive([])) == []
    stray = Message(RecordDict(), dst_node_id=9, message_type="train")
    with pytest.raises(ConfigError, match="no node 9: nodes are 2 to 3"):
        grid.send_and_receive([stray])


def test_unknown_message_types_are_error_replies():
    grid = SimulationGrid(tiny_app(), 1)
    answer = next(iter(grid.send_and_receive([Message(RecordDict(), dst_node_id=2, message_type="query.nothing")])))
    assert "No query function registered with name 'nothing'" in answer.error.reason


def test_known_clients_cost_nothing_until_they_are_called():
    grid = SimulationGrid(tiny_app(), 10**9)
    assert len(grid.get_node_ids()) == 10**9
    assert not grid._contexts


def test_measured_bytes_are_those_of_the_tensors():
    grid = MeasuredGrid(SimulationGrid(tiny_app(), CLIENTS))
    FedAvg().start(grid, initial(), num_rounds=1)
    train, evaluate = grid.take()
    tensors = sum(len(array.data) for array in initial().values())
    assert train.kind == "train"
    assert evaluate.kind == "evaluate"
    assert CLIENTS * tensors < train.bytes_down < CLIENTS * (tensors + 200)
    assert CLIENTS * tensors < train.bytes_up < CLIENTS * (tensors + 200)
    assert evaluate.bytes_up < 300
    assert grid.take() == []


@pytest.mark.parametrize(("given", "want"), [("auto", "auto"), ("ray", "ray"), ("3", 3), (1, 1)])
def test_workers_are_understood(given, want):
    assert parse_workers(given) == want


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", 0])
def test_workers_that_are_not(given):
    with pytest.raises(ConfigError, match="workers must be"):
        parse_workers(given)


def test_a_federation_needs_a_client():
    for number in (0, -1, 1.5, True, "3"):
        with pytest.raises(ConfigError, match="at least one client"):
            SimulationGrid(tiny_app(), number)


@pytest.mark.slow
def test_ray_gives_what_this_process_gives():
    results = []
    with closing(make_workers(2, "auto")) as on_ray:  # Ray is started once for both apps
        for workers in (1, on_ray):
            with SimulationGrid(tiny_app(), CLIENTS, workers=workers) as grid:
                results.append(FedAvg().start(grid, initial(), num_rounds=3))
            with SimulationGrid(failing_app(), CLIENTS, workers=workers) as grid:
                measured = MeasuredGrid(grid)
                counted = FedAvg(fraction_evaluate=0.0).start(measured, initial(), num_rounds=2)
                assert measured.exchanges[1].ok == 2
                assert measured.exchanges[1].failures[0].reason.startswith("client 1: RuntimeError: disk on fire")
                assert counted.train_metrics_clientapp[2]["seen"] == 2  # contexts travel to and fro
    here, ray = (from_arrays(result.arrays) for result in results)
    for name in here:
        np.testing.assert_allclose(here[name].numpy(), ray[name].numpy(), rtol=1e-5, atol=1e-7)
    for number, metrics in results[0].evaluate_metrics_clientapp.items():
        # Another process may round the last float32 digit of a loss differently.
        assert dict(results[1].evaluate_metrics_clientapp[number]) == pytest.approx(dict(metrics), rel=1e-6)
