"""SMEAR: layers that are soft means of the clients', against NumPy and its laws."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

import fedmerge


def net(seed):
    """A layer whose outputs are logits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2))


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(9))
Y = torch.arange(6) % 2


def test_outputs_are_those_of_the_soft_mean_in_numpy():
    models = [net(1), net(2)]
    merged = fedmerge.merge(models, "smear", base=net(0), data=[(X, Y)], steps=5, learning_rate=0.5, weights=[1, 3])
    (weight, bias), got = merged.routing.gates["0"].layers[0], merged(X).numpy(force=True)
    for row, found in zip(X.double().numpy(), got, strict=True):
        seen = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
        logits = weight.numpy(force=True) @ seen + bias.numpy(force=True)
        pi = np.exp(logits) / np.exp(logits).sum()
        parts = [one[0].weight.numpy(force=True) @ row + one[0].bias.numpy(force=True) for one in models]
        np.testing.assert_allclose(found, pi[0] * parts[0] + pi[1] * parts[1], rtol=1e-4, atol=1e-5)


def test_a_first_step_goes_against_the_loss():
    """Of Adam: each number of the router moves by the rate, against its gradient's sign."""
    models = [net(1), net(2)]
    given = {"base": net(0), "data": [(X, Y)], "learning_rate": 0.1}
    before, after = (fedmerge.merge(models, "smear", steps=steps, **given) for steps in (0, 1))
    data, target = X.double().numpy(), Y.numpy()
    parts = [data @ one[0].weight.numpy(force=True).T + one[0].bias.numpy(force=True) for one in models]
    z = (parts[0] + parts[1]) / 2
    slope = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    slope[np.arange(6), target] -= 1
    by_logit = 0.25 * (slope * (parts[0] - parts[1])).sum(1)  # pi_0 (1 - pi_0) of the first logit
    seen = (data - data.mean(1, keepdims=True)) / np.sqrt(data.var(1, keepdims=True) + 1e-5)
    (w0, b0), (w1, b1) = (one.routing.gates["0"].layers[0] for one in (before, after))
    np.testing.assert_allclose((w1 - w0)[0].numpy(force=True), -0.1 * np.sign(by_logit @ seen), rtol=1e-3)
    np.testing.assert_allclose(
        (b1 - b0).numpy(force=True), -0.1 * np.sign(by_logit.sum()) * np.array([1, -1]), rtol=1e-3
    )


def test_before_any_step_it_is_fedavg():
    models = [net(1), net(2), net(3)]
    merged = fedmerge.merge(models, "smear", base=net(0), data=X, weights=[1, 2, 3], steps=0)
    want = fedmerge.merge(models, "fedavg", weights=[1, 2, 3])
    torch.testing.assert_close(merged(X), want(X), rtol=1e-5, atol=1e-6)


def test_copies_of_a_model_route_to_that_model_and_one_client_to_its_own():
    for count in (3, 1):
        merged = fedmerge.merge([net(1)] * count, "smear", base=net(0), data=[(X, Y)], steps=4, learning_rate=0.5)
        torch.testing.assert_close(merged(X), net(1)(X), rtol=1e-5, atol=1e-5)


def test_labels_teach_which_client_serves_which_inputs():
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    models = [copy.deepcopy(base), copy.deepcopy(base)]
    for model, sign in zip(models, (4.0, -4.0), strict=True):
        model[0].weight.data = torch.tensor([[0.0, sign], [0.0, -sign]])
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    y = torch.where(x[:, 0] > x[:, 1], x[:, 1] < 0, x[:, 1] > 0).long()
    merged = fedmerge.merge(models, "smear", base=base, data=[(x, y)], steps=80, learning_rate=0.2)
    assert float((merged(x).argmax(1) == y).float().mean()) > 0.95


def test_order_of_clients_and_frozen_layers():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    base[0].requires_grad_(False)
    models = [copy.deepcopy(base) for _ in range(3)]
    for shift, model in enumerate(models):
        model[2].weight.data += torch.randn(2, 3, generator=torch.Generator().manual_seed(shift))
    given = {"base": base, "data": [(X, Y)], "steps": 3}
    one, two = fedmerge.merge(models, "smear", **given), fedmerge.merge(models[::-1], "smear", **given)
    torch.testing.assert_close(one(X), two(X), rtol=1e-4, atol=1e-5)
    assert list(one.routing.gates) == ["2"]
    assert torch.equal(one.model[0].weight, base[0].weight)
