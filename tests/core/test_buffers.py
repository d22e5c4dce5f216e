"""Buffers: batch-norm policies, counters, and the statistic that recalibrates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge import ClientUpdate, InvalidOption, MergeContext, compute_statistics
from fedmerge.buffers import pool_moments
from fedmerge.pipeline import build_pipeline
from fedmerge.state import Layout, WeightedSum, module_state
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


def test_mean_is_the_weighted_mean_of_both():
    weights = torch.tensor(SIZES) / sum(SIZES)
    want = sum(w * x.var(0, correction=0) for w, x in zip(weights, activations(), strict=True))
    torch.testing.assert_close(merged("mean")["bn.running_var"], want)


def test_pooled_is_what_all_activations_together_have():
    together = torch.cat(activations())
    torch.testing.assert_close(merged("pooled")["bn.running_mean"], together.mean(0))
    torch.testing.assert_close(merged("pooled")["bn.running_var"], together.var(0, correction=0))


def test_pooled_variance_never_falls_below_zero():
    one = {"running_mean": torch.tensor([1e4]), "running_var": torch.tensor([0.0])}
    pooled = pool_moments([(one, 1), (one, 2)])
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
