"""Large models at their own initialisation: traced, proved, and merged with a permuted copy of themselves."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.permutations import trace, verify
from tests.permutations.test_norms_cut_differently import UNet

pytestmark = pytest.mark.study

CLASSES = 10
WORDS = 82


class Norm(nn.Module):
    """Root mean square, in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        scaled = x.float()
        scaled = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class Attention(nn.Module):
    """Eight heads under rotary positions, four to a key."""

    def __init__(self, width, heads=8, keys=2):
        super().__init__()
        self.size, self.times = width // heads, heads // keys
        self.q, self.k, self.v = (nn.Linear(width, n * self.size, bias=False) for n in (heads, keys, keys))
        self.o = nn.Linear(width, width, bias=False)
        self.register_buffer("frequencies", 1e4 ** -torch.linspace(0, 1, self.size // 2), persistent=False)

    def turned(self, x):
        angles = torch.outer(torch.arange(x.shape[-2]), self.frequencies.float())
        cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angles.cos(), angles.sin()))
        one, other = x.chunk(2, -1)
        return x * cos + torch.cat([-other, one], -1) * sin

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = self.turned(k).repeat_interleave(self.times, 1), v.repeat_interleave(self.times, 1)
        mixed = F.scaled_dot_product_attention(self.turned(q), k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm1, self.attention, self.norm2 = Norm(width), Attention(width), Norm(width)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        inner = self.norm2(x)
        return x + self.down(F.silu(self.gate(inner)) * self.up(inner))


class Decoder(nn.Module):
    """As LLaMA is built, with one table for words that come in and go out."""

    def __init__(self, width=64, hidden=128, layers=2):
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.layers = nn.Sequential(*(Layer(width, hidden) for _ in range(layers)))
        self.norm, self.out = Norm(width), nn.Linear(width, WORDS, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words):
        return self.out(self.norm(self.layers(self.words(words))))


def _small_maxvit():
    return torchvision.models.maxvit.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32, 48, 64],
        block_layers=[1, 1, 1, 1],
        head_dim=8,
        stochastic_depth_prob=0.1,
        num_classes=CLASSES,
    )


def _images(size=64):
    return torch.randn(4, 3, size, size)


MODELS = {
    "decoder": (Decoder, lambda: torch.randint(0, WORDS, (4, 9))),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(num_classes=CLASSES), _images),
    "mnasnet0_5": (lambda: torchvision.models.mnasnet0_5(num_classes=CLASSES), _images),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES), _images),
    "maxvit": (_small_maxvit, _images),
    "swin_v2_t": (lambda: torchvision.models.swin_v2_t(num_classes=CLASSES), _images),
    "resnext50_32x4d": (lambda: torchvision.models.resnext50_32x4d(num_classes=CLASSES), _images),
    "unet": (lambda: UNet(8, 32, 64), lambda: _images(32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_copy_is_merged_back(name):
    torch.manual_seed(0)
    build, example = MODELS[name]
    model, x = build().eval(), example()
    spec = trace(model, x)
    assert spec.groups
    assert verify(spec, model, x) < 1e-5
    other = copy.deepcopy(model)
    other.load_state_dict(spec.apply(model.state_dict(), spec.random(torch.Generator().manual_seed(1))))
    with torch.no_grad():
        wanted = model(x)
        spread = (wanted - wanted.mean(0)).std()
        for method in ("rebasin", "otfusion"):
            merged = fedmerge.merge([model, other], method, example=x).eval()
            assert (merged(x) - wanted).abs().max() < 1e-3 * spread, method
