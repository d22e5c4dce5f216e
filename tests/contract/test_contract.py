"""The laws that every registered method keeps."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmerge
from fedmerge import BadUpdate, ClientUpdate, MergeContext, NoUsableUpdates
from fedmerge.records import RunRecord, read_checkpoint
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy, from_arrays
from tests.contract.table import ROWS
from tests.federation import CLIENTS, initial, noisy_states, reply, tiny_app, tiny_model

WEIGHTS = (5.0, 1.0, 14.0)
LAWS = settings(max_examples=15, deadline=None, derandomize=True)
every_method = pytest.mark.parametrize("row", ROWS, ids=str)


def excused(row, law):
    if law in row.excused:
        pytest.skip(row.excused[law])


def base(dtype=torch.float32):
    """The initial model, with a 0-d parameter and buffers of other kinds besides its own."""
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tiny_model().state_dict().items()}
    return state | {"temperature": torch.tensor(1.5, dtype=dtype), "seen": torch.tensor([False, True])}


def updates(row, dtype=torch.float32, weights=WEIGHTS):
    result = []
    for client, state in enumerate(noisy_states(len(weights))):
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        cast |= {"temperature": torch.tensor(1.5 + client, dtype=dtype), "seen": torch.tensor([client == 0, False])}
        result.append(ClientUpdate(client, cast, weights[client], row.statistics(client)))
    return result


def merged(row, given_updates, *, start=None, memory=None, **options):
    return row.pipeline(**options).merge(given_updates, MergeContext(base=start or base(), seed=1), memory)


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in {*one, *two})


def test_every_registered_method_has_a_row():
    assert {row.method.split("+")[0] for row in ROWS} == set(fedmerge.methods())


@every_method
def test_copies_of_a_model_merge_to_that_model(row):
    excused(row, "copies")
    one = updates(row)[0]
    copies = [ClientUpdate(i, one.state, weight, one.statistics) for i, weight in enumerate(WEIGHTS)]
    result = merged(row, copies).state
    for name, tensor in one.state.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-6)


@every_method
def test_clients_that_did_not_move_leave_the_model_as_it_is(row):
    if row.options.get("noise"):
        pytest.skip("noise is added by design")
    still = [ClientUpdate(u.client, base(), u.weight, u.statistics) for u in updates(row)]
    result = merged(row, still).state
    for name, tensor in base().items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-6)


@every_method
@LAWS
@given(order=st.permutations(range(CLIENTS)))
def test_order_of_arrival_changes_no_bit(row, order):
    sent = updates(row)
    assert same(merged(row, sent).state, merged(row, [sent[i] for i in order]).state)


@every_method
@LAWS
@given(
    scale=st.floats(1e-3, 1e5),
    weights=st.lists(st.integers(1, 10_000), min_size=CLIENTS, max_size=CLIENTS),
)
def test_only_ratios_of_weights_matter(row, scale, weights):
    one = merged(row, updates(row, weights=[float(w) for w in weights])).state
    two = merged(row, updates(row, weights=[scale * w for w in weights])).state
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)


@every_method
def test_inputs_are_left_untouched(row):
    sent, start = updates(row), base()
    before = [{name: t.clone() for name, t in u.state.items()} for u in sent]
    first = merged(row, sent, start=start)
    memory = {name: t.clone() for name, t in first.memory.items()}
    merged(row, sent, start=start, memory=first.memory)
    assert same(memory, first.memory)
    assert same(start, base())
    assert all(same(u.state, copy) for u, copy in zip(sent, before, strict=True))


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_names_shapes_and_dtypes_survive(row, dtype):
    result = merged(row, updates(row, dtype), start=base(dtype)).state
    want = base(dtype)
    assert list(result) == list(want)
    for name, tensor in want.items():
        assert (result[name].dtype, result[name].shape) == (tensor.dtype, tensor.shape), name
    assert result["1.num_batches_tracked"].item() == CLIENTS  # the largest counter
    assert result["seen"].tolist() == [True, False]  # any client's


@every_method
def test_same_seed_same_bits(row):
    one, two = merged(row, updates(row)), merged(row, updates(row))
    assert same(one.state, two.state)
    assert same(one.memory, two.memory)


def spoilt(update, how):
    state = dict(update.state)
    if how == "nan":
        state["0.weight"] = state["0.weight"].clone()
        state["0.weight"][0, 0] = float("nan")
    elif how == "inf":
        state["3.bias"] = state["3.bias"] * float("inf")
    elif how == "missing":
        del state["0.weight"]
    elif how == "unknown":
        state["extra.weight"] = torch.zeros(1)
    elif how == "shape":
        state["0.weight"] = state["0.weight"].T
    elif how == "kind":
        state["0.weight"] = state["0.weight"].long()
    weight = {"no examples": 0.0, "negative": -1.0, "nan weight": float("nan")}.get(how, update.weight)
    return ClientUpdate(update.client, state, weight, update.statistics)


FAULTS = {
    "nan": "0.weight",
    "inf": "3.bias",
    "missing": "0.weight",
    "unknown": "extra.weight",
    "shape": "0.weight",
    "kind": "0.weight",
    "no examples": "examples",
    "negative": "examples",
    "nan weight": "examples",
}


@every_method
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_update_is_dropped_and_listed_or_raised(row, fault, caplog):
    good = updates(row)
    bad = [good[0], spoilt(good[1], fault), good[2]]
    result = merged(row, bad)
    assert same(result.state, merged(row, [good[0], good[2]]).state)
    assert result.accepted == (0, 2)
    (dropped,) = result.dropped
    assert dropped.client == 1
    assert FAULTS[fault] in dropped.reason
    assert "client 1" in caplog.text
    with pytest.raises(BadUpdate, match="client 1") as caught:
        merged(row, bad, on_bad_update="raise")
    assert FAULTS[fault] in str(caught.value)


@every_method
def test_nothing_usable_is_an_error_that_says_why(row):
    bad = [spoilt(update, "nan") for update in updates(row)]
    with pytest.raises(NoUsableUpdates, match=r"0 usable updates.*0\.weight.*NaN"):
        merged(row, bad)
    with pytest.raises(NoUsableUpdates, match="at least 3 wanted"):
        merged(row, [*updates(row)[:2], bad[2]], min_updates=3)
    with pytest.raises(NoUsableUpdates):
        merged(row, [])


@every_method
def test_missing_statistics_are_named(row):
    needs = row.pipeline().needs
    if not needs:
        pytest.skip("needs no statistics")
    bare = [ClientUpdate(u.client, u.state, u.weight) for u in updates(row)]
    with pytest.raises(NoUsableUpdates, match=f"statistic '{needs[0]}' is missing"):
        merged(row, bare)


@every_method
def test_memory_survives_a_checkpoint(row, tmp_path):
    first = merged(row, updates(row))
    record = RunRecord(tmp_path / "run", {})
    record.checkpoint(1, first.state, first.memory)
    _, state, memory = read_checkpoint(record.finish())
    assert same(state, first.state)
    straight = merged(row, updates(row), start=first.state, memory=first.memory)
    resumed = merged(row, updates(row), start=state, memory=memory)
    assert same(straight.state, resumed.state)
    assert same(straight.memory, resumed.memory)


@every_method
def test_memory_matters_where_there_is_any(row):
    first = merged(row, updates(row))
    if not first.memory:
        pytest.skip("keeps nothing between rounds")
    with_memory = merged(row, updates(row), start=first.state, memory=first.memory).state
    without = merged(row, updates(row), start=first.state).state
    assert not same(with_memory, without)


@every_method
def test_a_stream_gives_what_a_list_gives(row):
    assert same(merged(row, iter(updates(row))).state, merged(row, updates(row)).state)


@every_method
def test_the_flower_strategy_gives_what_the_pipeline_gives(row):
    start = {name: t for name, t in base().items() if name in tiny_model().state_dict()}
    sent = [
        ClientUpdate(u.client, {n: t for n, t in u.state.items() if n in start}, u.weight, u.statistics)
        for u in updates(row)
    ]
    metrics = [{k: float(v) for s in u.statistics.values() for k, v in s.items()} for u in sent]
    strategy, arrays, memory = MergeStrategy(row.pipeline(), fraction_evaluate=0.0), initial(), {}
    grid = SimulationGrid(tiny_app(), CLIENTS)
    for number in (1, 2):
        want = row.pipeline().merge(sent, MergeContext(base=start, round=number, seed=0), memory)
        strategy.configure_train(number, arrays, ConfigRecord(), grid)
        replies = [reply(10 + u.client, u.state, u.weight, **m) for u, m in zip(sent, metrics, strict=True)]
        arrays, _ = strategy.aggregate_train(number, replies)
        assert same(from_arrays(arrays), want.state)
        start, memory = want.state, want.memory


@every_method
def test_runs_as_a_flower_strategy(row):
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        strategy = MergeStrategy(row.pipeline())
        result = strategy.start(grid, initial(), num_rounds=2)
    assert strategy.last_report.accepted == tuple(range(CLIENTS))
    assert not strategy.last_report.dropped
    assert not same(from_arrays(result.arrays), from_arrays(initial()))
    assert set(result.evaluate_metrics_clientapp) == {1, 2}


@every_method
def test_merges_modules_at_hand(row):
    models = []
    for state in noisy_states():
        model = tiny_model()
        model.load_state_dict(state)
        models.append(model)
    keywords = dict(
        weights=WEIGHTS,
        base=tiny_model(),
        statistics=[row.statistics(i) for i in range(CLIENTS)],
        seed=0,
        **row.options,
    )
    result = fedmerge.merge(models, row.method, **keywords)
    sent = [ClientUpdate(i, s, WEIGHTS[i], row.statistics(i)) for i, s in enumerate(noisy_states())]
    want = row.pipeline().merge(sent, MergeContext(base=tiny_model().state_dict(), seed=0)).state
    assert same(result.state_dict(), want)
    assert all(same(model.state_dict(), state) for model, state in zip(models, noisy_states(), strict=True))
    models[1][0].weight.data[0, 0] = float("nan")
    with pytest.raises(BadUpdate, match=r"client 1.*0\.weight"):
        fedmerge.merge(models, row.method, **keywords)
