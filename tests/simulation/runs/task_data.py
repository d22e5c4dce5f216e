"""Small data sets of four kinds of tasks, their models, and a task, a loss and a metric of one's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedmerge.data import Dataset
from fedmerge.tasks import Regression


def _split(name, x, y, classes=0, task=""):
    return Dataset(name, x[:160], y[:160], x[160:], y[160:], classes, task=task)


def table():
    """Two numbers to regress on five."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 5, generator=generator)
    y = torch.stack([x[:, 0] + 2 * x[:, 1] + 3, x[:, 2] * x[:, 3]], 1) + 0.1 * torch.randn(240, 2, generator=generator)
    return _split("table", x, y, task="regression")


def topics():
    """Three labels, each of which may be true."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(240, 5, generator=generator)
    labels = torch.stack([x[:, 0] > 0, x[:, 0] + x[:, 1] > 0.5, x[:, 2] > -0.5], 1).long()
    return _split("topics", x, labels, 2)


def yes_or_no():
    """One question for each example."""
    data = topics()
    return Dataset("answers", data.train_x, data.train_y[:, 0], data.test_x, data.test_y[:, 0], 2)


def shapes():
    """Pictures with a square or a cross, each pixel to be named; the border does not count."""
    generator = torch.Generator().manual_seed(2)
    x, y = 0.2 * torch.randn(240, 1, 8, 8, generator=generator), torch.zeros(240, 8, 8, dtype=torch.long)
    for i in range(240):
        row, column = torch.randint(1, 5, (2,), generator=generator).tolist()
        mask = torch.zeros(8, 8, dtype=torch.bool)
        if i % 2:
            mask[row : row + 3, column : column + 3] = True
        else:
            mask[row + 1, column : column + 3] = mask[row : row + 3, column + 1] = True
        y[i][mask] = 1 + i % 2
        x[i, 0][mask] += 1
    y[:, 0], y[:, -1] = -100, -100
    return _split("shapes", x, y, 3)


def text():
    """Rows of counting tokens 1 to 6, padded with 0."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(0, 6, (240, 1), generator=generator)
    tokens = (start + torch.arange(9)) % 6 + 1
    lengths = torch.randint(4, 10, (240, 1), generator=generator)
    tokens = tokens * (torch.arange(9) < lengths)
    return _split("text", tokens[:, :-1], tokens[:, 1:], 7)


def dense_net(input_shape, num_classes):
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, num_classes, 3, padding=1))


def token_net(input_shape, num_classes):
    return nn.Sequential(nn.Embedding(num_classes, 8), nn.Tanh(), nn.Linear(8, num_classes))


def one_output(input_shape, num_classes, hidden=()):
    return nn.Linear(input_shape[0], 1)


def pinball(outputs, targets):
    """A loss of one's own: the 0.8 quantile."""
    error = targets - outputs
    return torch.maximum(0.8 * error, -0.2 * error)


def within_one(outputs, targets):
    """A metric of one's own, per example."""
    return ((outputs - targets).abs() < 1).float().mean(1)


@dataclass(frozen=True)
class Doubled(Regression):
    """A task of one's own: the model gives half of what is wanted."""

    factor: float = 2.0

    def forward(self, model, inputs):
        return self.factor * super().forward(model, inputs)


KINDS = {
    "regression": ("table", "mlp", {"hidden": [8]}, {}),
    "multilabel": ("topics", "mlp", {"hidden": [8]}, {"name": "multilabel"}),
    "segmentation": ("shapes", "task_data:dense_net", {}, {"name": "classification", "metrics": ["iou"]}),
    "language model": ("text", "task_data:token_net", {}, {"name": "language_model", "options": {"padding": 0}}),
}


def settings(kind, **changes):
    """Settings of a comparison of FedAvg on a kind of task."""
    data, model, options, task = KINDS[kind]
    return {
        "data": {"name": f"task_data:{data}"},
        "methods": ["fedavg"],
        "rounds": 2,
        "partition": {"scheme": "iid", "clients": 4},
        "model": {"name": model, "options": options},
        "training": {"epochs": 4, "learning_rate": 0.05, "batch_size": 16},
        "task": task,
        "workers": 1,
    } | changes
