"""Models that draw as they run, and models whose outputs hardly differ: neither noise nor rounding refutes a group."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from fedmerge import ModelError
from fedmerge.permutations import trace, verify


class Autoencoder(nn.Module):
    """Draws what it decodes around what it encodes."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.a, self.mean, self.scale = nn.Linear(16, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.b, self.out = nn.Linear(4, 10), nn.Linear(10, 16)

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        drawn = self.draw(self.mean(hidden), F.softplus(self.scale(hidden)))
        return self.out(torch.relu(self.b(drawn)))


DRAWS = {
    "like another": lambda mean, scale: mean + scale * torch.randn_like(mean),
    "of a shape": lambda mean, scale: mean + scale * torch.randn(mean.shape, dtype=mean.dtype),
    "in place": lambda mean, scale: mean + scale * torch.empty_like(mean).normal_(),
    "a distribution": lambda mean, scale: torch.distributions.Normal(mean, scale).rsample(),
    "by NumPy": lambda mean, scale: mean + scale * float(np.random.rand()),  # noqa: NPY002
    "by Python": lambda mean, scale: mean + scale * random.random(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_noise_refutes_no_group(name):
    torch.manual_seed(0)
    model, x = Autoencoder(DRAWS[name]), torch.randn(4, 16)
    spec = trace(model, x)
    found = {group.name: group.size for group in spec.groups}
    assert found.pop("mean.weight", 4) == 4  # free where the noise is the same for all
    assert found == {"a.weight": 12, "b.weight": 10}
    assert verify(spec, model, x) < 1e-5
    wrong = tuple(replace(group, sites=group.sites[1:]) for group in spec.groups)
    with pytest.raises(ModelError, match="re-ordering neurons changes the outputs"):
        verify(replace(spec, groups=wrong), model, x)


def test_what_a_model_draws_leaves_no_trace():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    def draw(mean, scale):
        return mean + scale * torch.randn_like(mean) * random.random() * float(np.random.rand())  # noqa: NPY002

    model, x = Autoencoder(draw), torch.randn(4, 16)
    before, checks = states(), torch.distributions.Distribution._validate_args
    verify(trace(model, x), model, x)
    assert states() == before
    assert torch.distributions.Distribution._validate_args == checks


class Deep(nn.Module):
    """A residual block with dropout and a skipped branch, `always` even in eval mode."""

    def __init__(self, always):
        super().__init__()
        self.always = always
        self.a, self.b, self.c, self.out = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)
        self.skip, self.drop = StochasticDepth(0.5, "row"), nn.Dropout(0.3)

    def forward(self, x):
        hidden = self.a(x)
        inner = torch.relu(self.b(hidden))
        inner = F.dropout(inner, 0.5) if self.always else self.drop(inner)
        return self.out(hidden + self.skip(self.c(inner)))


def test_dropout_and_stochastic_depth_are_off_in_eval_mode():
    torch.manual_seed(0)
    model = Deep(always=False).train()
    assert sorted(group.size for group in trace(model, torch.randn(4, 8)).groups) == [16, 24]
    assert model.training


def test_dropout_that_is_always_on_pins_what_it_drops():
    torch.manual_seed(0)
    spec = trace(Deep(always=True), torch.randn(4, 8))
    assert [group.size for group in spec.groups] == [16]
    assert spec.pinned["b.weight", 0] == "dropout draws for each position"


def depthwise(width, layers):
    """Convolutions as EfficientNet has and starts them: those by channel let through one part in sqrt(width)."""
    parts = [nn.Conv2d(3, width, 1)]
    for _ in range(layers):
        parts += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
        parts += [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width)]
    for part in parts:
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out")
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def test_signals_that_die_out_under_fresh_statistics_of_batch_norm():
    torch.manual_seed(0)
    model, x = depthwise(24, 20).eval(), torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        y = model.double()(x.double())
        assert (y - y.mean(0)).abs().max() < 1e-12
    model.float()
    spec = trace(model, x)
    assert [group.size for group in spec.groups] == [24] * 21
    assert verify(spec, model, x) < 1e-5
    missed = []
    for i in range(0, len(spec.groups), 5):
        wrong = replace(spec.groups[i], sites=spec.groups[i].sites[1:])
        groups = (*spec.groups[:i], wrong, *spec.groups[i + 1 :])
        if verify(replace(spec, groups=groups), model, x, tolerance=float("inf")) < 1e-5:
            missed.append(spec.groups[i].name)
    assert missed == []


class Narrowing(nn.Module):
    """Many layers that each let through a hundredth; `gain` is a constant, which no draw of weights can mend."""

    def __init__(self, gain, layers):
        super().__init__()
        self.gain = gain
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.gain
        return self.out(x)


def test_outputs_that_hardly_differ_are_no_proof_against_a_group():
    torch.manual_seed(0)
    model, x = Narrowing(0.01, 7), torch.randn(4, 8)
    with torch.no_grad():
        y = model.double()(x.double())
        assert (y - y.mean(0)).abs().max() < 1e-11
    spec = trace(model.float(), x)
    assert [group.size for group in spec.groups] == [8] * 7


def test_small_weights_do_not_hide_a_mistake():
    torch.manual_seed(0)
    model, x = Narrowing(1.0, 12), torch.randn(4, 8)
    for layer in model.layers:
        nn.init.normal_(layer.weight, std=1e-3)
    spec = trace(model, x)
    wrong = replace(spec.groups[0], sites=spec.groups[0].sites[1:])
    with pytest.raises(ModelError, match="wrong are"):
        verify(replace(spec, groups=(wrong, *spec.groups[1:])), model, x)


def test_each_output_is_judged_by_its_own_size():
    """A mistake in a small output is not hidden by a large one."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.small, self.large = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(8, 3)

        def forward(self, x):
            return {"large": 1e9 * self.large(x), "small": 1e-3 * self.small(torch.relu(self.a(x)))}

    torch.manual_seed(0)
    model, x = Both(), torch.randn(4, 8)
    spec = trace(model, x)
    wrong = replace(spec.groups[0], sites=spec.groups[0].sites[1:])
    with pytest.raises(ModelError, match=r"a\.bias"):
        verify(replace(spec, groups=(wrong,)), model, x)
