"""Fisher-nodes merging against a few lines of NumPy, and its scores against masks that are differentiated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import ClientUpdate, MergeContext
from fedmerge.aggregators.fisher_nodes import FisherNodes, node_scores
from tests.random_statistics import random_kfac

WEIGHTS = np.array([1.0, 2.0, 5.0]) / 8


def clients(shapes):
    states = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        states.append({n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()})
    return states, [random_kfac(state, seed) for seed, state in enumerate(states)]


def merged(states, factors, **options):
    sent = [
        ClientUpdate(i, s, 8 * WEIGHTS[i], {"fisher_kfac": f})
        for i, (s, f) in enumerate(zip(states, factors, strict=True))
    ]
    found, memory = FisherNodes(**options).merge(sent, MergeContext(), {})
    assert memory == {}
    return {name: tensor.numpy() for name, tensor in found.items()}


@pytest.mark.parametrize("universal", [True, False])
def test_it_by_hand(universal):
    states, factors = clients({"a.weight": (3, 2), "a.bias": (3,), "c.weight": (4, 2, 3, 3), "norm.scale": (5,)})
    found = merged(states, factors, universal=universal)
    scores, means = {}, np.zeros(3)
    for layer in ("a", "c"):
        w = np.stack([s[f"{layer}.weight"].numpy().reshape(len(s[f"{layer}.weight"]), -1) for s in states])
        if layer == "a":
            w = np.concatenate([w, np.stack([s["a.bias"].numpy() for s in states])[..., None]], 2)
        a, g = (np.stack([f[f"{layer}.weight.{side}"].double().numpy() for f in factors]) for side in "AG")
        scores[layer] = np.einsum("kjd,kde,kje->kj", w, a, w) * np.einsum("kjj->kj", g)
        share = WEIGHTS[:, None] * scores[layer] / (WEIGHTS @ scores[layer])
        want = (share[..., None] * w).sum(0)
        np.testing.assert_allclose(
            found[f"{layer}.weight"].reshape(len(want), -1), want[:, : 2 if layer == "a" else 18]
        )
        if layer == "a":
            np.testing.assert_allclose(found["a.bias"], want[:, 2])
    means = (scores["a"].sum(1) + scores["c"].sum(1)) / 7
    shares = WEIGHTS * means / (WEIGHTS @ means) if universal else WEIGHTS
    np.testing.assert_allclose(found["norm.scale"], shares @ np.stack([s["norm.scale"].numpy() for s in states]))


def test_rows_of_no_information_are_averaged():
    states, factors = clients({"a.weight": (3, 2)})
    for each in factors:
        each["a.weight.G"][1] = each["a.weight.G"][:, 1] = 0.0
    mean = WEIGHTS @ np.stack([s["a.weight"].numpy()[1] for s in states])
    np.testing.assert_allclose(merged(states, factors)["a.weight"][1], mean)
    nothing = [{n: torch.zeros_like(t) for n, t in each.items()} for each in factors]
    found = merged(states, nothing)["a.weight"]
    np.testing.assert_allclose(found, np.tensordot(WEIGHTS, np.stack([s["a.weight"].numpy() for s in states]), 1))


def test_equal_scores_give_the_mean_and_one_common_factor_changes_nothing():
    states, factors = clients({"a.weight": (3, 2), "scale": (2,)})
    w = [s["a.weight"] for s in states]
    equal = [{"a.weight.A": torch.eye(2), "a.weight.G": torch.diag(1 / (own**2).sum(1))} for own in w]
    found = merged(states, equal)
    for name in states[0]:
        mean = np.tensordot(WEIGHTS, np.stack([s[name].numpy() for s in states]), 1)
        np.testing.assert_allclose(found[name], mean, rtol=1e-6)
    louder = [{n: 7.0 * t if n.endswith("G") else t for n, t in each.items()} for each in factors]
    for name, tensor in merged(states, factors).items():
        np.testing.assert_allclose(merged(states, louder)[name], tensor, rtol=1e-6)


def test_with_one_example_a_score_is_the_squared_derivative_by_a_mask():
    """Of a single example, inputs and gradients are independent, so that the factors tell all."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, x = nn.Linear(4, 3).double(), torch.randn(1, 4, dtype=torch.float64)
    mask = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (mask * layer(x)).tanh().square().sum().backward()
    outputs = layer(x).detach().requires_grad_()
    outputs.tanh().square().sum().backward()
    a, g = torch.cat([x, torch.ones(1, 1)], 1), outputs.grad
    matrix = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()[None]
    torch.testing.assert_close(node_scores(matrix, a.T @ a, g.T @ g)[0], mask.grad.square())


def test_models_with_grouped_convolutions_are_measured_and_merged():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 2)) for _ in range(2)]
        loaders = [[(torch.randn(8, 2, 4, 4), torch.arange(8) % 2)] for _ in models]
    found = fedmerge.merge(models, "fisher_nodes", clients=loaders, weights=[1, 3])
    for name, tensor in found.named_parameters():
        one, other = (dict(m.named_parameters())[name] for m in models)
        low, high = torch.minimum(one, other) - 1e-6, torch.maximum(one, other) + 1e-6
        assert bool(((low <= tensor) & (tensor <= high)).all())
        assert not torch.allclose(tensor, 0.25 * one + 0.75 * other)
