"""Laws of the three settings: modules at hand, a Flower strategy, a grid of clients."""

from __future__ import annotations

from flwr.app import ConfigRecord

import fedmerge
from fedmerge import ClientUpdate, MergeContext
from fedmerge.simulation import SimulationGrid
from fedmerge.statistics.sending.compression import decode
from fedmerge.strategies import MergeStrategy, from_arrays
from fedmerge.wire.record_values import statistics_records
from tests.contract.laws import WEIGHTS, base, law, modules, same, updates
from tests.federation import CLIENTS, initial, noisy_states, reply, tiny_app, tiny_model


@law("strategy")
def test_the_flower_strategy_gives_what_the_pipeline_gives(row):
    start = {name: t for name, t in base().items() if name in tiny_model().state_dict()}
    states = [{n: t for n, t in u.state.items() if n in start} for u in updates(row)]
    sent = [ClientUpdate(i, s, WEIGHTS[i], row.statistics(i, s)) for i, s in enumerate(states)]
    metrics = [{k: float(v) for k, v in u.statistics.get("local_steps", {}).items()} for u in sent]
    extra = [statistics_records({k: v for k, v in u.statistics.items() if k != "local_steps"}) for u in sent]
    strategy, arrays, memory = (
        MergeStrategy(row.pipeline(), fraction_evaluate=0.0, **row.known(tiny_model)),
        initial(),
        {},
    )
    grid = SimulationGrid(tiny_app(), CLIENTS)
    for number in (1, 2):
        want = row.pipeline().merge(
            sent, MergeContext(base=start, round=number, seed=0, **row.known(tiny_model)), memory
        )
        strategy.configure_train(number, arrays, ConfigRecord(), grid)
        given_replies = zip(sent, metrics, extra, strict=True)
        replies = [reply(10 + u.client, u.state, u.weight, extra=e, **m) for u, m, e in given_replies]
        arrays, _ = strategy.aggregate_train(number, replies)
        assert same(from_arrays(arrays), want.state)
        start, memory = want.state, want.memory


class Listening(MergeStrategy):
    """A strategy that keeps what it is sent and what it makes of it."""

    def __init__(self, pipeline, **known):
        super().__init__(pipeline, **known)
        self.heard = []

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies[::-1])
        self.heard.append((replies, arrays))
        return arrays, metrics


def read(message):
    """A reply as a client update, by Flower's own decoding."""
    arrays = message.content.array_records
    found = {key.removeprefix("statistics."): arrays[key].to_torch_state_dict() for key in arrays if "." in key}
    statistics = {name: decode(sent) for name, sent in found.items()}
    client = message.content.config_records["client"]["partition-id"]
    examples = message.content.metric_records["metrics"]["num-examples"]
    return ClientUpdate(client, arrays["arrays"].to_torch_state_dict(), examples, statistics)


@law("grid")
def test_two_rounds_on_a_grid_give_what_the_pipeline_gives_by_hand(row):
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        strategy = Listening(row.pipeline(), **row.known(tiny_model))
        result = strategy.start(grid, initial(), num_rounds=2)
    assert strategy.last_report.accepted == tuple(range(CLIENTS))
    assert not strategy.last_report.dropped
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    start, memory = tiny_model().state_dict(), {}
    for number, (replies, arrays) in enumerate(strategy.heard, 1):
        sent = [read(message) for message in replies]
        assert [list(update.statistics) for update in sent] == [list(row.pipeline().needs)] * CLIENTS
        want = row.pipeline().merge(
            sent, MergeContext(base=start, round=number, seed=0, **row.known(tiny_model)), memory
        )
        assert same(from_arrays(arrays), want.state)
        assert not same(want.state, start)
        start, memory = want.state, want.memory
    assert number == 2
    assert same(from_arrays(result.arrays), start)
    assert same(strategy.memory, memory)


@law("modules")
def test_merges_modules_at_hand(row):
    models, keywords = modules(row)
    result = fedmerge.merge(models, row.method, seed=3, **keywords)
    sent = [ClientUpdate(i, s, WEIGHTS[i], row.statistics(i, s)) for i, s in enumerate(noisy_states())]
    context = MergeContext(base=tiny_model().state_dict(), seed=3, **row.known(tiny_model))
    want = row.pipeline().merge(sent, context)
    if want.routing is not None:
        assert same(result.routing.to_tensors(), want.routing.to_tensors())
        result = result.model
    assert same(result.state_dict(), want.state)
    assert all(same(model.state_dict(), state) for model, state in zip(models, noisy_states(), strict=True))
    assert same(keywords["base"].state_dict(), tiny_model().state_dict())
