"""Numbers that one client sends to spoil everybody's: types, sizes, weights, buffers; and what stays of them."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import BadUpdate, ClientUpdate, MergeContext, NoUsableUpdates
from fedmerge.checks.magnitudes import Outliers, Peaks
from fedmerge.checks.validation import common_form
from fedmerge.merging import build_pipeline
from fedmerge.update import StackedUpdates


def update(client, weight=1.0, **state):
    return ClientUpdate(client, {"w": torch.full((3,), 1.0 + client), **state}, weight)


def merged(sent, method="fedavg", base=None, buffers=None, memory=None, **settings):
    context = MergeContext(base={"w": torch.zeros(3)} if base is None else base)
    return build_pipeline(method, **settings).merge(sent, context, memory, buffers=buffers)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("model", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sent", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["fedavg", "median", "geometric_median"])
def test_a_type_of_numbers_other_than_the_models_changes_nobodys_arithmetic(method, sent, model, place):
    base, values = {"w": torch.zeros(3, dtype=model)}, [0.5, 0.25, 4.0]
    honest = [ClientUpdate(i, {"w": torch.full((3,), v, dtype=model)}) for i, v in enumerate(values)]
    other = list(honest)
    other[place] = ClientUpdate(place, {"w": honest[place].state["w"].to(sent)})
    result, want = merged(other, method, base), merged(honest, method, base)
    assert result.accepted == (0, 1, 2)
    assert torch.equal(result.state["w"], want.state["w"])
    assert result.state["w"].dtype == model


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("value", "model", "words"),
    [(1e300, torch.float32, r"1e\+300.*float32 cannot hold"), (-1e300, torch.float64, r"1e\+300.*beyond 1e\+15"),
     (7e4, torch.float16, r"7e\+04.*float16 cannot hold")],
)  # fmt: skip
def test_doubles_that_the_model_cannot_hold_cost_only_their_sender_wherever_it_stands(place, value, model, words):
    base = {"w": torch.zeros(3, dtype=model)}
    sent = [ClientUpdate(i, {"w": torch.full((3,), 1.0 + i, dtype=model)}) for i in range(3)]
    without = merged([one for one in sent if one.client != place], base=base)
    sent[place] = ClientUpdate(place, {"w": torch.tensor([0.0, value, 0.0], dtype=torch.float64)})
    result = merged(sent, base=base)
    assert torch.equal(result.state["w"], without.state["w"])
    with pytest.raises(BadUpdate, match=words):
        raise result.dropped[0]


def test_without_a_base_the_majority_decides_on_types_and_masks_too():
    states = [update(i).state for i in range(3)]
    doubles = {"w": states[0]["w"].double()}
    assert common_form([doubles, *states])["w"].dtype == torch.float32
    huge = {"w": torch.full((3,), 1e20)}  # as a mask would be
    result = build_pipeline("fedavg").merge([ClientUpdate(9, huge), update(1), update(2)], MergeContext())
    assert result.accepted == (1, 2)
    assert result.state["w"].tolist() == [2.5, 2.5, 2.5]
    assert common_form([{"w": [1.0]}, *states]) is states[0]


@pytest.mark.parametrize(
    "weight", [5e-324, 1e-300, 2.0**-65, 2.0**54, 1e300, 10**400, "3", None, [1], -1, float("nan")]
)
def test_a_weight_that_is_no_number_of_examples_costs_only_its_sender(weight):
    result = merged([update(0, weight), update(1), update(2)])
    assert result.state["w"].tolist() == [2.5, 2.5, 2.5]
    assert "number of examples" in result.dropped[0].reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["fedavg", "geometric_median", "median_norm_clipping"])
def test_weights_over_all_orders_that_are_taken_give_their_mean(method, dtype):
    weights, base = [2.0**-64, 1e-9, 2.0**53], {"w": torch.zeros(3, dtype=dtype)}
    sent = [ClientUpdate(i, {"w": torch.full((3,), 1e3 * (i + 1), dtype=dtype)}, weights[i]) for i in range(3)]
    want = 2000.0 if method == "median_norm_clipping" else 3000.0
    assert merged(sent, method, base).state["w"].tolist() == [want] * 3
    alone = merged([ClientUpdate(0, sent[1].state, 2.0**-64)], method, base).state["w"]
    assert alone.tolist() == [2000.0] * 3


@pytest.mark.parametrize("scale", [5e-324, 1e-30, 1e30, 1e300])
def test_of_models_at_hand_only_ratios_of_weights_count_whatever_their_size(scale):
    models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    for i, model in enumerate(models):
        nn.init.constant_(model.weight, 4.0 * i)
    assert fedmerge.merge(models, weights=[scale, 2 * scale]).weight[0, 0].item() == pytest.approx(8 / 3)
    assert fedmerge.merge(models, weights=[1e-30 * scale, scale] if scale > 1e-300 else [0.5, 1e300]).weight[
        0, 0
    ].item() == pytest.approx(4.0)


LOUD = {"w": torch.tensor([0.0, 1e4, 0.0])}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("method", ["fedavg", "fedavg+server_adagrad", "fedatt", "krum"])
def test_a_client_a_thousand_times_as_loud_as_model_and_others_is_left_out(place, method):
    sent = [update(i) for i in range(4)]
    without = merged([one for one in sent if one.client != place], method)
    sent[place] = ClientUpdate(place, LOUD)
    result = merged(sent, method)
    assert result.accepted == tuple(i for i in range(4) if i != place)
    assert "reach 1e+04, more than 1000 times those of the model sent and of most clients" in result.dropped[0].reason
    assert torch.equal(result.state["w"], without.state["w"])
    assert all(torch.equal(tensor, without.memory[name]) for name, tensor in result.memory.items())


@pytest.mark.parametrize(
    ("base", "others"),
    [(20.0, 1.0), (0.0, 20.0)],
)
def test_a_client_is_as_loud_as_the_model_or_most_others_are(base, others):
    sent = [ClientUpdate(0, LOUD), *(ClientUpdate(i, {"w": torch.full((3,), others * i)}) for i in (1, 2))]
    assert merged(sent, base={"w": torch.full((3,), base)}).accepted == (0, 1, 2)
    assert merged(sent[:1]).accepted == (0,)  # there is nobody to hold it against


def test_running_statistics_may_be_far_larger_and_models_at_hand_are_not_compared():
    base = {"n.running_var": torch.ones(1), "w": torch.zeros(3)}
    sent = [
        ClientUpdate(i, {**update(i).state, "n.running_var": torch.tensor([v])}) for i, v in enumerate((2.0, 3.0, 4e6))
    ]
    result = merged(sent, base=base)
    assert result.accepted == (0, 1)
    assert "running statistics reach 4e+06, more than 1000000 times" in result.dropped[0].reason
    assert merged([ClientUpdate(0, LOUD), update(1), update(2)], on_bad_update="raise").accepted == (0, 1, 2)


def test_sums_of_parts_decide_on_loud_clients_together():
    pipeline, base = build_pipeline("fedavg"), {"w": torch.zeros(3)}
    states = {"w": torch.tensor([[1.0] * 3, [1e5] * 3, [2e5] * 3, [3e5] * 3, [9e9] * 3])}

    def block(rows):
        return StackedUpdates(tuple(rows), {"w": states["w"][list(rows)]}, (1.0,) * len(rows), ({},) * len(rows))

    whole = merged([ClientUpdate(i, {"w": row}) for i, row in enumerate(states["w"])])
    assert whole.accepted == (0, 1, 2, 3)  # most are as large
    for cut in (1, 2, 4):
        context = MergeContext(base=base)
        parts = [pipeline.fold([block(rows)], context, None) for rows in (range(cut), range(cut, 5))]
        joined = pipeline.join(*(pickle.loads(pickle.dumps(part)) for part in parts))
        result = pipeline.finish(joined, context, None, None)
        assert result.accepted == whole.accepted
        assert [bad.client for bad in result.dropped] == [4]
        assert torch.equal(result.state["w"], whole.state["w"])


def test_held_back_clients_are_let_go_in_their_order():
    outliers = Outliers(Peaks(1.0, 1.0))
    for client in (3, 1, 2):
        assert outliers.holds(update(client), Peaks(5e3 * client, 0.0))
    assert [one.client for one in outliers.decided()] == [1, 2, 3]


BUFFERS = {
    "table": torch.arange(4),
    "mask": torch.tensor([0.0, -torch.inf]),
    "n.num_batches_tracked": torch.tensor(7),
    "n.running_var": torch.ones(2),
}
BASE = {"w": torch.zeros(3), **BUFFERS}


def with_buffer(client, **changed):
    return ClientUpdate(client, {"w": torch.ones(3), **BUFFERS, **changed})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n.num_batches_tracked", torch.tensor(2**63 - 1)),
        ("n.num_batches_tracked", torch.tensor(-1)),
        ("n.num_batches_tracked", torch.tensor(2**40)),
        ("table", torch.tensor([0, 1, 2, 10**9])),
        ("table", torch.tensor([0, -(2**62), 2, 3])),
        ("mask", torch.tensor([0.0, torch.inf])),
        ("mask", torch.tensor([-torch.inf, -torch.inf])),
        ("mask", torch.tensor([0.0, 1e30])),
        ("n.running_var", torch.tensor([1.0, -0.5])),
    ],
)
@pytest.mark.parametrize("policy", ["mean", "pooled"])
def test_buffers_that_no_training_makes_cost_only_their_sender(name, value, policy):
    sent = [with_buffer(0), with_buffer(1, **{name: value}), with_buffer(2)]
    result = merged(sent, base=BASE, buffers=set(BUFFERS), batch_norm=policy)
    assert result.accepted == (0, 2)
    assert name in result.dropped[0].reason
    assert all(torch.equal(result.state[buffer], tensor) for buffer, tensor in BUFFERS.items())
    states = {n: torch.stack([one.state[n] for one in sent]) for n in BASE}
    pipeline, context = build_pipeline("fedavg", batch_norm=policy), MergeContext(base=BASE)
    part = pipeline.fold([StackedUpdates((0, 1, 2), states, (1.0,) * 3, ({},) * 3)], context, set(BUFFERS))
    assert part.accepted == [0, 2]


def test_a_buffer_that_most_return_as_it_was_is_not_one_clients_to_change():
    table, mask = torch.tensor([0, 1, 3, 9]), torch.tensor([0.5, -torch.inf])
    sent = [with_buffer(0), with_buffer(1, table=table, mask=mask), with_buffer(2)]
    result = merged(sent, base=BASE, buffers=set(BUFFERS))
    assert result.accepted == (0, 1, 2)
    assert torch.equal(result.state["table"], BUFFERS["table"])
    assert torch.equal(result.state["mask"], BUFFERS["mask"])
    counted = [with_buffer(i, **{"n.num_batches_tracked": torch.tensor(7 + 5 * (i == 1))}) for i in range(3)]
    assert merged(counted, base=BASE, buffers=set(BUFFERS)).state["n.num_batches_tracked"].item() == 12
    moved = [with_buffer(i, table=table) for i in (0, 1)] + [with_buffer(2)]
    assert torch.equal(merged(moved, base=BASE, buffers=set(BUFFERS)).state["table"], table)


def test_pooled_variances_stay_within_what_the_next_round_takes():
    means = [torch.full((1,), v, dtype=torch.float16) for v in (-4e2, 4e2)]
    half = torch.ones(1, dtype=torch.float16)
    base = {"n.running_mean": half, "n.running_var": half, "w": half}
    sent = [ClientUpdate(i, {**base, "n.running_mean": mean}) for i, mean in enumerate(means)]
    pooled = merged(sent, base=base, batch_norm="pooled").state
    assert pooled["n.running_var"].tolist() == [65504.0]
    assert merged([ClientUpdate(i, pooled) for i in range(2)], base=pooled, batch_norm="pooled").accepted == (0, 1)


@pytest.mark.parametrize("step", ["server_momentum", "server_adam", "server_yogi", "server_adagrad"])
def test_steps_of_the_server_go_on_after_a_round_at_the_bound(step):
    base = {"w": torch.zeros(3)}
    loud = [ClientUpdate(i, {"w": torch.full((3,), -1e15)}) for i in range(2)]  # all of them: nobody is an outlier
    first = merged(loud, f"fedavg+{step}")
    for _ in range(3):
        result = merged(loud, f"fedavg+{step}", first.state, memory=first.memory)
        assert bool(result.state["w"].isfinite().all())
        assert all(bool(tensor.isfinite().all()) for tensor in result.memory.values())
        assert float(result.state["w"].abs().max()) <= 1e15
        first = result
    assert base["w"].tolist() == [0.0] * 3


@pytest.mark.parametrize(("clients", "attackers"), [(5, 1), (5, 0.2), (3, 0), (7, 2), (9, 3)])
def test_clients_left_out_count_towards_krums_attackers(clients, attackers):
    options = {"krum": {"attackers": attackers}}
    good = [ClientUpdate(i, {"w": torch.tensor([1.0, 0.1 * i, 0.0])}) for i in range(clients)]
    spoilt = ClientUpdate(0, {"w": torch.full((3,), torch.nan)})
    result = build_pipeline("krum", options).merge([spoilt, *good[1:]], MergeContext(base={"w": torch.zeros(3)}))
    assert result.accepted == tuple(range(1, clients))
    assert any(torch.equal(result.state["w"], one.state["w"]) for one in good[1:])


@pytest.mark.parametrize("method", ["krum", "median", "trimmed_mean", "geometric_median", "fedatt(step_size=1)"])
def test_one_client_that_is_left_of_three_gives_its_model(method):
    spoilt = [ClientUpdate(i, {"w": torch.full((3,), torch.nan)}) for i in (0, 2)]
    result = merged([*spoilt, update(1)], method)
    assert result.accepted == (1,)
    torch.testing.assert_close(result.state["w"], update(1).state["w"])


def test_too_few_for_krum_from_the_start_are_too_few_and_name_who_was_left_out():
    sent = [ClientUpdate(0, {"w": torch.full((3,), torch.nan)}), update(1), update(2)]
    with pytest.raises(NoUsableUpdates, match="at least 5 usable updates, got 2") as caught:
        build_pipeline("krum", {"krum": {"attackers": 1}}).merge(sent, MergeContext(base={"w": torch.zeros(3)}))
    assert [bad.client for bad in caught.value.dropped] == [0]
