"""Federations whose task is no classification: clients train, judge and measure by its loss."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.data import ClientData
from fedmerge.errors import TaskError
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy, add_statistics, client_app
from fedmerge.tasks import Regression
from fedmerge.training import LocalTraining, train

SETTINGS = LocalTraining(learning_rate=0.1, epochs=2)
CLIENTS = 3


def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def held(task, partition):
    with torch.random.fork_rng():
        torch.manual_seed(partition)
        x = torch.randn(40, 4) + partition
    y = x[:, :1] * x[:, 1:2]
    y = y if task == "regression" else (y > 0).float()
    return ClientData(x[:30], y[:30], x[30:], y[30:])


def run(task, method):
    app = client_app(make, lambda partition, _: held(task, partition), training=SETTINGS, task=task)
    with SimulationGrid(app, num_clients=CLIENTS) as grid:
        strategy = MergeStrategy(method, model_fn=make, statistics={"compression": "none"})
        return strategy.start(grid, initial_arrays=ArrayRecord(make().state_dict()), num_rounds=1)


@pytest.mark.parametrize("engine", ["serial", "stacked", "auto"])
def test_a_regression_trains_on_squared_error_in_every_engine(engine):
    app = client_app(make, lambda partition, _: held("regression", partition), training=SETTINGS, loss=nn.MSELoss())
    with SimulationGrid(app, num_clients=CLIENTS, engine=engine) as grid:
        result = MergeStrategy("fedavg").start(grid, initial_arrays=ArrayRecord(make().state_dict()), num_rounds=1)
    total = [torch.zeros_like(p) for p in make().parameters()]
    for partition in range(CLIENTS):
        model, data = make(), held("regression", partition)
        train(model, data.train_x, data.train_y, SETTINGS, seed=0, client=partition, round=1, task=Regression())
        total = [t + p.detach() / CLIENTS for t, p in zip(total, model.parameters(), strict=True)]
    for found, wanted in zip(result.arrays.to_torch_state_dict().values(), total, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    merged = make()
    merged.load_state_dict(result.arrays.to_torch_state_dict())
    pairs = [held("regression", partition) for partition in range(CLIENTS)]
    x, y = torch.cat([d.held_out_x for d in pairs]), torch.cat([d.held_out_y for d in pairs])
    judged = result.evaluate_metrics_clientapp[1]
    assert judged["eval_loss"] == pytest.approx(F.mse_loss(merged(x), y).item(), rel=1e-5)
    assert "eval_acc" not in judged


@pytest.mark.parametrize("task", ["regression", "binary"])
@pytest.mark.parametrize("method", ["fedfisher", "fedavg+natural_gradient"])
def test_a_federation_measures_what_a_merge_at_hand_does(task, method):
    result = run(task, method)
    models, loaders = [], []
    for partition in range(CLIENTS):
        model, data = make(), held(task, partition)
        train(model, data.train_x, data.train_y, SETTINGS, seed=0, client=partition, round=1,
              task=fedmerge.tasks.task_of(task))  # fmt: skip
        models.append(model)
        loaders.append([(data.train_x, data.train_y)])
    wanted = fedmerge.merge(models, method, base=make(), clients=loaders, weights=[30] * CLIENTS, task=task)
    for name, tensor in result.arrays.to_torch_state_dict().items():
        torch.testing.assert_close(tensor, wanted.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_one_logit_is_judged_by_its_sign():
    result = run("binary", "fedavg")
    model = make()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    data = [held("binary", partition) for partition in range(CLIENTS)]
    x, y = torch.cat([d.held_out_x for d in data]), torch.cat([d.held_out_y for d in data])
    assert result.evaluate_metrics_clientapp[1]["eval_acc"] == pytest.approx(
        ((model(x) > 0) == y).float().mean().item()
    )


def message_for(needs):
    config = ConfigRecord({"needs": needs})
    return Message(RecordDict({"config": config}), dst_node_id=1, message_type="train")


def test_the_one_line_takes_the_task_and_reads_it_where_it_can():
    data = held("regression", 0)
    batches = [(data.train_x, data.train_y)]
    found = []
    for options in ({}, {"task": "regression"}, {"loss": nn.MSELoss()}):
        reply = RecordDict({"metrics": MetricRecord({"num-examples": 30})})
        add_statistics(reply, message_for(["fisher_diag"]), make(), batches, **options)
        found.append(dict(reply.array_records.items()))
    assert found[0]
    for other in found[1:]:
        for key, record in found[0].items():
            for name, array in record.items():
                assert (array.numpy() == other[key][name].numpy()).all()


def test_the_one_line_refuses_what_is_unclear():
    data = held("regression", 0)
    between = [(data.train_x, data.train_y.sigmoid())]
    reply = RecordDict({"metrics": MetricRecord({"num-examples": 30})})
    with pytest.raises(TaskError, match="task="):
        add_statistics(reply, message_for(["fisher_diag"]), make(), between)


def test_torchs_cross_entropy_is_what_clients_minimise_anyway():
    def classes(partition, _):
        data = held("binary", partition)
        return ClientData(data.train_x, data.train_y[:, 0].long(), data.held_out_x, data.held_out_y[:, 0].long())

    found = []
    for loss in (None, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.3)):
        app = client_app(lambda: nn.Linear(4, 2), classes, training=SETTINGS, loss=loss)
        with SimulationGrid(app, num_clients=CLIENTS, engine="stacked") as grid:
            start = {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}
            result = MergeStrategy("fedavg").start(grid, initial_arrays=ArrayRecord(start), num_rounds=1)
        found.append(result.arrays.to_torch_state_dict()["weight"])
    assert torch.equal(found[0], found[1])
    assert float((found[2] - found[0]).norm()) > 1e-3 * float(found[0].norm())
