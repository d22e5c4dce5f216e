"""Statistics over the wire: any ClientApp sends them by one line."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedmerge
from fedmerge.offline.compute import compute_statistics
from fedmerge.simulation import SimulationGrid
from fedmerge.statistics.sending.compression import decode
from fedmerge.strategies import FedFisher, MergeStrategy, add_statistics, from_arrays
from tests.federation import CLIENTS, initial, tiny_app, tiny_data, tiny_model


def stock_app():
    """A ClientApp as Flower's tutorials write it, with our one line."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        model = tiny_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data = tiny_data(int(context.node_config["partition-id"]), CLIENTS)
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        torch.nn.functional.cross_entropy(model(data.train_x), data.train_y).backward()
        optimiser.step()
        reply = RecordDict({"arrays": ArrayRecord(model.state_dict())})
        reply["metrics"] = MetricRecord({"num-examples": len(data.train_x)})
        add_statistics(reply, message, model, [(data.train_x, data.train_y)])
        return Message(reply, reply_to=message)

    return app


def replies(strategy, app=None):
    grid = SimulationGrid(app or tiny_app(), CLIENTS)
    return list(grid.send_and_receive(list(strategy.configure_train(1, initial(), ConfigRecord(), grid))))


@pytest.mark.parametrize("method", ["fisher", "fedfisher(variant=diag)", "fedfisher", "regmean"])
def test_a_stock_client_app_with_one_line_serves_every_method(method):
    strategy = MergeStrategy(method, fraction_evaluate=0.0, batch_norm="mean")
    result = strategy.start(SimulationGrid(stock_app(), CLIENTS), initial(), num_rounds=2)
    assert strategy.last_report.accepted == tuple(range(CLIENTS)) or len(strategy.last_report.accepted) == CLIENTS
    assert not strategy.last_report.dropped
    assert all(torch.isfinite(t).all() for t in from_arrays(result.arrays).values())


def test_nothing_is_measured_where_nothing_is_asked():
    for app in (tiny_app(), stock_app()):
        for message in replies(MergeStrategy("fedavg"), app):
            assert list(message.content.array_records) == ["arrays"]
            assert "statistics-error" not in message.content["metrics"]


def test_what_travels_is_what_is_measured_offline():
    strategy = MergeStrategy("fedfisher", statistics={"compression": "none", "layers": ["0.*"], "examples": 5})
    for partition, message in enumerate(sorted(replies(strategy), key=lambda m: m.content["client"]["partition-id"])):
        model, data = tiny_model(), tiny_data(partition, CLIENTS)
        model.load_state_dict(from_arrays(message.content["arrays"]))
        (kind,) = strategy.pipeline.measured
        wanted = compute_statistics(model, [(data.train_x, data.train_y)], [kind])["fisher_kfac"]
        got = decode(from_arrays(message.content["statistics.fisher_kfac"]))
        assert set(got) == {"0.weight.A", "0.weight.G"}
        torch.testing.assert_close(got, wanted)
        assert message.content["metrics"]["statistics-error"] == 0


@pytest.mark.parametrize("method", ["fisher", "fedfisher", "regmean"])
def test_by_default_an_upload_is_at_most_twice_the_model(method):
    for message in replies(MergeStrategy(method)):
        arrays = message.content.array_records
        model = sum(t.numel() * 4 for t in from_arrays(arrays["arrays"]).values())
        sent = sum(t.numel() * t.element_size() for key in arrays for t in from_arrays(arrays[key]).values())
        assert sent <= 2 * model


def test_a_larger_budget_is_the_users_to_ask_for():
    fine, coarse = (
        max(m.content["metrics"]["statistics-error"] for m in replies(FedFisher(statistics={"budget": budget})))
        for budget in (10.0, 0.3)
    )
    assert fine == 0
    assert 0 < coarse < 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"needs": ["fisher"]}, "unknown statistic 'fisher'"),
        ({"needs": ["gram"], "needs-settings": ["{"]}, "cannot read its settings"),
        ({"needs": ["gram"], "statistics-compression": "zip"}, "'zip'"),
        ({"needs": "gram"}, "list of strings"),
    ],
)
def test_a_request_that_cannot_be_served_is_named(config, words):
    content = RecordDict({"arrays": initial(), "config": ConfigRecord(config)})
    message = Message(content, dst_node_id=2, message_type="train")
    (answer,) = SimulationGrid(tiny_app(), CLIENTS).send_and_receive([message])
    assert answer.has_error()
    assert words in answer.error.reason


def test_statistics_that_cannot_be_decoded_drop_their_client_alone():
    strategy = FedFisher(fraction_evaluate=0.0)
    given = replies(strategy)
    broken = given[1].content["statistics.fisher_kfac"]
    del broken[next(name for name in broken if name.endswith("#ndim"))]
    strategy.aggregate_train(1, given)
    assert len(strategy.last_report.accepted) == CLIENTS - 1
    assert "came in parts" in strategy.last_report.dropped[0].reason


def test_early_stopping_judges_on_the_servers_own_data():
    data = [(torch.randn(20, 4), torch.randint(0, 3, (20,)))]
    strategy = FedFisher(early_stopping=True, data=data, model_fn=tiny_model, fraction_evaluate=0.0)
    result = strategy.start(SimulationGrid(tiny_app(), CLIENTS), initial(), num_rounds=1)
    assert all(torch.isfinite(t).all() for t in from_arrays(result.arrays).values())
    lacking = FedFisher(early_stopping=True, fraction_evaluate=0.0)
    with pytest.raises(fedmerge.InvalidOption, match="data="):
        lacking.aggregate_train(1, replies(lacking))


def test_a_wrong_setting_is_named():
    with pytest.raises(fedmerge.UnknownName, match=r"budge.*budget"):
        FedFisher(statistics={"budge": 2})


def telling_app(line, **metrics):
    """A ClientApp that reports numbers itself, with our one line behind them or not."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        partition = int(context.node_config["partition-id"])
        data, model = tiny_data(partition, CLIENTS), tiny_model()
        with torch.no_grad():
            model[0].bias += partition + 1
        reply = RecordDict({"arrays": ArrayRecord(model.state_dict())})
        reply["metrics"] = MetricRecord(
            {"num-examples": 1, **{name: tell(partition) for name, tell in metrics.items()}}
        )
        for _ in range(line):
            add_statistics(reply, message, model, [(data.train_x, data.train_y)])
        return Message(reply, reply_to=message)

    return app


@pytest.mark.parametrize("name", ["local_steps", "local-steps"])
def test_steps_among_the_metrics_are_not_measured_again(name):
    told = {name: lambda partition: 1 + partition}
    results = []
    for line in (0, 1, 2):
        strategy = MergeStrategy("fednova", fraction_evaluate=0.0)
        app = telling_app(line, **told)
        results.append(from_arrays(strategy.start(SimulationGrid(app, CLIENTS), initial(), num_rounds=1).arrays))
        assert len(strategy.last_report.accepted) == CLIENTS
    # tau = (1 + 2 + 3) / 3 steps, each client moves its bias by as much as it takes steps: by 1 a step
    torch.testing.assert_close(results[0]["0.bias"], from_arrays(initial())["0.bias"] + 2)
    assert all(torch.equal(one[n], results[0][n]) for one in results for n in one)


def test_class_counts_may_be_a_list_among_the_metrics_while_the_rest_is_measured():
    counts = [[5, 1, 2], [2, 2, 8], [1, 9, 6]]
    strategy = MergeStrategy("maecho", fraction_evaluate=0.0)
    app = telling_app(1, class_counts=lambda partition: counts[partition])
    grid = SimulationGrid(app, CLIENTS)
    sent = replies(strategy, app)
    assert all(set(m.content.array_records) == {"arrays", "statistics.gram"} for m in sent)
    strategy.start(grid, initial(), num_rounds=1)
    assert len(strategy.last_report.accepted) == CLIENTS


def test_a_metric_that_only_happens_to_be_called_like_a_statistic_does_not_stand_for_it():
    strategy = MergeStrategy("regmean", fraction_evaluate=0.0)
    app = telling_app(1, gram=lambda partition: 0.5)
    strategy.start(SimulationGrid(app, CLIENTS), initial(), num_rounds=1)
    assert len(strategy.last_report.accepted) == CLIENTS


def test_steps_that_nobody_tells_are_asked_for_in_words():
    (message,) = [m for m in replies(MergeStrategy("fednova"), telling_app(1)) if m.metadata.src_node_id == 2]
    assert "among its metrics" in message.error.reason
