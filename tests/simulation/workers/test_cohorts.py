"""Rounds without a message per client: the same outcome as with messages, in every setting."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from ray.exceptions import RayError
from torch import nn

from fedmerge.data import ClientData
from fedmerge.errors import NoUsableUpdates
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.grids.simulation_grid import make_workers
from fedmerge.simulation.workers.cohort_work import answer
from fedmerge.simulation.workers.flower_task import FIRST_NODE
from fedmerge.simulation.workers.ray_actor import train_on
from fedmerge.simulation.workers.workers import serial_pieces
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.strategies.order import Order
from fedmerge.strategies.ordering import fill_config
from fedmerge.training import LocalTraining
from fedmerge.update import MergeContext
from tests.federation import CLIENTS, TRAINING, initial, plain_model, slow_app, tiny_app, tiny_data, tiny_model

METHODS = ["fedavg", "fednova", "fedatt", "fisher", "regmean", "gradient_matching", "fedfisher", "mats"]


class Messages(MergeStrategy):
    """One that looks at replies, and so gets messages."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, list(replies))


def run(strategy, grid, rounds=2):
    measured = MeasuredGrid(grid)
    result = strategy.start(measured, initial(), num_rounds=rounds)
    exchanges = [e for e in measured.take() if e.kind == "train"]
    return from_arrays(result.arrays), result, exchanges


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_norm", ["mean", "pooled", "recalibrate", "local"])
def test_without_messages_to_the_last_bit(method, batch_norm):
    if batch_norm != "mean" and method not in ("fedavg", "fedfisher"):
        return
    outcomes = []
    for kind in (Messages, MergeStrategy):
        with SimulationGrid(tiny_app(), CLIENTS, engine="serial") as grid:
            strategy = kind(method, model_fn=tiny_model, batch_norm=batch_norm)
            state, result, exchanges = run(strategy, grid)
            facts = [(e.ok, e.failures, e.bytes_up, e.bytes_down) for e in exchanges]
            metrics = [dict(m) for m in result.train_metrics_clientapp.values()]
            outcomes.append((state, facts, metrics, strategy.last_report, [e.engine for e in exchanges]))
    (state, facts, metrics, report, engines), (other, *others, other_engines) = outcomes
    assert engines == ["messages"] * 2
    assert other_engines == ["serial"] * 2
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name
    assert others == [facts, metrics, report]


# Not mats: on three clients with next to no data its system is close to singular, and what comes out is the last bits'.
@pytest.mark.parametrize("method", METHODS[:-1])
def test_stacked_clients_end_where_single_ones_do(method):
    states = []
    for engine in ("serial", "stacked"):
        with SimulationGrid(tiny_app(), CLIENTS, engine=engine) as grid:
            state, _, exchanges = run(MergeStrategy(method, model_fn=tiny_model), grid)
        assert [e.engine for e in exchanges] == [engine] * 2
        states.append(state)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_whoever_fails_is_named_and_stops_nobody(engine):
    def data(client, total):
        given = tiny_data(client, total)
        if client == 0:
            raise OSError("the disk is gone")
        if client == 1:
            return ClientData(given.train_x * 1e30, given.train_y, given.held_out_x, given.held_out_y)
        return given

    app = client_app(tiny_model, data, training=LocalTraining(epochs=1))
    with SimulationGrid(app, CLIENTS, engine=engine) as grid:
        strategy = MergeStrategy("fedavg", model_fn=tiny_model, fraction_evaluate=0.0)
        state, _, (exchange,) = run(strategy, grid, rounds=1)
        (failure,) = exchange.failures
        assert failure.node == 2
        assert failure.reason.startswith("client 0: OSError: the disk is gone")
        assert "Traceback" in failure.reason
        assert strategy.last_report.accepted == (2,)
        assert [bad.client for bad in strategy.last_report.dropped] == [1]
        assert all(torch.isfinite(t).all() for t in state.values())
        strategy = MergeStrategy("fedavg", model_fn=tiny_model, fraction_evaluate=0.0, min_clients=2)
        with pytest.raises(NoUsableUpdates, match="client 1"):
            run(strategy, grid, rounds=1)


def test_a_model_that_cannot_be_stacked_trains_one_by_one():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.lstm(x[:, None])[0][:, -1])

    app = client_app(Recurrent, tiny_data, training=LocalTraining(epochs=1))
    grid = SimulationGrid(app, CLIENTS)
    measured = MeasuredGrid(grid)
    MergeStrategy("fedavg", model_fn=Recurrent, fraction_evaluate=0.0).start(
        measured, to_arrays(Recurrent().state_dict()), num_rounds=1
    )
    assert [e.engine for e in measured.take()] == ["serial"]


def test_stacking_that_was_asked_for_and_cannot_be_is_told_once(caplog):
    def rare():
        return nn.Sequential(nn.Linear(4, 3), nn.RReLU())

    app = client_app(rare, tiny_data, training=LocalTraining(epochs=1))
    with SimulationGrid(app, 2, engine="stacked") as grid:
        strategy = MergeStrategy("fedavg", model_fn=rare, fraction_evaluate=0.0)
        strategy.start(grid, to_arrays(rare().state_dict()), num_rounds=2)
    told = [record.getMessage() for record in caplog.records if "stacked weights" in record.getMessage()]
    assert len(told) == 1
    assert "rrelu" in told[0]


def test_the_record_has_how_clients_trained_not_what_was_asked_for(caplog):
    def by_hand(outputs, targets):
        return outputs.logsumexp(1).mean() - outputs.gather(1, targets[:, None]).mean()

    engines = {}
    for loss in (None, by_hand):
        app = client_app(tiny_model, tiny_data, training=LocalTraining(epochs=1), task=loss)
        with SimulationGrid(app, CLIENTS, engine="stacked") as grid:
            strategy = MergeStrategy("fedavg", model_fn=tiny_model, fraction_evaluate=0.0)
            engines[loss] = [exchange.engine for exchange in run(strategy, grid)[2]]
    assert engines == {None: ["stacked"] * 2, by_hand: ["serial"] * 2}
    told = [record.getMessage() for record in caplog.records if "stacked weights" in record.getMessage()]
    assert len(told) == 1
    assert "the loss by_hand" in told[0]


def test_whoever_wants_messages_gets_them():
    seen = []

    class Spy(SimulationGrid):
        def send_and_receive(self, messages, *, timeout=None):
            seen.extend(message.metadata.message_type for message in messages)
            return super().send_and_receive(messages, timeout=timeout)

    def start(strategy, *mods):
        seen.clear()
        strategy.start(Spy(tiny_app(*mods, model_fn=plain_model), CLIENTS), initial(plain_model), num_rounds=1)
        return "train" not in seen

    def mod(message, context, call_next):
        return call_next(message, context)

    def metrics(contents, key):
        assert all(isinstance(content, RecordDict) for content in contents)
        return contents[0]["metrics"]

    wrapped = DifferentialPrivacyServerSideFixedClipping(MergeStrategy("fedavg"), 0.1, 1.0, CLIENTS)
    assert start(MergeStrategy("fedavg"))
    assert not start(wrapped)
    assert not start(MergeStrategy("fedavg"), mod)
    assert not start(Messages("fedavg"))
    assert not start(MergeStrategy("fedavg", train_metrics_aggr_fn=metrics))


def test_a_subclass_reads_messages_unless_it_says_that_it_does_not():
    class Timed(MergeStrategy):
        reads_messages = False

        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    class Below(Messages):
        pass

    class BelowTimed(Timed):
        pass

    class Counting:
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, list(replies))

    class Mixed(Counting, MergeStrategy):
        pass

    kinds = (MergeStrategy, Messages, Below, Mixed, Timed, BelowTimed)
    assert [kind.reads_messages for kind in kinds] == [False, True, True, True, False, True]
    engines = []
    for kind in (Timed, Below):
        _, _, exchanges = run(kind("fedavg"), SimulationGrid(tiny_app(), CLIENTS, engine="serial"), rounds=1)
        engines += [exchange.engine for exchange in exchanges]
    assert engines == ["serial", "messages"]


@pytest.mark.parametrize("method", ["fedma", "gamf"])
def test_stages_after_a_cohort_find_the_model_that_clients_kept(method):
    states = []
    for kind in (Messages, MergeStrategy):
        with SimulationGrid(tiny_app(model_fn=plain_model), CLIENTS, engine="serial") as grid:
            strategy = kind(method, model_fn=plain_model, example=torch.zeros(2, 4), fraction_evaluate=0.0)
            result = strategy.start(grid, initial(plain_model), num_rounds=1)
            states.append(from_arrays(result.arrays))
            assert strategy.last_report.accepted == (0, 1, 2)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


class Foreign(Grid):
    """A grid of somebody else's, which knows of messages only."""

    def __init__(self, inner):
        self.inner, self.sent = inner, []

    set_run = run = create_message = push_messages = pull_messages = None

    def get_node_ids(self):
        return self.inner.get_node_ids()

    def send_and_receive(self, messages, *, timeout=None):
        self.sent.append(messages)
        return self.inner.send_and_receive(messages, timeout=timeout)


@pytest.mark.parametrize("within", [lambda grid: grid, MeasuredGrid])
def test_a_grid_that_knows_no_orders_is_sent_their_messages(within):
    ours, _, _ = run(MergeStrategy("fedavg"), SimulationGrid(tiny_app(), CLIENTS, engine="serial"))
    foreign = Foreign(SimulationGrid(tiny_app(), CLIENTS))
    result = MergeStrategy("fedavg").start(within(foreign), initial(), num_rounds=2)
    theirs = from_arrays(result.arrays)
    # Flower's grid of a deployment reads them twice: it numbers them, then it sends those that have numbers.
    trained = [sent for sent in foreign.sent if sent[0].metadata.message_type == "train"]
    assert [len(sent) for sent in trained] == [CLIENTS] * 2
    assert all(message.metadata.message_id for sent in trained for message in sent)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_known_clients_cost_nothing():
    asked = []

    def data(client, total):
        asked.append(client)
        return tiny_data(client % 3, total)

    with SimulationGrid(client_app(tiny_model, data, training=LocalTraining(epochs=1)), 1_000_000_000) as grid:
        strategy = MergeStrategy("fedavg", fraction_train=1e-8, fraction_evaluate=0.0, min_train_nodes=1)
        run(strategy, grid, rounds=1)
    assert len(set(asked)) == 10


def on_ray(workers, disturb=lambda: None, clients=12):
    app = slow_app()
    timer = threading.Timer(0.5, disturb)
    timer.start()
    with SimulationGrid(app, clients, workers=workers) as grid:
        outcome = run(MergeStrategy("fedavg", model_fn=tiny_model, fraction_evaluate=0.0), grid)
    timer.join()
    return outcome


def test_a_worker_killed_in_mid_round_changes_nothing(ray_here):
    workers = make_workers(2, "serial")
    try:
        state, _, exchanges = on_ray(workers)
        pid = ray_here.get(workers._actors[0].ping.remote())[1]
        again, _, disturbed = on_ray(workers, lambda: os.kill(pid, signal.SIGKILL))
        assert [e.ok for e in disturbed] == [12, 12]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        workers.close()
    assert all(torch.equal(state[name], again[name]) for name in state)
    for before, after in zip(exchanges, disturbed, strict=True):
        assert (before.ok, before.failures, before.bytes_up) == (after.ok, after.failures, after.bytes_up)
    in_process, _, _ = on_ray(make_workers(1, "serial"))
    assert all(torch.equal(state[name], tensor) for name, tensor in in_process.items())


class _Here:
    """What looks like a pool of workers on Ray, and runs the work here; the first `failing` calls are lost."""

    def __init__(self, workers, side, order, failing=0):
        self._workers, self._failing = workers, failing
        self.train = SimpleNamespace(remote=lambda app, told, nodes, *rest: answer(side, order, nodes, *rest))

    def __len__(self):
        return self._workers

    def run(self, calls, limits):
        for call in calls:
            self._failing -= 1
            yield RayError("lost") if self._failing >= 0 else call(self)


@pytest.mark.parametrize(
    ("method", "batch_norm"),
    [
        *((method, norm) for method in ("fedavg", "fednova", "fisher", "norm_clipping") for norm in ("mean", "pooled")),
        ("fedavg", "local"),
    ],
)
def test_any_number_of_workers_gives_the_same_bits(method, batch_norm):
    """More clients than there are pieces, so that sums of sums are taken."""
    clients = 2 * len(serial_pieces(range(1000))) + 7
    side = client_app(tiny_model, lambda i, total: tiny_data(i % CLIENTS, total), training=TRAINING).client
    strategy = MergeStrategy(method, model_fn=tiny_model, batch_norm=batch_norm)
    nodes = range(FIRST_NODE, FIRST_NODE + clients)
    context = MergeContext(base=tiny_model().state_dict())
    config = ConfigRecord()
    fill_config(config, strategy.pipeline, 0, 1)
    order = Order(RecordDict({"config": config}), nodes, strategy.pipeline, context, None)
    answers = [
        train_on(
            _Here(workers, side, order, failing),
            [],
            [],
            order,
            nodes,
            clients,
            "serial",
            kept={node: RecordDict() for node in nodes} if order.keeps else {},
        )
        for workers, failing in ((1, 0), (2, 0), (5, 0), (3, 2))
    ]
    assert all(set(a.kept) == (set(nodes) if order.keeps else set()) for a in answers)
    for node, first in answers[0].kept.items():
        for other in answers[1:]:
            mine, theirs = (from_arrays(kept["fedmerge.merging.buffers"]) for kept in (first, other.kept[node]))
            assert mine
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    merged = [strategy.pipeline.finish(a.partial, context, None, None).state for a in answers]
    for state in merged[1:]:
        assert all(torch.equal(tensor, merged[0][name]) for name, tensor in state.items())
    assert len({tuple(one.client for one in a.trained) for a in answers}) == 1


@pytest.mark.study
def test_a_node_lost_in_mid_round_changes_nothing(ray_away, monkeypatch):
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        workers = make_workers("ray", "serial")
        assert len(workers._leaders) == 3
        state, _, _ = on_ray(workers)
        lost, _, exchanges = on_ray(workers, lambda: cluster.remove_node(nodes[1], allow_graceful=False))
        workers.close()
    finally:
        cluster.shutdown()
    assert [e.failures for e in exchanges] == [(), ()]
    assert all(torch.equal(state[name], lost[name]) for name in state)
    in_process, _, _ = on_ray(1)
    for name, tensor in in_process.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.fixture
def ray_here():
    """Ray, however it is started; ended after the test."""
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


ray_away = ray_here
