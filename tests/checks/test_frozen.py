"""Frozen parameters, equal in all models, are not measured, sent, matched, refined or changed."""

import copy

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.checks.tensor_checks import Unmoved
from fedmerge.merging import Pipeline
from fedmerge.permutations import trace
from fedmerge.permutations.holding import held
from fedmerge.statistics import FisherDiag, FisherKfac, Gram, LossGradient
from fedmerge.update import ClientUpdate, MergeContext

MATCHING = ["rebasin", "otfusion", "pfnm", "fedma", "gamf", "c2m3", "zipit", "cca", "mudsc", "sinkhorn_rebasin"]
CURVATURE = [
    "fisher",
    "fedfisher",
    "fedfisher(variant=diag)",
    "regmean",
    "fedlpa",
    "maecho",
    "mats",
    "gradient_matching",
]
REFINED = ["fedavg+natural_gradient", "fedavg+ridge_head", "fedavg+logistic_head", "fedavg+sequential_refit", "fedkfac"]


def network(frozen=("0.",)):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
    ).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    return model


def clients(frozen=("0.", "1."), count=3):
    """Models that were trained from one start, all but what is frozen, and their data."""
    base, models, loaders = network(frozen), [], []
    for i in range(count):
        model, generator = copy.deepcopy(base), torch.Generator().manual_seed(i)
        x = torch.randn(40, 6, generator=generator)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        models.append(model)
        loaders.append([(x, (x[:, 0] > 0).long() + (x[:, i] > 0.5))])
    return base, models, loaders


@pytest.mark.parametrize("frozen", [("0.", "1."), ("3.",), ("5.",), ("0.bias", "3.weight")])
@pytest.mark.parametrize("method", [*MATCHING, *CURVATURE, *REFINED, "fedavg", "median", "krum"])
def test_no_method_moves_what_is_frozen(method, frozen):
    base, models, loaders = clients(frozen)
    merged = fedmerge.merge(models, method, base=base, clients=loaders, data=[b[0] for one in loaders for b in one])
    kept = {name for name, parameter in base.named_parameters() if not parameter.requires_grad}
    moved = dict(merged.named_parameters())
    for name, tensor in base.state_dict().items():
        if name in kept or ("1.weight" in kept and name.startswith("1.")):
            assert torch.equal(merged.state_dict()[name], tensor), name
    assert {name for name, parameter in moved.items() if not parameter.requires_grad} == kept
    assert any(not torch.equal(moved[name], tensor) for name, tensor in base.named_parameters() if name not in kept)


def test_what_is_frozen_and_differs_is_merged():
    base, models, _ = clients(frozen=())
    for model in models:
        model.requires_grad_(False)  # made ready for use
    merged = fedmerge.merge(models)
    mean = sum(model[3].weight for model in models) / 3
    assert torch.allclose(merged[3].weight, mean, atol=1e-6)
    assert not torch.equal(merged[3].weight, base[3].weight)


def test_models_made_ready_for_use_are_measured_whole():
    _, models, loaders = clients(frozen=())
    free = fedmerge.merge(models, "fedfisher", clients=loaders)
    fixed = fedmerge.merge([copy.deepcopy(m).requires_grad_(False) for m in models], "fedfisher", clients=loaders)
    assert torch.equal(free[3].weight, fixed[3].weight)


@pytest.mark.parametrize("kind", [FisherDiag(), FisherKfac(), Gram(), LossGradient()])
def test_nothing_is_measured_of_frozen_layers(kind):
    _, models, loaders = clients(frozen=("0.", "3.bias"))
    value = kind.measure(models[0], loaders[0], None)
    measured = {name.removesuffix(".A").removesuffix(".G").removesuffix(".diag") for name in value}
    assert not any(name.startswith("0.") or name == "3.bias" for name in measured)
    assert "3.weight" in measured


def test_a_frozen_bias_is_no_column_of_its_layers_factor():
    _, models, loaders = clients(frozen=("3.bias",))
    value = FisherKfac().measure(models[0], loaders[0], None)
    assert value["3.weight.A"].shape == (8, 8)
    assert value["5.weight.A"].shape == (8, 8)  # seven neurons and the bias


def test_stages_train_only_what_models_train():
    base, models, loaders = clients(frozen=("5.",))
    merged = fedmerge.merge(models, "fedma(class_aware=false)", clients=loaders)
    assert torch.equal(merged[5].weight[:, : base[5].weight.shape[1]], base[5].weight)


def test_groups_that_stand_in_a_frozen_tensor_are_held():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    spec = trace(model, torch.zeros(2, 4))
    assert [group.name for group in held(spec, {"4.weight"}).groups] == ["0.weight"]
    assert held(spec, {"2.bias"}).pinned["2.weight", 0] == "it is frozen"
    assert held(spec, ()) is spec


def test_a_federations_frozen_tensors_come_back_as_they_were():
    base = {"w": torch.rand(5), "head": torch.rand(5)}
    updates = [ClientUpdate(i, {"w": base["w"], "head": base["head"] + i}, weight=1 + i) for i in range(3)]
    context = MergeContext(base=base, frozen=frozenset({"w"}))
    for merged in (
        Pipeline(FedAvg()).merge(updates, context).state,
        Pipeline(FedAvg()).merge(iter(updates), context).state,
    ):
        assert torch.equal(merged["w"], base["w"])
        assert not torch.equal(merged["head"], base["head"])


def test_what_some_client_has_moved_is_not_frozen():
    unmoved = Unmoved({"a", "b"})
    unmoved.add({"a": torch.ones(2), "b": torch.ones(2)})
    other = Unmoved({"a", "b"})
    other.add_stacked({"a": torch.ones(3, 2), "b": torch.tensor([[1.0, 1.0], [1.0, 2.0]])})
    assert list(unmoved.join(other).tensors) == ["a"]
    assert list(unmoved.join(Unmoved({"a"})).tensors) == ["a"]
