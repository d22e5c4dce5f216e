"""Many models matched at once, against all orders that there are; and what PFNM takes a client's neurons to weigh."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch

import fedmerge
from fedmerge.aggregators import layerwise
from fedmerge.matching.fairness import shares_of
from fedmerge.matching.universe import match_universe
from fedmerge.permutations import Group, PermutationSpec, Site

WEIGHTS = [3.0, 2.0, 2.0]


def two_layers():
    """Two hidden layers of three neurons, by hand."""
    groups = [
        Group(
            f"{i}", 3, (Site(f"{i}", 0, torch.arange(3)[:, None]), Site(f"{i + 1}", 1, torch.arange(3)[:, None], "in"))
        )
        for i in range(2)
    ]
    return PermutationSpec(tuple(groups))


def models(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0": (3, 2), "1": (3, 3), "2": (2, 3)}
    return [{n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()} for _ in WEIGHTS]


def objective(states, orders):
    """``sum_{i<j} p_i p_j <P_i theta_i, P_j theta_j>``, written out."""
    shares = np.array(shares_of(WEIGHTS))
    moved = []
    for state, (p, q) in zip(states, orders, strict=True):
        first, middle, last = (state[n].numpy() for n in "012")
        moved.append(np.concatenate([first[p].ravel(), middle[q][:, p].ravel(), last[:, q].ravel()]))
    return sum(shares[i] * shares[j] * moved[i] @ moved[j] for i in range(3) for j in range(i))


def found(states, steps):
    spec = two_layers()
    start = [spec.identity() for _ in states]
    perms = match_universe(spec, states, WEIGHTS, start, steps=steps, tolerance=0.0)
    return objective(states, [[p.numpy() for p in perm] for perm in perms])


@pytest.mark.parametrize("seed", [2, 4, 9, 15, 18])
def test_many_steps_reach_the_best_of_all_orders_where_a_few_do_not(seed):
    states, every = models(seed), list(product(map(list, permutations(range(3))), repeat=2))
    best = max(objective(states, [every[0], one, other]) for one in every for other in every)
    assert found(states, 50) == pytest.approx(best)
    assert found(states, 3) < best - 0.05  # nor one or two


@pytest.mark.parametrize("sigma", [1.0, 0.25])
@pytest.mark.parametrize("class_aware", [True, False])
def test_precisions_are_counts_of_examples_and_of_classes_over_sigma(monkeypatch, sigma, class_aware):
    seen = []
    plain = layerwise.match_bayes
    monkeypatch.setattr(layerwise, "match_bayes", lambda f, p, **k: seen.append(p) or plain(f, p, **k))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = [torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)) for _ in range(3)]
    weights, counts = [4.0, 10.0, 6.0], np.array([[4, 0, 0], [1, 3, 6], [1, 5, 0]])
    statistics = [{"class_counts": {"class_counts": torch.from_numpy(c)}} for c in counts] if class_aware else None
    options = {"sigma": sigma, "class_aware": class_aware, "example": torch.zeros(1, 2), "gamma": 1e-3}
    fedmerge.merge(nets, "pfnm", weights=weights, statistics=statistics, **options)
    # Two inputs and a bias by the client's examples, over the mean client's; then three classes by who has seen them.
    own = np.array(weights) / np.mean(weights)
    classes = counts / counts.sum(0) if class_aware else np.zeros((3, 0))
    want = np.concatenate([np.repeat(own[:, None], 3, 1), classes], 1) / sigma
    ((got),) = seen
    np.testing.assert_allclose(np.stack(got), np.maximum(want, 1e-9), rtol=1e-6)
