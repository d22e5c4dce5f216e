"""Norms that cut the same channels into different groups, as skips of a U-Net make them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.permutations import trace, verify
from tests.permutations.zoo_of_models import difference, free_perms, permuted


class Block(nn.Module):
    def __init__(self, below, above, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, below), nn.Conv2d(below, above, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, above), nn.Conv2d(above, above, 3, padding=1)
        self.skip = nn.Conv2d(below, above, 1)

    def forward(self, x):
        return self.skip(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class UNet(nn.Module):
    """Down and up again; what went down joins what comes up."""

    def __init__(self, groups, upper, lower):
        super().__init__()
        self.start, self.down1 = nn.Conv2d(3, upper, 3, padding=1), Block(upper, upper, groups)
        self.down2, self.up2 = Block(upper, lower, groups), Block(2 * lower, upper, groups)
        self.middle, self.up1 = Block(lower, lower, groups), Block(2 * upper, upper, groups)
        self.norm, self.out = nn.GroupNorm(groups, upper), nn.Conv2d(upper, 3, 3, padding=1)

    def forward(self, x):
        high = self.down1(self.start(x))
        low = self.down2(F.avg_pool2d(high, 2))
        x = self.up2(torch.cat([self.middle(low), low], 1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2.0), high], 1))
        return self.out(F.silu(self.norm(x)))


@pytest.mark.parametrize("widths", [(4, 8, 16), (4, 12, 8), (2, 6, 10)])
def test_a_unet_with_skips(widths):
    torch.manual_seed(0)
    model, x = UNet(*widths).eval(), torch.randn(2, 3, 8, 8)
    spec = trace(model, x)
    assert spec.unknown == ()
    assert verify(spec, model, x) < 1e-5
    inside = {name.partition(".")[0] for group in spec.groups for name in [group.name]}
    assert {"start", "down1", "down2", "middle", "up1", "up2"} <= inside | {"start"}
    moved = permuted(model, spec, free_perms(spec, 1))
    assert difference(model, moved, x) < 1e-10


@pytest.mark.parametrize("method", ["rebasin", "otfusion"])
def test_a_permuted_unet_is_merged_back(method):
    torch.manual_seed(0)
    model, x = UNet(2, 4, 8).eval(), torch.randn(2, 3, 8, 8)
    other = permuted(model, spec := trace(model, x), free_perms(spec, 1))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    merged = fedmerge.merge([model, other], method, example=x)
    assert difference(model, merged, x) < 1e-4


class Twice(nn.Module):
    """Two norms on one stream."""

    def __init__(self, one, other, width=24):
        super().__init__()
        self.start, self.norm1, self.conv = nn.Conv2d(3, width, 1), nn.GroupNorm(one, width), nn.Conv2d(width, width, 1)
        self.norm2, self.out = nn.GroupNorm(other, width), nn.Conv2d(width, 3, 1)

    def forward(self, x):
        x = self.start(x)
        x = x + self.conv(F.silu(self.norm1(x)))
        return self.out(F.silu(self.norm2(x)))


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ((4, 4), [6] * 4),  # four wholes of six
        ((4, 1), [6] * 4),
        ((24, 4), [6] * 4),  # each channel by itself restricts nothing
        ((8, 4), [3] * 8),  # each six is cut in halves
        ((4, 6), [4, 2, 2, 4] * 2),  # sixes against fours
        ((3, 8), [3, 3, 2] * 3 + [1, 1, 1]),  # eights against threes: 3 3 2|1 3 3 1|2 3 3
    ],
)
def test_channels_are_free_within_what_both_norms_take_together(groups, free):
    torch.manual_seed(0)
    model, x = Twice(*groups), torch.randn(2, 3, 4, 4)
    spec = trace(model, x)
    within = sorted(group.size for group in spec.groups if not group.inner)
    if groups == (3, 8):
        assert within.count(3) == 6
        assert max(within) == 3
    else:
        assert within[-len(free) :] == sorted(free)
    assert verify(spec, model, x) < 1e-5


def test_a_norm_over_inputs_and_channels():
    """The first group holds three inputs, which have their order, and one channel."""

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 13, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 1)

        def forward(self, x):
            return self.out(F.silu(self.norm(torch.cat([x, self.conv(x)], 1))))

    torch.manual_seed(0)
    model, x = Beside(), torch.randn(2, 3, 4, 4)
    spec = trace(model, x)
    assert sorted(group.size for group in spec.groups if not group.inner) == [4, 4, 4]
    assert difference(model, permuted(copy.deepcopy(model), spec, free_perms(spec, 0)), x) < 1e-10
