"""Buffers: batch-norm policies, counters, and the statistic that recalibrates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge import ClientUpdate, InvalidOption, MergeContext, compute_statistics
from fedmerge.layout import Layout
from fedmerge.merging import build_pipeline
from fedmerge.merging.buffers import pool_moments
from fedmerge.state import WeightedSum, module_state
from tests.federation import tiny_model

SIZES = (40, 100, 10)


def activations():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=generator) * (i + 1) + 2 * i for i, n in enumerate(SIZES)]


def updates():
    """Clients whose running statistics are exactly those of their own activations."""
    found = []
    for i, x in enumerate(activations()):
        state = {
            "bn.weight": torch.ones(3),
            "bn.running_mean": x.mean(0),
            "bn.running_var": x.var(0, correction=0),
            "bn.num_batches_tracked": torch.tensor(10 * i),
        }
        found.append(ClientUpdate(i, state, len(x)))
    return found


def base():
    return {
        "bn.weight": torch.ones(3),
        "bn.running_mean": torch.full((3,), 7.0),
        "bn.running_var": torch.full((3,), 8.0),
        "bn.num_batches_tracked": torch.tensor(3),
    }


def merged(policy):
    return build_pipeline("fedavg", batch_norm=policy).merge(updates(), MergeContext(base=base())).state


@pytest.mark.parametrize("policy", ["mean", "recalibrate"])
def test_mean_is_the_weighted_mean_of_both_and_what_recalibration_starts_from(policy):
    weights = torch.tensor(SIZES) / sum(SIZES)
    mean = sum(w * x.mean(0) for w, x in zip(weights, activations(), strict=True))
    variance = sum(w * x.var(0, correction=0) for w, x in zip(weights, activations(), strict=True))
    torch.testing.assert_close(merged(policy)["bn.running_mean"], mean)
    torch.testing.assert_close(merged(policy)["bn.running_var"], variance)


def test_pooled_is_what_all_activations_together_have():
    together = torch.cat(activations())
    torch.testing.assert_close(merged("pooled")["bn.running_mean"], together.mean(0))
    torch.testing.assert_close(merged("pooled")["bn.running_var"], together.var(0, correction=0))


def test_pooled_variance_never_falls_below_zero():
    # Without a floor, rounding makes -9e-13 of this mean and these weights.
    one = {"running_mean": torch.tensor([78.39754486083984]), "running_var": torch.tensor([0.0])}
    pooled = pool_moments([(one, 89), (one, 53), (one, 36)])
    assert pooled["running_var"].item() >= 0
    assert pooled["running_var"].dtype == torch.float32


def test_local_keeps_what_the_server_had():
    result = merged("local")
    assert torch.equal(result["bn.running_mean"], base()["bn.running_mean"])
    assert torch.equal(result["bn.running_var"], base()["bn.running_var"])


@pytest.mark.parametrize("policy", ["mean", "pooled", "recalibrate", "local"])
def test_counters_are_the_largest_and_stay_integers(policy):
    counter = merged(policy)["bn.num_batches_tracked"]
    assert (counter.item(), counter.dtype, counter.shape) == (20, torch.int64, ())


def test_counters_of_every_kind_are_the_largest_element_by_element():
    kinds = {"small": torch.int8, "table": torch.int32, "seen": torch.bool}
    rows = [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
    sent = [ClientUpdate(i, {n: torch.tensor(row, dtype=kinds[n]) for n in kinds}) for i, row in enumerate(rows)]
    state = build_pipeline("fedavg").merge(sent, MergeContext()).state
    for name, kind in kinds.items():
        assert state[name].tolist() == [1, 0, 1]
        assert state[name].dtype == kind


def test_unknown_policy():
    with pytest.raises(InvalidOption, match="pooled"):
        build_pipeline("fedavg", batch_norm="median")


def test_measured_moments_are_those_of_the_data_and_the_model_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x, y = torch.randn(64, 4), torch.zeros(64).long()
    moments = compute_statistics(model, [(x, y)], ["batch_norm"])["batch_norm"]
    hidden = model[0](x).detach()  # no dropout where statistics are measured
    torch.testing.assert_close(moments["2.running_mean"], hidden.mean(0))
    torch.testing.assert_close(moments["2.running_var"], hidden.var(0))
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model[2].momentum == 0.1


def test_moments_are_averaged_over_batches_whatever_the_model_had_before():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_mean.fill_(50.0)
    model[0].num_batches_tracked.fill_(100)
    batches = [torch.randn(16, 3, generator=torch.Generator().manual_seed(i)) + i for i in range(3)]
    moments = compute_statistics(model, [(x, None) for x in batches], ["batch_norm"])["batch_norm"]
    torch.testing.assert_close(moments["0.running_mean"], torch.cat(batches).mean(0))
    torch.testing.assert_close(moments["0.running_var"], torch.stack([x.var(0) for x in batches]).mean(0))


def test_the_last_batch_counts_by_its_examples():
    x = torch.cat([torch.zeros(8, 1), torch.full((2, 1), 10.0)])
    moments = compute_statistics(nn.BatchNorm1d(1), [(x[:8], None), (x[8:], None)], ["batch_norm"])["batch_norm"]
    assert moments["running_mean"].item() == pytest.approx(x.mean().item())


def test_a_last_batch_of_one_example_can_be_measured():
    x = torch.arange(9.0).unsqueeze(1)
    moments = compute_statistics(nn.BatchNorm1d(1), [(x[:8], None), (x[8:], None)], ["batch_norm"])["batch_norm"]
    assert torch.isfinite(moments["running_var"]).all()


def test_a_norm_at_the_top_and_one_that_keeps_no_statistics():
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    top = compute_statistics(nn.BatchNorm1d(2), [(x, None)], ["batch_norm"])["batch_norm"]
    torch.testing.assert_close(top["running_mean"], x.mean(0))
    assert compute_statistics(nn.BatchNorm1d(2, track_running_stats=False), [(x, None)], ["batch_norm"]) == {
        "batch_norm": {}
    }


def test_a_model_without_batch_norm_measures_nothing():
    assert compute_statistics(nn.Linear(2, 2), [], ["batch_norm"]) == {"batch_norm": {}}


def test_local_steps_cannot_be_measured_afterwards():
    with pytest.raises(InvalidOption, match="by hand"):
        compute_statistics(nn.Linear(2, 2), [], ["local_steps"])


def test_layout_with_and_without_a_module():
    state, buffers = module_state(tiny_model())
    assert Layout.of(state) == Layout.of(state, buffers)
    assert Layout.of(state).float_buffers == ("1.running_mean", "1.running_var")
    assert Layout.of(state).integer_buffers == ("1.num_batches_tracked",)
    table = {"table": torch.zeros(2)}
    assert Layout.of(table).parameters == ("table",)
    assert Layout.of(table, {"table"}).float_buffers == ("table",)


def test_sums_are_taken_in_float32_or_better():
    total = WeightedSum()
    for _ in range(4096):
        total.add({"w": torch.ones(1, dtype=torch.float16)}, 1.0)
    assert total.tensors["w"].item() == 4096.0  # float16 stops counting at 2048
    assert total.mean()["w"].item() == 1.0


def test_equal_variances_about_other_means_are_pooled_all_the_same():
    sent = [
        ClientUpdate(i, {"w": torch.ones(1), "running_mean": torch.tensor([m, 3.0]), "running_var": torch.ones(2)})
        for i, m in enumerate((-2.0, 2.0))
    ]
    state = build_pipeline("fedavg", batch_norm="pooled").merge(sent, MergeContext(base=sent[0].state)).state
    assert state["running_var"].tolist() == [5.0, 1.0]


@pytest.mark.parametrize(("same", "stays"), [(3, True), (2, False)])
def test_a_buffer_that_more_than_half_return_as_it_was_stays_so(same, stays):
    start = {"w": torch.ones(2), "mask": torch.tensor([0.0, 1.0])}
    changed = torch.tensor([4.0, 5.0])
    sent = [
        ClientUpdate(i, {"w": torch.ones(2), "mask": start["mask"] if i < same else changed}, 1.0) for i in range(4)
    ]
    result = build_pipeline("fedavg").merge(sent, MergeContext(base=start), buffers={"mask"}).state
    torch.testing.assert_close(result["mask"], start["mask"] if stays else (start["mask"] + changed) / 2)
