"""A routed model in a federation: who judges it, what it costs, and that it outlives an interruption."""

from __future__ import annotations

import json

import pytest
import torch
from flwr.app import ConfigRecord

from fedmerge.errors import InvalidOption
from fedmerge.merging.result import routing_in
from fedmerge.records.run_records import read_checkpoint
from fedmerge.routing import RoutedModel, Routing
from fedmerge.simulation import SimulationGrid, compare, make_config
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.simulation.runs.unfinished import run_folder
from fedmerge.strategies import MergeStrategy
from fedmerge.training.judged import judge
from fedmerge.wire.record_values import from_arrays
from tests.federation import CLIENTS, initial, tiny_app, tiny_data, tiny_model

METHOD = "wemoe(steps=3,learning_rate=0.5)"
INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(5))


def strategy(method=METHOD, **settings):
    return MergeStrategy(method, seed=1, model_fn=tiny_model, data=[INPUTS], **settings)


def routed(state, routing):
    model = tiny_model()
    model.load_state_dict(state)
    return RoutedModel(model, routing)


def test_clients_judge_the_routed_model_and_its_bytes_are_counted():
    ours = strategy()
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        order = ours.order_train(1, initial(), ConfigRecord(), grid)
        merged, _ = ours.aggregate_train(1, grid.send_and_receive(list(order.messages())))
        sent = list(ours.configure_evaluate(1, merged, ConfigRecord(), grid))
        ours.aggregate_evaluate(1, grid.send_and_receive(sent))
    routing, held = routing_in(ours.memory), [tiny_data(i, CLIENTS) for i in range(CLIENTS)]
    model = routed(from_arrays(merged), routing)
    loss = sum(judge(model, data.held_out_x, data.held_out_y).loss for data in held) / CLIENTS
    plain = sum(judge(model.model, data.held_out_x, data.held_out_y).loss for data in held) / CLIENTS
    assert ours.last_evaluation["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert abs(loss - plain) > 1e-4
    assert all(torch.equal(t, Routing.from_tensors(from_arrays(sent[0].content["routing"])).to_tensors()[n])
               for n, t in routing.to_tensors().items())  # fmt: skip
    numbers = CLIENTS * (4 * 6 + 6 + 6 * 3 + 3) + (4 * 4 + 4 + 4 * 3 + 3) + (6 * 6 + 6 + 6 * 3 + 3)
    assert ours.last_report.bytes_personal == CLIENTS * 4 * numbers == CLIENTS * routing.bytes


def config(methods, **more):
    sections = {"partition": {"clients": 3, "held_out": 0.2}, "model": {"name": "mlp", "options": {"hidden": [8]}}}
    return make_config({"methods": methods, "seeds": [0], "rounds": 2, "data": {"name": "digits"}, **more}, sections)


def test_the_record_is_of_the_routed_model(tmp_path):
    settings = config([METHOD], server_examples=20)
    compare(settings, tmp_path / "runs")
    folder = run_folder(tmp_path / "runs", METHOD, 0)
    last = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    _, state, memory = read_checkpoint(folder)
    experiment = Experiment(settings, 0)
    model = experiment.model_fn()
    model.load_state_dict(state)
    want = judge(RoutedModel(model, routing_in(memory)), experiment.dataset.test)
    assert last["test_loss"] == pytest.approx(want.loss, rel=1e-5)
    assert abs(judge(model, experiment.dataset.test).loss - want.loss) > 1e-4


def test_a_strategy_goes_on_from_its_checkpoint_with_the_routing(tmp_path):
    served = []
    for rounds in (1, 2):
        with SimulationGrid(tiny_app(), CLIENTS) as grid:
            ours = strategy(checkpoint_dir=tmp_path / "kept")

            def test(round, arrays, ours=ours):
                model = tiny_model()
                model.load_state_dict(from_arrays(arrays))
                served.append((round, ours.served(model)(INPUTS)))

            ours.start(grid=grid, initial_arrays=initial(), num_rounds=rounds, evaluate_fn=test)
    assert [round for round, _ in served] == [0, 1, 1, 2]
    assert torch.equal(served[1][1], served[2][1])
    assert not torch.equal(served[2][1], served[3][1])


def test_personal_parts_are_refused_with_a_remedy():
    ours = strategy(personal=["3"])
    with SimulationGrid(tiny_app(), CLIENTS) as grid, pytest.raises(InvalidOption, match="Take emr or tall_masks"):
        ours.start(grid=grid, initial_arrays=initial(), num_rounds=1)
