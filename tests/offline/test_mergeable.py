"""Values that have no mean are refused in words, or kept where all models agree on them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fedmerge
from fedmerge.errors import FedMergeError, ModelError


class Quantised(nn.Module):
    def __init__(self, seed=0, dtype=torch.int8):
        super().__init__()
        codes = torch.randint(0, 100, (3, 4), generator=torch.Generator().manual_seed(seed)).to(dtype)
        self.scale = nn.Parameter(torch.rand(3, 1), requires_grad=False)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x @ (self.weight.float() * self.scale).T)


class Packed(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.register_buffer("qweight", torch.randint(0, 2**30, (4,), generator=torch.Generator().manual_seed(seed)))


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.emb, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(self.emb(x)).mean(1)


METHODS = ["fedavg", "median", "rebasin", "fisher", "krum", "fednova", "otfusion"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.int64])
@pytest.mark.parametrize("method", METHODS)
def test_codes_are_not_merged(method, dtype):
    models, x = [Quantised(0, dtype), Quantised(1, dtype)], torch.randn(6, 4)
    if torch.equal(models[0].weight, models[1].weight):
        models[1].weight.data = ~models[1].weight.data
    with pytest.raises(ModelError, match=r"'weight' is .* differs between the models"):
        fedmerge.merge(models, method, base=models[0], example=x, clients=[[(x, torch.zeros(6).long())]] * 2)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "krum"])
def test_equal_codes_are_kept(method):
    torch.manual_seed(0)
    models, x = [Quantised() for _ in range(2)], torch.randn(6, 4)
    models[1].scale = models[0].scale
    clients = [[(x, torch.arange(6) % 2)]] * 2
    kw = {"statistics": [{"local_steps": 3}] * 2} if method == "fednova" else {"clients": clients}
    merged = fedmerge.merge(models, method, base=models[0], example=x, **kw)
    assert torch.equal(merged.weight, models[0].weight)
    assert merged.weight.dtype == torch.int8
    assert torch.equal(merged.scale, models[0].scale)


def test_packed_codes_in_buffers_are_not_merged():
    with pytest.raises(ModelError, match=r"'qweight'.*Dequantise"):
        fedmerge.merge([Packed(0), Packed(1)])
    assert torch.equal(fedmerge.merge([Packed(0), Packed(0)]).qweight, Packed(0).qweight)


def spoilt(how):
    model = nn.Linear(4, 3)
    if how == "meta":
        return model.to("meta")
    if how == "lazy":
        return nn.LazyLinear(3)
    if how == "float8":
        return nn.Linear(4, 3).to(torch.float8_e4m3fn)
    if how == "sparse":
        model.weight = nn.Parameter(model.weight.detach().to_sparse())
    if how == "quantised":
        model.register_buffer("codes", torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8))
    if how == "dynamic":
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(model), {nn.Linear})
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["meta", "lazy", "float8", "sparse", "quantised", "dynamic"])
@pytest.mark.parametrize("place", [0, 1, "both", "base"])
def test_tensors_without_values_or_arithmetic_are_refused(how, place):
    models = [nn.Linear(4, 3) if place in (1 - i, "base") else spoilt(how) for i in (0, 1)] if place in (0, 1) else None
    models = models or [spoilt(how) if place == "both" else nn.Linear(4, 3) for _ in range(2)]
    base = spoilt(how) if place == "base" else nn.Linear(4, 3)
    with pytest.raises(FedMergeError) as caught:
        fedmerge.merge(models, "fedavg+server_momentum", base=base)
    assert "base" in str(caught.value) if place == "base" else f"models[{1 if place == 1 else 0}]" in str(caught.value)


def test_expanded_parameters_are_merged():
    models = [nn.Linear(3, 2) for _ in range(2)]
    for i, model in enumerate(models):
        model.bias = nn.Parameter(torch.tensor(float(i)).expand(2))
    assert fedmerge.merge(models).bias.tolist() == [0.5, 0.5]
    assert models[0].bias.stride() == (0,)


def test_precisions_may_be_mixed():
    models = [nn.Linear(3, 2), nn.Linear(3, 2).bfloat16(), nn.Linear(3, 2).double()]
    for method in ("fedavg", "median", "trimmed_mean", "geometric_median", "krum"):
        assert fedmerge.merge(models, method).weight.dtype == torch.float32
    merged = fedmerge.merge(models)
    mean = sum(model.weight.double() for model in models) / 3
    assert torch.allclose(merged.weight.double(), mean, atol=1e-6)


@pytest.mark.parametrize("method", ["fedavg", "fisher", "fedfisher", "median", "regmean", "fedavg+natural_gradient"])
def test_tied_tensors_stay_one(method):
    torch.manual_seed(0)
    models, ids = [Tied() for _ in range(2)], torch.randint(0, 6, (20, 3))
    clients = [[(ids, ids[:, i])] for i in range(2)]
    merged = fedmerge.merge(models, method, clients=clients)
    assert merged.head.weight is merged.emb.weight
    if method == "fisher":
        mean = (models[0].emb.weight + models[1].emb.weight) / 2
        assert not torch.allclose(merged.emb.weight, mean, atol=1e-3)


def test_a_tie_that_one_model_has_cut_is_told():
    models = [Tied(), Tied(tied=False)]
    with pytest.raises(ModelError, match=r"'emb.weight' and 'head.weight' are one tensor.*differ in models\[1\]"):
        fedmerge.merge(models)
    cut = fedmerge.merge(models[::-1])
    assert torch.allclose(cut.head.weight, (models[0].head.weight + models[1].head.weight) / 2)
    assert torch.allclose(cut.emb.weight, (models[0].emb.weight + models[1].emb.weight) / 2)


def test_models_pruned_to_other_masks_are_refused():
    models = [nn.Linear(4, 3) for _ in range(2)]
    for i, model in enumerate(models):
        mask = torch.ones(3, 4)
        mask[i] = 0
        prune.custom_from_mask(model, "weight", mask)
    with pytest.raises(ModelError, match=r"prune\.remove"):
        fedmerge.merge(models)
    same = [copy.deepcopy(nn.Linear(4, 3)) for _ in range(2)]
    for model in same:
        prune.custom_from_mask(model, "weight", torch.eye(3, 4))
        model(torch.zeros(1, 4))
    merged = fedmerge.merge(same)
    x = torch.randn(5, 4)
    assert torch.allclose(merged(x), (same[0](x) + same[1](x)) / 2, atol=1e-6)
