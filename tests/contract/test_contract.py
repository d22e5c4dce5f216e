"""The laws that every registered method keeps."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedmerge
from fedmerge import BadUpdate, ClientUpdate, MergeContext, NoUsableUpdates
from fedmerge.records import RunRecord, read_checkpoint
from fedmerge.simulation import SimulationGrid
from fedmerge.statistics.compression import decode
from fedmerge.strategies import MergeStrategy, from_arrays
from fedmerge.strategies.wire import statistics_records
from tests.contract.table import ROWS
from tests.federation import CLIENTS, initial, noisy_states, reply, tiny_app, tiny_model

WEIGHTS = (5.0, 1.0, 14.0)
DRAWN = settings(max_examples=12, deadline=None, derandomize=True)
LAWS = set()


def law(name):
    """A law that every row keeps, but for those excused from it by this name."""
    LAWS.add(name)

    def marks(row):
        return [pytest.mark.skip(reason=row.excused[name])] if name in row.excused else []

    return pytest.mark.parametrize("row", [pytest.param(row, id=str(row), marks=marks(row)) for row in ROWS])


def base(dtype=torch.float32):
    """The initial model, with a 0-d parameter and buffers of other kinds besides its own."""
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tiny_model().state_dict().items()}
    return state | {"temperature": torch.tensor(1.5, dtype=dtype), "seen": torch.tensor([False, True])}


def updates(row, dtype=torch.float32, weights=WEIGHTS):
    result = []
    for client, state in enumerate(noisy_states(len(weights))):
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        cast |= {"temperature": torch.tensor(1.5 + client, dtype=dtype), "seen": torch.tensor([client == 0, False])}
        result.append(ClientUpdate(client, cast, weights[client], row.statistics(client, cast)))
    return result


def merged(row, given_updates, *, start=None, memory=None, **options):
    return row.pipeline(**options).merge(given_updates, MergeContext(base=start or base(), seed=1), memory)


def same(one, two):
    """Whether two states have the same names, dtypes and bits."""
    return one.keys() == two.keys() and all(t.dtype == two[n].dtype and torch.equal(t, two[n]) for n, t in one.items())


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def test_every_registered_method_has_a_row():
    assert {row.method.split("+")[0] for row in ROWS} == set(fedmerge.methods())


def test_rows_are_excused_from_laws_that_exist_for_reasons_in_words():
    for row in ROWS:
        assert set(row.excused) <= LAWS, row
        assert all(len(reason.split()) > 4 for reason in row.excused.values()), row


@law("copies")
def test_copies_of_a_model_merge_to_that_model(row):
    one = updates(row)[0]
    copies = [ClientUpdate(i, one.state, weight, one.statistics) for i, weight in enumerate(WEIGHTS)]
    result = merged(row, copies).state
    for name, tensor in one.state.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-6)


@law("one client")
def test_one_client_gives_its_own_model(row):
    for update in updates(row):
        result = merged(row, [update]).state
        for name, tensor in update.state.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-6)


@law("still")
def test_clients_that_did_not_move_leave_the_model_as_it_is(row):
    still = [ClientUpdate(u.client, base(), u.weight, u.statistics) for u in updates(row)]
    result = merged(row, still).state
    for name, tensor in base().items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-6)


@law("order")
@DRAWN
@given(order=st.permutations(range(CLIENTS)))
def test_order_of_arrival_changes_no_bit(row, order):
    sent = updates(row)
    assert same(merged(row, sent).state, merged(row, [sent[i] for i in order]).state)


@law("ratios")
@DRAWN
@given(
    scale=st.floats(1e-3, 1e5),
    weights=st.lists(st.integers(1, 10_000), min_size=CLIENTS, max_size=CLIENTS),
)
def test_only_ratios_of_weights_matter(row, scale, weights):
    one = merged(row, updates(row, weights=[float(w) for w in weights])).state
    two = merged(row, updates(row, weights=[scale * w for w in weights])).state
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)


SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=3)


@law("rows")
@DRAWN
@given(shapes=SHAPES, count=st.integers(1, 4), seed=st.integers(0, 9))
def test_reordering_the_rows_of_all_alike_reorders_the_result_alike(row, shapes, count, seed):
    generator = torch.Generator().manual_seed(seed)
    start = {f"layer{i}.weight": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    sent = [{n: t + torch.randn(t.shape, generator=generator) for n, t in start.items()} for _ in range(count)]
    order = {n: torch.randperm(len(t), generator=generator) for n, t in start.items() if t.ndim}

    def reordered(state):
        return {n: t[order[n]] if n in order else t for n, t in state.items()}

    def result(change):
        given_updates = [ClientUpdate(i, change(s), 1.0 + i, row.statistics(i, s)) for i, s in enumerate(sent)]
        return merged(row, given_updates, start=change(start)).state

    plain, other = result(dict), result(reordered)
    assert {n: t.shape for n, t in plain.items()} == {n: t.shape for n, t in start.items()}
    torch.testing.assert_close(reordered(plain), other, rtol=1e-5, atol=1e-5)


@law("inputs")
def test_inputs_are_left_untouched(row):
    sent, start = updates(row), base()
    states = [copied(u.state) for u in sent]
    statistics = [{name: copied(value) for name, value in u.statistics.items()} for u in sent]
    first = merged(row, sent, start=start)
    memory = copied(first.memory)
    merged(row, sent, start=start, memory=first.memory)
    assert same(memory, first.memory)
    assert same(start, base())
    assert all(same(u.state, before) for u, before in zip(sent, states, strict=True))
    for update, before in zip(sent, statistics, strict=True):
        assert all(same(update.statistics[name], value) for name, value in before.items())


@law("own memory")
@pytest.mark.parametrize("batch_norm", ["mean", "pooled", "local"])
def test_the_result_shares_no_memory_with_what_went_in(row, batch_norm):
    sent, start = updates(row)[:1], base()  # one alone is the likeliest to be handed through
    first = merged(row, sent, start=start, batch_norm=batch_norm)
    second = merged(row, sent, start=start, memory=first.memory, batch_norm=batch_norm)
    given_tensors = [*start.values(), *first.memory.values(), *(t for u in sent for t in u.state.values())]
    given_pointers = {t.untyped_storage().data_ptr() for t in given_tensors}
    returned = [*second.state.values(), *second.memory.values()]
    assert not given_pointers & {t.untyped_storage().data_ptr() for t in returned}
    assert len({t.untyped_storage().data_ptr() for t in returned}) == len(returned)


@law("forms")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_names_shapes_and_dtypes_survive(row, dtype):
    result = merged(row, updates(row, dtype), start=base(dtype)).state
    want = base(dtype)
    assert list(result) == list(want)
    for name, tensor in want.items():
        assert (result[name].dtype, result[name].shape) == (tensor.dtype, tensor.shape), name
    assert result["1.num_batches_tracked"].item() == CLIENTS  # the largest counter
    assert result["seen"].tolist() == [True, False]  # any client's


@law("rounding")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_one_rounding_of_the_result(row, dtype):
    generator = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(16, 8, generator=generator).to(dtype)}
    sent = [(3 * torch.randn(16, 8, generator=generator)).to(dtype) for _ in WEIGHTS]

    def result(kind):
        given_updates = [
            ClientUpdate(i, {"w": w.to(kind)}, WEIGHTS[i], row.statistics(i, {"w": w})) for i, w in enumerate(sent)
        ]
        return merged(row, given_updates, start={"w": start["w"].to(kind)}).state["w"].double()

    got, want = result(dtype), result(torch.float64)
    spacing = torch.finfo(dtype).eps * torch.exp2(want.abs().log2().floor())
    assert ((got - want).abs() <= 0.51 * spacing).all()


@law("seed")
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
    return ClientUpdate(update.client, state, BAD_WEIGHTS.get(how, update.weight), update.statistics)


BAD_WEIGHTS = {"no examples": 0.0, "negative": -1.0, "nan weight": float("nan"), "infinite weight": float("inf")}


FAULTS = {
    "nan": "0.weight",
    "inf": "3.bias",
    "missing": "0.weight",
    "unknown": "extra.weight",
    "shape": "0.weight",
    "kind": "0.weight",
    **dict.fromkeys(BAD_WEIGHTS, "number of examples"),
}


@law("bad updates")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_update_is_dropped_and_listed_or_raised(row, fault, caplog):
    good = updates(row)
    bad = [good[0], spoilt(good[1], fault), good[2]]
    result, without = merged(row, bad), merged(row, [good[0], good[2]])
    assert same(result.state, without.state)
    assert same(result.memory, without.memory)
    assert result.accepted == (0, 2)
    (dropped,) = result.dropped
    assert dropped.client == 1
    assert FAULTS[fault] in dropped.reason
    assert "client 1" in caplog.text
    with pytest.raises(BadUpdate, match="client 1") as caught:
        merged(row, bad, on_bad_update="raise")
    assert FAULTS[fault] in str(caught.value)


@law("bad first")
@pytest.mark.parametrize(("place", "fault"), [(0, "missing"), (2, "nan")])
def test_a_bad_update_does_no_harm_wherever_it_stands(row, place, fault):
    sent = updates(row)
    sent[place] = spoilt(sent[place], fault)
    good = [update for update in sent if update.client != place]
    assert same(merged(row, sent).state, merged(row, good).state)


def module(state):
    made = tiny_model()
    made.load_state_dict(state)
    return made


def modules(row):
    """Models at hand, and the keywords that the row's method takes besides."""
    keywords = {
        "base": tiny_model(),
        "statistics": [row.statistics(i, tiny_model().state_dict()) for i in range(CLIENTS)],
        **row.options,
    }
    return [module(state) for state in noisy_states()], {"weights": list(WEIGHTS), **keywords}


@law("bad models")
@pytest.mark.parametrize("fault", ["nan", "missing", "unknown", "shape", *BAD_WEIGHTS])
def test_a_bad_model_at_hand_is_an_error_that_names_it(row, fault):
    place, (models, keywords) = 1, modules(row)
    bad = models[place]
    if fault == "nan":
        bad[0].weight.data[0, 0] = float("nan")
    elif fault == "missing":
        bad[3] = nn.Linear(6, 3, bias=False)
    elif fault == "unknown":
        bad.append(nn.Linear(1, 1))
    elif fault == "shape":
        bad[0] = nn.Linear(5, 6)
    else:
        keywords["weights"][place] = BAD_WEIGHTS[fault]
    tensor = {"nan": "0.weight", "missing": "3.bias", "unknown": "4.weight", "shape": "0.weight"}
    with pytest.raises(BadUpdate) as caught:
        fedmerge.merge(models, row.method, **keywords)
    assert caught.value.client == place
    assert f"client {place}" in str(caught.value)
    assert tensor.get(fault, "number of examples") in caught.value.reason


@law("nothing usable")
def test_nothing_usable_is_an_error_that_says_why(row):
    bad = [spoilt(update, "nan") for update in updates(row)]
    with pytest.raises(NoUsableUpdates, match=r"0 usable updates.*0\.weight.*NaN"):
        merged(row, bad)
    with pytest.raises(NoUsableUpdates, match="at least 3 wanted"):
        merged(row, [*updates(row)[:2], bad[2]], min_updates=3)
    with pytest.raises(NoUsableUpdates):
        merged(row, [])


@law("missing statistics")
def test_missing_statistics_are_named(row):
    needs = row.pipeline().needs
    if not needs:
        assert not row.statistics(0, base())
        return
    bare = [ClientUpdate(u.client, u.state, u.weight) for u in updates(row)]
    with pytest.raises(NoUsableUpdates, match=f"statistic '{needs[0]}' is missing"):
        merged(row, bare)


@law("checkpoint")
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


@law("memory")
def test_memory_matters_where_there_is_any(row):
    first = merged(row, updates(row))
    assert bool(first.memory) == row.remembers
    if not row.remembers:
        return
    with_memory = merged(row, updates(row), start=first.state, memory=first.memory).state
    without = merged(row, updates(row), start=first.state).state
    assert not same(with_memory, without)


@law("stream")
def test_a_stream_gives_what_a_list_gives(row):
    assert same(merged(row, iter(updates(row))).state, merged(row, updates(row)).state)


@law("strategy")
def test_the_flower_strategy_gives_what_the_pipeline_gives(row):
    start = {name: t for name, t in base().items() if name in tiny_model().state_dict()}
    states = [{n: t for n, t in u.state.items() if n in start} for u in updates(row)]
    sent = [ClientUpdate(i, s, WEIGHTS[i], row.statistics(i, s)) for i, s in enumerate(states)]
    metrics = [{k: float(v) for k, v in u.statistics.get("local_steps", {}).items()} for u in sent]
    extra = [statistics_records({k: v for k, v in u.statistics.items() if k != "local_steps"}) for u in sent]
    strategy, arrays, memory = MergeStrategy(row.pipeline(), fraction_evaluate=0.0), initial(), {}
    grid = SimulationGrid(tiny_app(), CLIENTS)
    for number in (1, 2):
        want = row.pipeline().merge(sent, MergeContext(base=start, round=number, seed=0), memory)
        strategy.configure_train(number, arrays, ConfigRecord(), grid)
        given_replies = zip(sent, metrics, extra, strict=True)
        replies = [reply(10 + u.client, u.state, u.weight, extra=e, **m) for u, m, e in given_replies]
        arrays, _ = strategy.aggregate_train(number, replies)
        assert same(from_arrays(arrays), want.state)
        start, memory = want.state, want.memory


class Listening(MergeStrategy):
    """A strategy that keeps what it is sent and what it makes of it."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
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
        strategy = Listening(row.pipeline())
        result = strategy.start(grid, initial(), num_rounds=2)
    assert strategy.last_report.accepted == tuple(range(CLIENTS))
    assert not strategy.last_report.dropped
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    start, memory = tiny_model().state_dict(), {}
    for number, (replies, arrays) in enumerate(strategy.heard, 1):
        sent = [read(message) for message in replies]
        assert [list(update.statistics) for update in sent] == [list(row.pipeline().needs)] * CLIENTS
        want = row.pipeline().merge(sent, MergeContext(base=start, round=number, seed=0), memory)
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
    want = row.pipeline().merge(sent, MergeContext(base=tiny_model().state_dict(), seed=3)).state
    assert same(result.state_dict(), want)
    assert all(same(model.state_dict(), state) for model, state in zip(models, noisy_states(), strict=True))
    assert same(keywords["base"].state_dict(), tiny_model().state_dict())
