"""Modules that read from a state_dict which version of themselves it is of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import MNASNet

import fedmerge
from fedmerge.diagnostics.barriers import barrier
from fedmerge.models.resize import fill, resize
from fedmerge.permutations import Plan, trace, transport
from tests.permutations.zoo_of_models import difference, free_perms


class Versioned(nn.Module):
    """Takes tensors of its own version alone, as torchvision's MNASNet does."""

    _version = 3

    def __init__(self, width=6):
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 3:
            raise ValueError(f"version 3 is wanted, not {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.fixture
def models():
    torch.manual_seed(0)
    return [nn.Sequential(Versioned()) for _ in range(3)]


@pytest.mark.parametrize("method", ["fedavg", "median", "rebasin", "otfusion", "c2m3", "fedatt"])
def test_versioned_modules_are_merged(method, models):
    base = copy.deepcopy(models[0]) if method == "fedatt" else None
    merged = fedmerge.merge(models, method, base=base, example=torch.randn(4, 4))
    assert merged(torch.randn(2, 4)).isfinite().all()


def test_what_a_spec_makes_can_be_loaded(models):
    model, x = models[0], torch.randn(4, 4)
    spec = trace(model, x)
    other = copy.deepcopy(model)
    other.load_state_dict(spec.apply(model.state_dict(), free_perms(spec, 0)))
    assert difference(model, other, x) < 1e-10
    wide = transport(spec, model.state_dict(), {0: Plan(torch.eye(6).repeat(2, 1), torch.eye(6).repeat(2, 1) / 2)})
    nn.Sequential(Versioned(12)).load_state_dict(wide)


def test_a_resized_module_keeps_its_version(models):
    state = nn.Sequential(Versioned(9)).state_dict()
    resized = resize(models[0], dict(state))
    assert torch.equal(resized[0].a.weight, state["0.a.weight"])


def test_the_line_between_versioned_models(models):
    found = barrier(*models[:2], [(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))], points=3)
    assert len(found.losses) == 3


def test_a_state_of_other_names_is_refused(models):
    with pytest.raises(RuntimeError, match="Missing key"):
        fill(models[0], {"0.a.weight": torch.zeros(6, 4)})
    fill(models[0], {"0.a.weight": torch.zeros(6, 4)}, strict=False)
    assert not models[0][0].a.weight.any()


def test_an_mnasnet_is_merged():
    torch.manual_seed(0)
    a, b = (MNASNet(0.1, num_classes=3).eval() for _ in range(2))
    merged = fedmerge.merge([a, b])
    assert torch.allclose(merged.classifier[1].weight, (a.classifier[1].weight + b.classifier[1].weight) / 2, atol=1e-6)
