"""The client side, message by message."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedmerge.data import ClientData
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import FedAvg, MergeStrategy, client_app, from_arrays
from fedmerge.training import evaluate
from tests.federation import CLIENTS, TRAINING, initial, tiny_app, tiny_data, tiny_model


def ask(kind, config=None, *, app=None, node=2, arrays=None, grid=None):
    grid = grid or SimulationGrid(app or tiny_app(), CLIENTS)
    content = RecordDict({"arrays": initial() if arrays is None else arrays, "config": ConfigRecord(config or {})})
    return next(iter(grid.send_and_receive([Message(content, dst_node_id=node, message_type=kind)])))


def test_train_replies_as_stock_strategies_expect():
    answer = ask("train", {"server-round": 1, "seed": 0}).content
    assert len(answer.array_records) == 1
    assert len(answer.metric_records) == 1
    assert answer["metrics"]["num-examples"] == 8
    assert answer["client"]["partition-id"] == 0
    assert not torch.equal(from_arrays(answer["arrays"])["0.weight"], tiny_model().state_dict()["0.weight"])


def test_train_sends_the_statistics_that_are_asked_for():
    answer = ask("train", {"server-round": 1, "needs": ["local_steps"], "momentum": 0.5}).content
    steps = from_arrays(answer["statistics.local_steps"])
    assert steps["local_steps"].item() == 2  # 8 examples in batches of 4
    assert steps["momentum"].item() == 0.5
    assert steps["learning_rate"].item() == pytest.approx(0.1)


def test_configuration_overrides_the_training():
    plain = ask("train", {"server-round": 1}).content["arrays"]
    proximal = ask("train", {"server-round": 1, "proximal-mu": 5.0, "epochs": 3}).content["arrays"]
    assert plain["0.weight"].data != proximal["0.weight"].data


def test_same_seed_same_bits_other_round_other_bits():
    def weights(**config):
        return ask("train", config | {"seed": config.get("seed", 0)}).content["arrays"]["0.weight"].data

    assert weights(**{"server-round": 1}) == weights(**{"server-round": 1})
    assert weights(**{"server-round": 1}) != weights(**{"server-round": 2})
    assert weights(**{"server-round": 1}) != weights(**{"server-round": 1, "seed": 1})


def test_evaluate_judges_on_held_out_examples():
    metrics = ask("evaluate").content["metrics"]
    data = tiny_data(0, CLIENTS)
    loss, accuracy = evaluate(tiny_model(), data.held_out_x, data.held_out_y)
    assert metrics["num-examples"] == 4
    assert metrics["eval_loss"] == pytest.approx(loss)
    assert metrics["eval_acc"] == pytest.approx(accuracy)


@pytest.mark.parametrize("kind", ["query", "query.statistics"])
def test_query_measures_the_model_that_is_sent(kind):
    answer = ask(kind, {"needs": ["batch_norm"]}).content
    moments = from_arrays(answer["statistics.batch_norm"])
    data, model = tiny_data(0, CLIENTS), tiny_model()
    torch.testing.assert_close(moments["1.running_mean"], model[0](data.train_x).mean(0).detach())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"needs": ["local_stepz"]}, "local_steps"),
        ({"needs": "local_steps"}, "list of strings"),
        ({"server-round": "one"}, "server-round"),
        ({"learning-rate": -1.0}, "learning_rate"),
        ({"momentum": "much"}, "momentum"),
    ],
)
def test_a_wrong_message_gives_an_error_reply_that_says_why(config, words):
    answer = ask("train", config)
    assert answer.has_error()
    assert words in answer.error.reason


def test_a_model_that_does_not_fit_is_named():
    answer = ask("train", arrays=ArrayRecord({"0.weight": torch.zeros(1)}))
    assert "does not fit the Sequential that model_fn makes" in answer.error.reason


def test_a_client_without_examples_says_so():
    empty = client_app(
        tiny_model, lambda *_: ClientData(torch.zeros(0, 4), torch.zeros(0).long(), *[torch.zeros(0)] * 2)
    )
    assert "client 0 has no examples" in ask("train", app=empty).error.reason


def test_local_batch_norm_stays_with_the_client():
    """Under "local" a client gets its own statistics back, whatever the server sends."""
    grid = SimulationGrid(tiny_app(), CLIENTS)
    config = {"server-round": 1, "batch-norm": "local"}
    first = from_arrays(ask("train", config, grid=grid).content["arrays"])
    fresh = tiny_model()
    fresh.load_state_dict({**first, "1.running_mean": torch.zeros(6), "1.running_var": torch.ones(6)})
    fitted = tiny_model()
    fitted.load_state_dict(first)
    data = tiny_data(0, CLIENTS)
    want = evaluate(fitted, data.held_out_x, data.held_out_y)[0]
    got = ask("evaluate", config, grid=grid, arrays=ArrayRecord(fresh.state_dict())).content["metrics"]["eval_loss"]
    assert got == pytest.approx(want)
    assert want != pytest.approx(evaluate(fresh, data.held_out_x, data.held_out_y)[0])


def test_recalibrated_batch_norm_is_that_of_the_pooled_data():
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        strategy = MergeStrategy("fedavg", batch_norm="recalibrate", fraction_evaluate=0.0)
        result = strategy.start(grid, initial(), num_rounds=1)
    merged = tiny_model()
    merged.load_state_dict(from_arrays(result.arrays))
    x = torch.cat([tiny_data(client, CLIENTS).train_x for client in range(CLIENTS)])
    hidden = merged[0](x).detach()
    torch.testing.assert_close(merged[1].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    # Unbiased within clients, so equal to the pooled variance up to the factor n / (n - 1).
    torch.testing.assert_close(merged[1].running_var, hidden.var(0), rtol=0.1, atol=1e-3)


def test_recalibration_leaves_out_what_cannot_be_used(monkeypatch, caplog):
    """Client 1 measures NaN: the others' statistics are pooled, and the log says who was left out."""
    from fedmerge.statistics import BatchNormMoments

    original = BatchNormMoments.measure

    def measure(self, model, batches, report):
        examples = list(batches)
        found = original(self, model, examples, report)
        is_client_1 = len(examples[0][0]) == 12
        return {name: tensor * float("nan") for name, tensor in found.items()} if is_client_1 else found

    def finals(broken):
        with monkeypatch.context() as patch, SimulationGrid(tiny_app(), CLIENTS) as grid:
            if broken:
                patch.setattr(BatchNormMoments, "measure", measure)
            strategy = MergeStrategy("fedavg", batch_norm="recalibrate", fraction_evaluate=0.0)
            return from_arrays(strategy.start(grid, initial(), num_rounds=1).arrays)

    whole, partial = finals(broken=False), finals(broken=True)
    assert torch.isfinite(partial["1.running_mean"]).all()
    assert not torch.equal(whole["1.running_mean"], partial["1.running_mean"])
    assert "client 1: its batch-norm statistics cannot be used" in caplog.text


def test_clients_without_held_out_examples_do_not_count_in_evaluation():
    def data(partition, total):
        full = tiny_data(partition, total)
        if partition == 0:
            return full
        return ClientData(full.train_x, full.train_y, full.held_out_x[:0], full.held_out_y[:0])

    for strategy in (FedAvg(), FedAvg(fraction_evaluate=0.4, min_evaluate_nodes=1, seed=1)):
        with SimulationGrid(client_app(tiny_model, data, training=TRAINING), CLIENTS) as grid:
            result = strategy.start(grid, initial(), num_rounds=3)
        metrics = list(result.evaluate_metrics_clientapp.values())
        assert all(0 < metric["eval_loss"] < 10 for metric in metrics)
        assert metrics


def test_flowers_fedavg_runs_on_our_clients():
    from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        theirs = FlowerFedAvg().start(grid, initial(), num_rounds=2)
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        ours = FedAvg().start(grid, initial(), num_rounds=2)
    a, b = from_arrays(ours.arrays)["0.weight"], from_arrays(theirs.arrays)["0.weight"]
    torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6)
    assert ours.evaluate_metrics_clientapp[2]["eval_acc"] == theirs.evaluate_metrics_clientapp[2]["eval_acc"]
