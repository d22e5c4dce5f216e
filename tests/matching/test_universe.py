"""Many models matched at once, against all orders that there are; and what PFNM takes a client's neurons to weigh."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch

import fedmerge
from fedmerge.aggregators import layerwise
from fedmerge.matching.fairness import shares_of
from fedmerge.matching.growing import class_weighted, filled, membership
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


def test_a_neuron_that_a_client_lacks_is_there_the_weighted_mean_of_those_who_have_it():
    weights, places = [0.5, 0.3, 0.2], [[0, 1], [1], [0]]
    specs, states = [], []
    for number, place in enumerate(places):
        neurons = torch.arange(len(place))[:, None]
        specs.append(PermutationSpec((Group("0", len(place), (Site("0", 0, neurons), Site("1", 1, neurons, "in"))),)))
        generator = torch.Generator().manual_seed(number)
        shapes = {"0": (len(place), 3), "1": (2, len(place))}
        states.append({n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()})
    a, b, c = (state["0"].numpy() for state in states)
    plans = [{0: membership(torch.tensor(place), 2)} for place in places]
    one, two, three = (state["0"].numpy() for state in filled(specs, states, weights, plans))
    np.testing.assert_allclose(one, a)
    np.testing.assert_allclose(two, [(0.5 * a[0] + 0.2 * c[0]) / 0.7, b[0]])
    np.testing.assert_allclose(three, [c[0], (0.5 * a[1] + 0.3 * b[0]) / 0.8])


def test_a_plain_mean_of_scaled_rows_weighs_each_class_by_who_has_seen_it():
    counts, weights = np.array([[4, 0, 0], [1, 3, 0], [5, 9, 0]]), np.array([0.5, 0.3, 0.2])
    states = [{"out": torch.randn(3, 2, generator=torch.Generator().manual_seed(i)).double()} for i in range(3)]
    rows = np.stack([state["out"].numpy().copy() for state in states])
    class_weighted(states, ["out"], weights.tolist(), torch.from_numpy(counts))
    shares = np.stack([counts[:, 0] / 10, counts[:, 1] / 12, weights], 1)  # nobody has seen the last class
    merged = sum(w * state["out"].numpy() for w, state in zip(weights, states, strict=True))
    np.testing.assert_allclose(merged, (shares[:, :, None] * rows).sum(0))
