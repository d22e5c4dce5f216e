"""Buffers are no evidence of divergence: masks with -inf are kept as they are, and running statistics still count."""

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.errors import BadUpdate, NoUsableUpdates
from fedmerge.layout import Layout
from fedmerge.merging import Pipeline
from fedmerge.merging.buffers import BufferFold
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


class Attention(nn.Module):
    def __init__(self, fill, dtype=torch.float32):
        super().__init__()
        self.q, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.register_buffer("mask", torch.full((3, 3), fill, dtype=dtype).triu(1))

    def forward(self, x):
        return self.norm((self.q(x) @ x.transpose(1, 2) + self.mask).softmax(-1) @ x).mean(1)


@pytest.mark.parametrize("method", ["fedavg", "median", "rebasin", "fedfisher", "fedavg+natural_gradient", "krum"])
@pytest.mark.parametrize("fill", [-INF, LOWEST, -1e20])
def test_a_mask_comes_back_to_the_bit(fill, method):
    models = [Attention(fill) for _ in range(3)]
    x = torch.randn(12, 3, 4)
    batches = [(x, torch.arange(12) % 4)]
    merged = fedmerge.merge(models, method, weights=[3, 1, 2], example=x, clients=[batches] * 3)
    assert torch.equal(merged.mask, models[0].mask)
    assert not torch.equal(merged.q.weight, models[0].q.weight) or method == "krum"


def test_masks_of_another_fill_are_no_reason_to_drop_a_client():
    models = [Attention(-INF), Attention(-1e9)]
    merged = fedmerge.merge(models)
    assert torch.equal(merged.mask.isinf(), models[0].mask.isinf())


def test_half_precision_masks_and_constants_stay():
    models = [Attention(-65504.0, torch.float16) for _ in range(7)]
    for model in models:
        model.register_buffer("scale", torch.tensor([0.1, 0.3]))
    merged = fedmerge.merge(models, weights=[0.1, 0.2, 0.3, 0.7, 1.1, 1.3, 1.7])
    assert torch.equal(merged.mask, models[0].mask)
    assert torch.equal(merged.scale, models[0].scale)


@pytest.mark.parametrize("value", [float("nan"), INF, 1e20])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_are_evidence(name, value):
    models = [nn.BatchNorm1d(2) for _ in range(2)]
    getattr(models[1], name)[0] = value
    with pytest.raises(BadUpdate, match=name):
        fedmerge.merge(models)


def test_nan_in_a_buffer_is_evidence_unless_the_model_began_with_it():
    models = [Attention(-1.0) for _ in range(2)]
    for model in models:
        model.register_buffer("unset", torch.full((2,), float("nan")))
    assert fedmerge.merge(models).unset.isnan().all()
    models[1].mask[0, 0] = float("nan")
    with pytest.raises(BadUpdate, match=r"mask.*1 of 9 entries NaN"):
        fedmerge.merge(models)


def test_masks_among_bare_names_are_told_by_what_the_base_holds():
    base = {"w": torch.zeros(2), "mask": torch.tensor([0.0, -INF])}
    updates = [ClientUpdate(i, {**base, "w": torch.full((2,), float(i))}) for i in range(2)]
    merged = Pipeline(FedAvg()).merge(updates, MergeContext(base=base)).state
    assert torch.equal(merged["mask"], base["mask"])
    assert merged["w"].tolist() == [0.5, 0.5]
    spoilt = [ClientUpdate(0, {**base, "w": torch.tensor([0.0, INF])})]
    with pytest.raises(NoUsableUpdates, match="'w'"):
        Pipeline(FedAvg()).merge(spoilt, MergeContext(base=base))


@pytest.mark.parametrize("policy", ["mean", "pooled"])
def test_stacked_clients_keep_masks_too(policy):
    base = {"w": torch.zeros(2), "mask": torch.tensor([0.0, -INF]), "n.running_mean": torch.tensor([0.3])}
    base["n.running_var"] = torch.tensor([0.7])
    states = {name: torch.stack([tensor] * 3) for name, tensor in base.items()}
    states["w"] = states["w"] + torch.arange(3.0)[:, None]
    pipeline = Pipeline(FedAvg(), batch_norm=policy)
    context, buffers = MergeContext(base=base), {"mask", "n.running_mean", "n.running_var"}
    blocks = [StackedUpdates((i,), {n: t[i : i + 1] for n, t in states.items()}, (0.7 + i,), ({},)) for i in range(3)]
    parts = [pipeline.fold([block], context, buffers) for block in blocks]
    total = pipeline.join(pipeline.join(parts[0], parts[1]), parts[2])
    merged = pipeline.finish(total, context, None, buffers).state
    for name in buffers:
        assert torch.equal(merged[name], base[name]), name


def test_buffers_that_differ_are_still_averaged():
    layout = Layout.of({"scale": torch.zeros(2)}, {"scale"})
    fold = BufferFold(layout, "mean")
    fold.add({"scale": torch.tensor([1.0, 5.0])}, 1.0)
    fold.add({"scale": torch.tensor([3.0, 5.0])}, 3.0)
    assert fold.finish(None)["scale"].tolist() == [2.5, 5.0]
