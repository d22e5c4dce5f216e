"""CPU time of curvature merges against the published algorithms, written plainly, in one interleaved run.

    python benchmarks/curvature.py [--repeats 5]

Five LeNets (44,190 parameters, no biases, those of the FedFisher paper) are trained on scikit-learn's digits at
28x28 pixels, Dirichlet(0.1). Baselines do what the authors' algorithms do, on the same statistics:

- FedFisher K-FAC: 2,000 steps of momentum 0.9 with an adaptive denominator, step size 0.01, each step the gradient
  ``sum_i p_i G_i W A_i - sum_i p_i G_i W_i A_i`` of every layer, from the average;
- RegMean: a Gram pass over the clients' examples in batches of 16 through the linear layers, two shrinkages tried,
  pseudo-inverses; once with the pass that clients make and once without.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmerge
from fedmerge.data import PartitionSettings, load_dataset, make_partition
from fedmerge.models import build_model
from fedmerge.offline.compute import compute_statistics
from fedmerge.training import LocalTraining, train

Statistics = list[dict[str, dict[str, Tensor]]]


def clients() -> tuple[list[nn.Module], list[list[tuple[Tensor, Tensor]]], list[float]]:
    """Trained models, their data as batches, their numbers of examples."""
    dataset = load_dataset("digits")
    partition = make_partition(dataset, PartitionSettings(clients=5, alpha=0.1), seed=0)
    models, loaders, weights = [], [], []
    for client, rows in enumerate(partition.train):
        x = F.interpolate(dataset.train_x[rows], size=(28, 28), mode="bilinear")
        y = dataset.train_y[rows]
        model = build_model("lenet", (1, 28, 28), 10, seed=0, bias=False)
        train(model, x, y, LocalTraining(epochs=20), seed=0, client=client, round=1)
        models.append(model.eval())
        loaders.append(list(zip(x.split(512), y.split(512), strict=True)))
        weights.append(float(len(x)))
    return models, loaders, weights


def published_fedfisher(models: list[nn.Module], statistics: Statistics, weights: list[float]) -> dict[str, Tensor]:
    """2,000 steps on the K-FAC quadratic."""
    shares = [w / sum(weights) for w in weights]
    merged = {}
    for name, first in models[0].named_parameters():
        own = [dict(model.named_parameters())[name].detach().flatten(1) for model in models]
        factors = [(s["fisher_kfac"][f"{name}.A"], s["fisher_kfac"][f"{name}.G"]) for s in statistics]
        w = sum(p * x for p, x in zip(shares, own, strict=True))
        target = sum(p * (g @ x @ a) for p, x, (a, g) in zip(shares, own, factors, strict=True))
        momentum, squares = torch.zeros_like(w), torch.zeros_like(w)
        for _ in range(2000):
            gradient = sum(p * (g @ w @ a) for p, (a, g) in zip(shares, factors, strict=True)) - target
            momentum = 0.9 * momentum + gradient
            squares = 0.99 * squares + gradient * gradient
            w = w - 0.01 * momentum / (squares + 0.01).sqrt()
        merged[name] = w.view_as(first)
    return merged


def published_grams(models: list[nn.Module], loaders: list[list[tuple[Tensor, Tensor]]]) -> list[dict[str, Tensor]]:
    """Inputs of linear layers, 16 examples at a time, by hooks."""
    grams = []
    for model, batches in zip(models, loaders, strict=True):
        sums: dict[str, Tensor] = {}
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_pre_hook(adder(sums, name)) for name, module in layers]
        with torch.no_grad():
            for x, _ in batches:
                for piece in x.split(16):
                    model(piece)
        for handle in handles:
            handle.remove()
        grams.append(sums)
    return grams


def adder(sums: dict[str, Tensor], name: str) -> Callable[..., None]:
    """A hook that adds the products of a layer's inputs."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + args[0].T @ args[0]

    return hook


def published_regmean(models: list[nn.Module], grams: list[dict[str, Tensor]]) -> list[Tensor]:
    """Pseudo-inverses with two shrinkages."""
    merged = []
    for shrinkage in (0.1, 0.9):
        for name in grams[0]:
            shrunk = [shrinkage * g[name] + (1 - shrinkage) * g[name].diag().diag() for g in grams]
            own = [model.get_submodule(name).weight.detach() for model in models]
            products = sum(w @ g for w, g in zip(own, shrunk, strict=True))
            merged.append(products @ torch.linalg.pinv(sum(shrunk)))
    return merged


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    models, loaders, weights = clients()
    statistics = [
        compute_statistics(model, batches, ["fisher_kfac", "gram"])
        for model, batches in zip(models, loaders, strict=True)
    ]
    grams = published_grams(models, loaders)

    def merged(method: str) -> nn.Module:
        return fedmerge.merge(models, method, weights=weights, statistics=statistics)

    def measured_and_merged() -> nn.Module:
        return fedmerge.merge(models, "regmean", weights=weights, clients=loaders)

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "fedfisher, K-FAC": (
            lambda: merged("fedfisher"),
            lambda: published_fedfisher(models, statistics, weights),
        ),
        "regmean, merge alone": (lambda: merged("regmean"), lambda: published_regmean(models, grams)),
        "regmean, Gram pass included": (
            measured_and_merged,
            lambda: published_regmean(models, published_grams(models, loaders)),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        times = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats)]
        first, other = (median(column) for column in zip(*times, strict=True))
        print(f"{name:30s} ours {first:8.3f} s   published {other:8.3f} s   ratio {first / other:.3f}")


if __name__ == "__main__":
    main()
