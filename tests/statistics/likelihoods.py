"""Tasks of every kind, each with a model and a batch, and their likelihoods label by label, with autograd alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.tasks import Binary, Classification, Regression


class Squeezed(nn.Module):
    """One number per example, without an axis of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        return self.net(x)[:, 0]


class Tagger(nn.Module):
    """Classes for each token, on the last axis or on axis 1, through layers that no tap serves."""

    def __init__(self, last):
        super().__init__()
        self.embedding, self.gru = nn.Embedding(6, 3), nn.GRU(3, 3, batch_first=True)
        self.norm, self.out, self.last = nn.LayerNorm(3), nn.Linear(3, 4), last

    def forward(self, tokens):
        found = self.out(self.norm(self.gru(self.embedding(tokens))[0]))
        return found if self.last else found.transpose(1, 2)


def _convolutions(channels):
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Tanh(), nn.Conv2d(3, channels, 1))


def _padded(labels):
    labels[0, 1:], labels[1] = -100, -100
    return labels


def _vectors():
    return torch.randn(5, 4)


def _pictures():
    return torch.randn(4, 1, 3, 2)


KINDS = {
    "regression": (Regression(), lambda: nn.Linear(4, 1), _vectors, lambda x: 2 * x.sum(1, keepdim=True)),
    "regression of columns": (
        Regression(),
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)),
        _vectors,
        lambda x: 3 * x[:, :2],
    ),
    "one number without an axis": (Regression(), Squeezed, _vectors, lambda x: 3 * x.sum(1)),
    "pictures": (Regression(), lambda: _convolutions(1), _pictures, lambda x: 2 * x),
    "one logit": (Binary(), lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), _vectors,
                  lambda x: (x[:, 0] > 0).long()),
    "one logit without an axis": (Binary(), Squeezed, _vectors, lambda x: (x[:, 0] > 0).float()),
    "several labels": (Binary(), lambda: nn.Linear(4, 3), _vectors, lambda x: (x[:, :3] > -1).float()),
    "masks": (Binary(), lambda: _convolutions(1), _pictures, lambda x: (x[:, 0] > 0).long()),
    "segmentation": (Classification(), lambda: _convolutions(3), _pictures, lambda x: torch.randint(0, 3, (4, 3, 2))),
    "segmentation with ignored pixels": (
        Classification(), lambda: _convolutions(3), _pictures, lambda x: _padded(torch.randint(0, 3, (4, 3, 2)))),
    "padded tokens": (
        Classification(), lambda: Tagger(True), lambda: torch.randint(0, 6, (4, 3)),
        lambda x: _padded(torch.randint(0, 4, (4, 3)))),
    "padded tokens, classes first": (
        Classification(), lambda: Tagger(False), lambda: torch.randint(0, 6, (4, 3)),
        lambda x: _padded(torch.randint(0, 4, (4, 3)))),
}  # fmt: skip


def made(name):
    """Task, model and batch, float64, the same every time."""
    task, model, inputs, targets = KINDS[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        x = inputs()
        x = x.double() if x.is_floating_point() else x
        return task, model().double().eval(), x, targets(x)


def vectors(task, output, target):
    """Gradients by one example's outputs of the log-likelihood of every possible label, times its root probability."""
    leaf = output.detach().requires_grad_()
    found = []

    def add(log_likelihood, share):
        found.append(torch.autograd.grad(log_likelihood, leaf, retain_graph=True)[0] * share.detach().sqrt())

    if isinstance(task, Regression):  # (y - o) has variance 1, and is the gradient
        for k in range(output.numel()):
            found.append(torch.eye(output.numel(), dtype=output.dtype)[k].view_as(output))
    elif isinstance(task, Binary):
        for logit in leaf.flatten():
            add(F.logsigmoid(logit), logit.sigmoid())
            add(F.logsigmoid(-logit), (-logit).sigmoid())
    else:
        axis = 0 if output.shape[1:] == target.shape else -1
        logs = leaf.movedim(axis, -1).reshape(target.numel(), -1).log_softmax(-1)
        for position, label in enumerate(target.flatten()):
            for log in logs[position] if label != -100 else ():
                add(log, log.exp())
    return found


def loss(task, output, target):
    """Negative log-likelihood of one example, up to a constant."""
    if isinstance(task, Regression):
        return (output.flatten() - target.flatten()).square().sum() / 2
    if isinstance(task, Binary):
        return F.binary_cross_entropy_with_logits(output.flatten(), target.flatten().to(output.dtype), reduction="sum")
    axis = 0 if output.shape[1:] == target.shape else -1
    return F.cross_entropy(output.movedim(axis, -1).reshape(target.numel(), -1), target.flatten(), reduction="sum")
