"""Small models of every kind that statistics have to serve, each with a batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.models import build_model


class Functional(nn.Module):
    """Uses one weight through a module and again through F.linear."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(F.linear(torch.relu(self.fc(x)), self.fc.weight))


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


class Tied(nn.Module):
    """A language model whose output weight is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.mix(self.embedding(tokens))))


class Inplace(nn.Module):
    """Works in place right after a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(2 * 4 * 4, 3)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x), inplace=True).flatten(1))


class Recurrent(nn.Module):
    """Time first inside, both directions, two layers."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 4, 2, bidirectional=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.lstm(x.transpose(0, 1))[0][-1])


class Cell(nn.Module):
    """Steps of an LSTM cell."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.out(state[0])


class Gated(nn.Module):
    """A GRU, which no tap serves."""

    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


class Branching(nn.Module):
    """Looks at a value, which torch.vmap cannot follow."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.fc(x))
        return self.out(torch.tanh(x) if float(x.abs().sum()) > 0 else x)


class Up(nn.Module):
    """A transposed convolution and a bilinear layer."""

    def __init__(self):
        super().__init__()
        self.up, self.fc, self.pair = nn.ConvTranspose2d(1, 2, 2), nn.Linear(18, 4), nn.Bilinear(4, 4, 3)

    def forward(self, x):
        x = torch.tanh(self.fc(self.up(x).flatten(1)))
        return self.pair(x, x)


def _net(*layers):
    return nn.Sequential(*layers)


def _weight_normed():
    return _net(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def _frozen():
    model = _net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    return model


VECTORS, IMAGES, MAPS = (6, 4), (4, 1, 6, 6), (4, 4, 6, 6)
MODELS = {
    "mlp": (lambda: _net(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), VECTORS),
    "no bias": (lambda: _net(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)), VECTORS),
    "cnn": (lambda: _net(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)), IMAGES),
    "dilated": (lambda: _net(nn.Conv2d(1, 3, 2, dilation=2, bias=False), nn.Flatten(), nn.Linear(48, 3)), IMAGES),
    "oblong": (lambda: _net(nn.Conv2d(1, 2, (3, 2), (1, 2), (1, 0)), nn.Flatten(), nn.Linear(36, 3)), IMAGES),
    "reflect": (
        lambda: _net(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(72, 3)),
        IMAGES,
    ),
    "circular": (
        lambda: _net(nn.Conv1d(4, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(12, 3)),
        (4, 4, 6),
    ),
    "conv1d": (
        lambda: _net(nn.Conv1d(4, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
        (4, 4, 6),
    ),
    "groups": (lambda: _net(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)), MAPS),
    "depthwise": (lambda: _net(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), MAPS),
    "group norm": (
        lambda: _net(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        IMAGES,
    ),
    "batch norm": (
        lambda: _net(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        IMAGES,
    ),
    "layer norm": (lambda: _net(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)), VECTORS),
    "dropout": (lambda: _net(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)), VECTORS),
    "functional": (Functional, VECTORS),
    "twice": (Twice, VECTORS),
    "in place": (Inplace, IMAGES),
    "weight norm": (_weight_normed, VECTORS),
    "frozen": (_frozen, VECTORS),
    "lstm": (Recurrent, (4, 3, 3)),
    "lstm cell": (Cell, (4, 3, 3)),
    "gru": (Gated, (4, 3, 3)),
    "branching": (Branching, VECTORS),
    "unusual": (Up, (4, 1, 2, 2)),
    "transformer": (
        lambda: _net(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 3)),
        (3, 3, 4),
    ),
    "vit": (lambda: build_model("vit", (1, 8, 8), 3, seed=0, dim=4, depth=1, heads=2), (3, 1, 8, 8)),
    "resnet8": (lambda: build_model("resnet8", (1, 8, 8), 3, seed=0), (3, 1, 8, 8)),
}


def made(name):
    """A model and a batch, the same every time."""
    factory, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, x = factory(), torch.randn(shape)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model, x, torch.randint(0, 3, (shape[0],))


def sequences():
    """A character model whose positions have labels of their own, and one with tied weights."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        tokens, labels = torch.randint(0, 5, (3, 4)), torch.randint(0, 5, (3, 4))
        return [
            (build_model("char_lstm", (4,), 5, seed=0, hidden=3, embedding=2), tokens, labels),
            (Tied(), tokens, labels),
        ]
