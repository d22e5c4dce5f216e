"""Tiny models whose neurons move as parts of wholes: heads, groups of convolutions, pixels, units of a cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from tests.permutations.zoo_of_models import distinct

CLASSES = 5
WIDTH = 16


def half_turned(x):
    one, other = x.chunk(2, -1)
    return torch.cat([-other, one], -1)


def pairs_turned(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def rotated(x, kind):
    """Rotary positions as LLaMA, GPT-J, LLaMA's first release and GPT-NeoX compute them."""
    if kind == "partial":
        size = x.shape[-1] // 2
        return torch.cat([rotated(x[..., :size], "half"), x[..., size:]], -1)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64)[: x.shape[-1] // 2]
    angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequencies)
    if kind == "complex":
        turns = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)
    turned = half_turned if kind == "half" else pairs_turned
    angles = (torch.cat([angles, angles], -1) if kind == "half" else angles.repeat_interleave(2, -1)).to(x.dtype)
    return x * angles.cos() + turned(x) * angles.sin()


class Attention(nn.Module):
    """Attention with a residual stream between two linear layers."""

    def __init__(self, heads=4, keys=None, *, rotary=None, norm=None, product="sdpa", biases=True, positions=None):
        super().__init__()
        self.heads, self.keys, self.size = heads, keys or heads, WIDTH // heads
        self.rotary, self.norm, self.product, self.positions = rotary, norm, product, positions
        self.embed, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.q = nn.Linear(WIDTH, WIDTH, bias=biases)
        self.k, self.v = (nn.Linear(WIDTH, self.keys * self.size, bias=biases) for _ in range(2))
        self.o = nn.Linear(WIDTH, WIDTH, bias=biases)
        if norm == "rms":
            self.norm_q, self.norm_k = nn.RMSNorm(self.size), nn.RMSNorm(self.size)
        if norm == "cosine":
            self.scale = nn.Parameter(torch.rand(heads, 1, 1))
        if positions == "table":
            self.table = nn.Parameter(torch.randn(9, heads))

    def mask(self, x):
        steps = torch.arange(x.shape[1])
        apart = steps[None] - steps[:, None]
        if self.positions == "alibi":  # a slope for each head, which no parameter holds
            return apart.abs().to(x.dtype) * -(2.0 ** -torch.arange(1.0, self.heads + 1, dtype=x.dtype)).view(-1, 1, 1)
        if self.positions == "table":
            return self.table[apart + 4].permute(2, 0, 1)
        return apart.abs() < 3 if self.positions == "window" else None

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.norm == "rms":
            q, k = self.norm_q(q), self.norm_k(k)
        if self.norm == "cosine":
            q, k = F.normalize(q, dim=-1) * self.scale.exp(), F.normalize(k, dim=-1)
        if self.rotary:
            q, k = rotated(q, self.rotary), rotated(k, self.rotary)
        return self.out(x + self.o(self.attend(q, k, v, self.mask(x)).transpose(1, 2).flatten(2)))

    def attend(self, q, k, v, mask):
        times = self.heads // self.keys
        if self.product == "gqa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        if self.product == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
            return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        if self.product == "broadcast":  # one key for all heads
            return torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        if self.product == "repeat":
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        elif times > 1:
            k, v = (y[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for y in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Fused(Attention):
    """Queries, keys and values of a head beside each other in one linear layer."""

    def __init__(self):
        super().__init__(2, rotary="partial")
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        del self.q, self.k, self.v

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        y = self.attend(rotated(q, "partial"), rotated(k, "partial"), v, None)
        return self.out(x + self.o(y.transpose(1, 2).flatten(2)))


class Grouped(nn.Module):
    """Two blocks as ResNeXt has them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.Sequential(*(Bottleneck(16, 4, groups=4, base_width=64) for _ in range(2)))
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


class Decoder(nn.Module):
    """A linear layer whose outputs are channels, one upsampled by another's pixels."""

    def __init__(self):
        super().__init__()
        self.start, self.conv = nn.Linear(6, 8 * 9), nn.Conv2d(8, 24, 3, padding=1)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Conv2d(6, 3, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.start(x).view(-1, 8, 3, 3)))
        return self.out(F.relu(F.pixel_shuffle(self.conv(F.max_pool2d(x, 2, 1)), 2))).mean((2, 3))


class Cell(nn.Module):
    """Steps of a recurrent cell."""

    def __init__(self, kind, start):
        super().__init__()
        self.cell, self.out = kind(6, 12), nn.Linear(12, CLASSES)
        self.start = nn.Linear(6, 12) if start else None

    def forward(self, x):
        state = None if self.start is None else torch.tanh(self.start(x[:, 0]))
        for step in range(2):
            state = self.cell(x[:, step], state)
        return self.out(state[0] if isinstance(state, tuple) else state)


def sequence(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))


def normed(norm):
    first, second = norm(nn.Conv2d(3, 8, 3)), norm(nn.Conv2d(8, 12, 3))
    return sequence(first, nn.ReLU(), second, nn.ReLU())


@dataclass(frozen=True)
class Model:
    """An architecture, a batch and the sizes of its groups by hand, those of blocks last."""

    build: Callable[[], nn.Module]
    batch: Callable[[], torch.Tensor]
    sizes: tuple[int, ...]
    blocks: tuple[int, ...] = ()

    def make(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, batch = self.build().eval(), self.batch()
            distinct(model)
        return model, batch


def steps():
    return torch.randn(4, 5, 6)


def images():
    return torch.randn(4, 3, 10, 10)


def attention(sizes, blocks=(), **settings):
    return Model(partial(Attention, **settings), steps, (WIDTH, *sizes), blocks)


FOURS = (4,) * 4
MODELS = {
    # Under rotary positions the dimensions of a query stay, those of a value (4 of each head) are free.
    "rotary": attention(FOURS, (4,), rotary="half"),
    "rotary_interleaved": attention(FOURS, (4,), rotary="interleaved", biases=False),
    "rotary_complex": attention((8, 8), (2,), heads=2, rotary="complex"),
    "rotary_fused_partial": Model(Fused, steps, (WIDTH, 4, 4, 8, 8), (2,)),
    # Two keys for four heads: two heads in each group, values of each key, groups as a whole.
    "grouped_queries": attention((2, 2, 4, 4), (2,), keys=2, rotary="half"),
    "grouped_queries_repeated": attention((2, 2, 4, 4), (2,), keys=2, rotary="half", product="repeat"),
    "grouped_queries_enabled": attention((2, 2, 4, 4), (2,), keys=2, rotary="half", product="gqa", biases=False),
    "grouped_queries_unrotated": attention((2, 2, 4, 4, 4, 4), (2,), keys=2, positions="window"),
    "one_key": attention((4, 4), keys=1, rotary="half"),
    "one_key_unrotated": attention((4, 4, 4), keys=1, product="broadcast"),
    # What all heads share crosses them: one group of dimensions of queries, heads, values of each head.
    "normed_queries": attention((4, *FOURS), (4,), norm="rms"),
    "normed_queries_rotary_grouped": attention((2, 2, 4, 4), (2,), keys=2, norm="rms", rotary="half"),
    "cosine": attention(FOURS + FOURS, (4,), norm="cosine"),
    "einsum": attention(FOURS + FOURS, (4,), product="einsum"),
    "table_of_positions": attention(FOURS + FOURS, (4,), positions="table"),
    "slopes": attention(FOURS + FOURS, positions="alibi"),
    # In each of two blocks: 4 channels into and out of each of 4 groups, and the groups.
    "grouped_convolution": Model(Grouped, images, (16, *(4,) * 16), (4, 4)),
    "grouped_convolution_transposed": Model(
        lambda: sequence(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3, groups=2)),
        images,
        (4, 4, 6, 6),
        (2,),
    ),
    "linear_to_channels": Model(Decoder, lambda: torch.randn(4, 6), (8, 6)),
    "gru_cell": Model(lambda: Cell(nn.GRUCell, True), steps, (12,)),
    "lstm_cell": Model(lambda: Cell(nn.LSTMCell, False), steps, (12,)),
    "rnn_cell": Model(lambda: Cell(nn.RNNCell, True), steps, (12,)),
    "frozen_batch_norm": Model(
        lambda: sequence(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3)), images, (8, 12)
    ),
    "spectral_norm": Model(lambda: normed(parametrizations.spectral_norm), images, (8, 12)),
    "spectral_norm_by_hook": Model(lambda: normed(nn.utils.spectral_norm), images, (8, 12)),
    "weight_norm": Model(lambda: normed(parametrizations.weight_norm), images, (8, 12)),
}
