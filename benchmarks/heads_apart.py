"""Two models of different tasks share a merged body and keep their heads: accuracy by task.

``python benchmarks/heads_apart.py``: two minutes on one core.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fedmerge
from fedmerge.models import build_model

MODELS = {"mlp": ({"hidden": [64]}, "layers.1"), "lenet": ({}, "linear.2")}
METHODS = ("fedavg", "fisher", "regmean")
SEEDS = range(5)


def trained(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """The model after 30 epochs of SGD with momentum."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
    for _ in range(30):
        for batch in torch.randperm(len(x), generator=generator).split(32):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In %."""
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def accuracies(name: str, seed: int) -> Iterator[tuple[str, list[float]]]:
    """By what the body is, the accuracy on each task."""
    options, head = MODELS[name]
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    train, test = train_test_split(np.arange(len(y)), test_size=0.3, random_state=seed, stratify=labels)
    base = build_model(name, (1, 8, 8), 5, seed=seed, **options)
    fit, unseen, models = [], [], []
    for task in (0, 1):
        for rows, part in ((torch.tensor(train), fit), (torch.tensor(test), unseen)):
            own = rows[y[rows] // 5 == task]
            part.append((x[own], y[own] - 5 * task))
        models.append(trained(copy.deepcopy(base), *fit[task], seed=10 * seed + task))

    def judged(bodies: list[nn.Module]) -> list[float]:
        whole = [fedmerge.with_part(body, model, [head]) for body, model in zip(bodies, models, strict=True)]
        return [accuracy(model, *pair) for model, pair in zip(whole, unseen, strict=True)]

    yield "own", judged(models)
    yield "other", judged(models[::-1])
    for method in METHODS:
        body = fedmerge.merge(models, method, leave_out=[head], clients=[[pair] for pair in fit])
        yield method, judged([body, body])


def main() -> None:
    """Print a table for each model."""
    for name in MODELS:
        by_body: dict[str, list[list[float]]] = {}
        for seed in SEEDS:
            for body, part in accuracies(name, seed):
                by_body.setdefault(body, []).append(part)
        for body, each in by_body.items():
            columns = [[row[task] for row in each] for task in (0, 1)]
            shown = "  ".join(f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns)
            print(f"{name:6} {body:8} {shown}")


if __name__ == "__main__":
    main()
