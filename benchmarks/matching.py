"""CPU time of matching merges against the published algorithms, written plainly, in one interleaved run.

    python benchmarks/matching.py [--repeats 5]

Ten MLPs 784-100-10 (PFNM) and two MLPs 784-400-200-10 (weight matching, OT fusion), each trained from an
initialisation of its own on scikit-learn's digits at 28x28 pixels. Baselines do what the authors' codes do:

- PFNM: one sweep over all clients to begin with and five more, gains computed neuron by neuron against all global ones;
- weight matching: every group in random order, all inner products anew, permutations multiplied as matrices to
  judge the gain, until a sweep changes nothing;
- OT fusion: distances from the tensor of all differences, exact transport by the network simplex.

What fedmerge needs besides (tracing the model, proving its symmetries) is in its time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from statistics import median

import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

import fedmerge
from fedmerge.data import PartitionSettings, load_dataset, make_partition
from fedmerge.training import LocalTraining, train

Weights = list[Tensor]


def trained(clients: int, hidden: list[int]) -> list[nn.Sequential]:
    """MLPs that were initialised and trained apart."""
    dataset = load_dataset("digits")
    partition = make_partition(dataset, PartitionSettings(scheme="iid", clients=clients), seed=0)
    models = []
    for client, rows in enumerate(partition.train):
        torch.manual_seed(client)
        sizes = [784, *hidden, 10]
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(len(sizes) - 1):
            layers += [nn.Linear(sizes[i], sizes[i + 1])] + ([nn.ReLU()] if i < len(hidden) else [])
        model = nn.Sequential(*layers)
        x = F.interpolate(dataset.train_x[rows], size=(28, 28), mode="bilinear")
        train(model, x, dataset.train_y[rows], LocalTraining(epochs=20), seed=0, client=client, round=1)
        models.append(model.eval())
    return models


def published_pfnm(models: list[nn.Sequential], sweeps: int = 5) -> int:
    """The width of the matched layer, sigma, sigma0 and gamma being 1 and classes being equally frequent."""
    count = len(models)
    features = []
    for model in models:
        first, last = [layer for layer in model if isinstance(layer, nn.Linear)]
        features.append(torch.cat([first.weight, first.bias[:, None], last.weight.T], 1).detach().double())
    s = torch.cat([torch.ones(785), torch.full((10,), 1 / count)]).double()
    sums, precisions, counts = (torch.zeros(0, 795).double(), torch.zeros(0, 795).double(), torch.zeros(0))
    assigned: dict[int, Tensor] = {}
    order = list(range(count))
    for sweep in range(sweeps + 1):
        for j in order if sweep == 0 else torch.randperm(count).tolist():
            v = features[j]
            if j in assigned:
                old = assigned.pop(j)
                sums.index_add_(0, old, v * s, alpha=-1)
                precisions.index_add_(0, old, s.expand_as(v), alpha=-1)
                counts.index_add_(0, old, torch.ones(len(v)), alpha=-1)
                keep = counts > 0
                number = keep.cumsum(0) - 1
                sums, precisions, counts = sums[keep], precisions[keep], counts[keep]
                assigned = {k: number[a] for k, a in assigned.items()}
            known = len(counts)
            gains = torch.empty(len(v), known + len(v)).double()
            for row in range(len(v)):
                joined = ((v[row] * s + sums).square() / (s + precisions) - sums.square() / precisions).sum(1)
                gains[row, :known] = joined + (counts.clamp(max=10) / (count - counts.clamp(max=10))).log()
                own = ((v[row] * s).square() / (1 + s)).sum()
                gains[row, known:] = own - 2 * torch.arange(1, len(v) + 1).log() + 2 * math.log(1 / count)
            columns = torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1])
            fresh = columns >= known
            columns[fresh] = known + torch.arange(int(fresh.sum()))
            sums = torch.cat([sums, torch.zeros(int(fresh.sum()), 795).double()])
            precisions = torch.cat([precisions, torch.ones(int(fresh.sum()), 795).double()])
            counts = torch.cat([counts, torch.zeros(int(fresh.sum()))])
            sums.index_add_(0, columns, v * s)
            precisions.index_add_(0, columns, s.expand_as(v))
            counts.index_add_(0, columns, torch.ones(len(v)))
            assigned[j] = columns
    return len(counts)


def matrices(model: nn.Sequential) -> Weights:
    """Weights with the bias as a last column."""
    return [torch.cat([x.weight, x.bias[:, None]], 1).detach() for x in model if isinstance(x, nn.Linear)]


def published_weight_matching(a: Weights, b: Weights) -> list[Tensor]:
    """Permutations of the hidden layers of `b`."""
    perms = [torch.arange(len(w)) for w in a[:-1]]
    while True:
        moved = False
        for k in torch.randperm(len(perms)).tolist():
            rows, columns = b[k], b[k + 1]
            if k > 0:
                rows = torch.cat([rows[:, :-1][:, perms[k - 1]], rows[:, -1:]], 1)
            if k + 1 < len(perms):
                columns = columns[perms[k + 1]]
            products = a[k] @ rows.T + a[k + 1][:, :-1].T @ columns[:, :-1]
            assigned = torch.from_numpy(linear_sum_assignment(products.numpy(), maximize=True)[1])
            eye = torch.eye(len(assigned))
            old, new = (float((products * eye[p]).sum()) for p in (perms[k], assigned))
            moved |= new > old + 1e-12 * abs(old) + 1e-6
            perms[k] = assigned
        if not moved:
            return perms


def published_otfusion(a: Weights, b: Weights) -> Weights:
    """Layers of `b` carried onto those of `a`, then the mean."""
    carried, plan = [], torch.eye(784)
    for k, (target, source) in enumerate(zip(a, b, strict=True)):
        source = torch.cat([source[:, :-1] @ plan, source[:, -1:]], 1)  # noqa: PLW2901 - as the paper writes it
        if k + 1 < len(a):
            cost = (source[:, None] - target[None]).square().sum(-1).sqrt()
            n = len(cost)
            coupling = torch.from_numpy(ot.emd([1 / n] * n, [1 / n] * n, cost.double().numpy())).float()
            plan = coupling * n
            source = plan.T @ source  # noqa: PLW2901
        carried.append((source + target) / 2)
    return carried


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
    many, pair = trained(10, [100]), trained(2, [400, 200])
    example, both = torch.zeros(2, 1, 28, 28), [matrices(model) for model in pair]
    counts = [{"class_counts": {"class_counts": torch.ones(10)}}] * 10

    def pfnm() -> nn.Module:
        return fedmerge.merge(many, "pfnm", statistics=counts, example=example, gamma=1.0)

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "pfnm, 10 clients": (pfnm, lambda: published_pfnm(many)),
        "weight matching, 2 models": (
            lambda: fedmerge.merge(pair, "rebasin", example=example),
            lambda: published_weight_matching(*both),
        ),
        "otfusion, 2 models": (
            lambda: fedmerge.merge(pair, "otfusion", example=example),
            lambda: published_otfusion(*both),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        ours()  # the first call exports the graph, which is kept
        times = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats)]
        first, other = (median(column) for column in zip(*times, strict=True))
        print(f"{name:30s} ours {first:8.3f} s   published {other:8.3f} s   ratio {first / other:.3f}")


if __name__ == "__main__":
    main()
