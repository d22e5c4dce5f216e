"""Laws of merging: what every registered method keeps, whatever carries it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmerge import ClientUpdate, MergeContext
from fedmerge.aggregators.aggregator import Fold
from fedmerge.records.run_records import RunRecord, read_checkpoint
from tests.contract.laws import DRAWN, WEIGHTS, base, copied, drawn, law, merged, same, updates
from tests.contract.table import ROWS
from tests.federation import CLIENTS


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


ORDERS = ((1, 0, 2), (1, 2, 0), (2, 1, 0), (0, 2, 1), (2, 0, 1))
"""All but that of the clients' numbers. The first two make all others, one after the other."""


@law("order")
def test_order_of_arrival_changes_no_bit(row):
    sent = updates(row)
    straight = merged(row, sent).state
    for order in ORDERS[:2] if row.traces else ORDERS:
        assert same(straight, merged(row, [sent[i] for i in order]).state), order


@law("ratios")
def test_only_ratios_of_weights_matter(row):
    @drawn(row)
    @given(
        scale=st.floats(1e-3, 1e5),
        weights=st.lists(st.integers(1, 10_000), min_size=CLIENTS, max_size=CLIENTS),
    )
    def holds(scale, weights):
        one = merged(row, updates(row, weights=[float(w) for w in weights])).state
        two = merged(row, updates(row, weights=[scale * w for w in weights])).state
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)

    holds()


SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=3)


FOLDS = [row for row in ROWS if isinstance(row.pipeline().aggregator, Fold)]


@pytest.mark.parametrize("row", FOLDS, ids=str)
def test_sums_over_parts_of_the_clients_join_to_that_over_all(row):
    """As workers make them: a part is of the nearest clients in one, of the farthest in another."""

    def trained(state):
        return {name: tensor for name, tensor in state.items() if name.endswith(("weight", "bias"))}

    aggregator, context = row.pipeline().aggregator, MergeContext(base=trained(base()), seed=1)
    sent = [
        replace(u, state=trained(u.state), statistics=row.statistics(u.client, trained(u.state))) for u in updates(row)
    ]
    start = trained(base())
    sent[2] = replace(sent[2], state={n: start[n] + 30 * (t - start[n]) for n, t in sent[2].state.items()})
    whole, _ = aggregator.merge(sent, context, {})
    for first in ((0,), (2,), (0, 1), (1, 2)):
        parts = [aggregator.zero(context), aggregator.zero(context)]
        for update in sent:
            part = 0 if update.client in first else 1
            parts[part] = aggregator.add(parts[part], update, context)
        joined, _ = aggregator.finish(aggregator.join(*parts), context, {})
        for name, tensor in whole.items():
            torch.testing.assert_close(joined[name], tensor, rtol=1e-5, atol=1e-6)


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
