"""Laws of matching: copies of one network, their neurons re-ordered or not, merge to the function that all have."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.aggregators.aligning import Aligning
from fedmerge.permutations import trace
from fedmerge.registry import entries
from tests.permutations.zoo_of_models import calibrate, difference, distinct, permuted

NORMS = {
    "batch norm": nn.BatchNorm2d,
    "group norm": lambda width: nn.GroupNorm(3, width),
    "layer norm": lambda width: nn.GroupNorm(1, width),
}
METHODS = [
    ("rebasin", {}),
    ("rebasin", {"ground": "activations"}),
    ("otfusion", {}),
    ("otfusion", {"ground": "activations"}),
    ("clafusion", {}),
    ("glmc", {}),
    ("gamf", {}),
    ("c2m3", {}),
    ("pfnm", {}),
    ("pfnm", {"class_aware": False, "gamma": 1e3}),
    ("fedma", {"retrain_epochs": 0}),
    ("zipit", {}),
    ("zipit", {"discount": 1.0, "budget": 1.0}),
    ("cca", {}),
    ("mudsc", {}),
    ("neuron_alignment", {}),
    ("sinkhorn_rebasin", {}),
    ("ste_rebasin", {"steps": 1}),
]
CLASSES = 4


def network(norm):
    """Convolutions with a norm, a flatten, linear layers, the last one with a neuron that is never heard."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 9, 3, padding=1), norm(9), nn.ReLU(), nn.Conv2d(9, 12, 3, 2, 1), norm(12), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12 * 9, 7), nn.ReLU(), nn.Linear(7, CLASSES)),
    ).eval()
    distinct(model)
    with torch.no_grad():
        model[7].bias[2] = -100.0
    return model


def merged(models, method, options, images):
    counts = {"class_counts": {"class_counts": torch.tensor([3, 1, 0, 5])}}
    return fedmerge.merge(
        models,
        method,
        weights=[3.0, 1.0, 2.0, 2.0, 5.0][: len(models)],
        example=images[:2],
        data=[(images, models[0](images).argmax(1))],
        statistics=[counts] * len(models) if method in ("pfnm", "fedma") else None,
        repair="none",
        **options,
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_two_to_five_copies_merge_to_the_function_that_they_have(method, options, norm):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        images = torch.randn(100, 1, 6, 6)
        model = network(NORMS[norm])
    calibrate(model, images)
    spec = trace(model, images[:2])
    orders = [spec.identity(), *(spec.random(torch.Generator().manual_seed(i)) for i in range(4))]
    for count in (2, 5):
        same = [copy.deepcopy(model) for _ in range(count)]
        other = [permuted(model, spec, orders[i]) for i in range(count)]
        assert difference(model, merged(same, method, options, images), images) < 1e-4, f"{count} identical"
        assert difference(model, merged(other, method, options, images), images) < 1e-4, f"{count} re-ordered"


def test_every_method_that_matches_is_among_them():
    matching = {name for name, known in entries("aggregator").items() if issubclass(known.cls, Aligning)}
    assert matching - {"fedkfac"} == {name for name, _ in METHODS}  # fedkfac matches as rebasin does, and trains then
