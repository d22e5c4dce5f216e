"""Twin-Merging: a shared model and what clients have of their own, against NumPy and its laws."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption


def net(seed):
    """Two layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


X = torch.randn(9, 4, generator=torch.Generator().manual_seed(9))
Y = torch.arange(9) % 3


def test_own_models_keep_the_strongest_directions_as_numpy_does():
    base, models = net(0), [net(1), net(2)]
    found = fedmerge.personal_models(models, "twin_merging", base=base, kept=0.5, weights=[1, 3])
    mean = 0.25 * models[0][0].weight.numpy(force=True) + 0.75 * models[1][0].weight.numpy(force=True)
    for model, own in zip(models, found, strict=True):
        u, s, v = np.linalg.svd(model[0].weight.numpy(force=True) - mean, full_matrices=False)
        want = mean + (u[:, :2] * s[:2]) @ v[:2]  # half of four
        np.testing.assert_allclose(own[0].weight.numpy(force=True), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own[0].bias, model[0].bias)  # vectors stay whole


def test_all_directions_give_clients_back_and_none_the_shared_model():
    base, models = net(0), [net(1), net(2)]
    for own, model in zip(fedmerge.personal_models(models, "twin_merging", base=base, kept=1.0), models, strict=True):
        torch.testing.assert_close(own(X), model(X), rtol=1e-4, atol=1e-5)
    mean = fedmerge.merge(models, "fedavg")
    for own in fedmerge.personal_models(models, "twin_merging", base=base, kept=0.0):
        torch.testing.assert_close(own(X), mean(X), rtol=1e-4, atol=1e-5)


def test_without_labels_the_shared_model_is_what_is_merged():
    base, models = net(0), [net(1), net(2)]
    merged = fedmerge.merge(models, "twin_merging", base=base, kept=1.0)
    torch.testing.assert_close(merged(X), fedmerge.merge(models, "fedavg")(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.of_client(1)(X), models[1](X), rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidOption, match="learns from labels"):
        fedmerge.merge(models, "twin_merging", base=base, by="inputs")


def test_two_factors_are_smaller_than_what_they_stand_for():
    base, models = net(0), [net(1), net(2)]
    small, whole = (fedmerge.merge(models, "twin_merging", base=base, kept=kept).routing for kept in (0.1, 1.0))
    assert small.bytes == 2 * 4 * ((6 + 4) + 6 + (3 + 6) + 3)
    assert whole.bytes == 2 * 4 * (24 + 6 + 18 + 3)


def opposed():
    """Two clients that are right in one half of the space each."""
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    models = [copy.deepcopy(base), copy.deepcopy(base)]
    for model, sign in zip(models, (4.0, -4.0), strict=True):
        model[0].weight.data = torch.tensor([[0.0, sign], [0.0, -sign]])
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    return base, models, x, torch.where(x[:, 0] > 0, x[:, 1] < 0, x[:, 1] > 0).long()


def test_the_router_learns_whose_inputs_are():
    base, models, x, y = opposed()
    merged = fedmerge.merge(models, "twin_merging", base=base, data=[(x, y)], kept=1.0, learning_rate=0.05)
    assert float((merged(x).argmax(1) == y).float().mean()) > 0.95
    assert float((merged.chosen(x).argmax(1) == (x[:, 0] <= 0)).float().mean()) > 0.95


def test_the_routers_first_step_goes_against_its_cross_entropy():
    base, models, x, y = opposed()
    given = {"base": base, "data": [(x, y)], "kept": 1.0, "hidden": 0, "learning_rate": 0.1}
    before, after = (fedmerge.merge(models, "twin_merging", steps=steps, **given) for steps in (0, 1))
    slope = 0.5 - (x[:, 0] > 0).double().numpy()  # of the first logit, weights being even
    (w0, b0), (w1, b1) = (one.routing.gates[""].layers[0] for one in (before, after))
    want = -0.1 * np.sign(slope @ x.double().numpy())
    np.testing.assert_allclose((w1 - w0)[0].numpy(force=True), want, rtol=1e-3)
    np.testing.assert_allclose((b1 - b0)[0].numpy(force=True), -0.1 * np.sign(slope.sum()), rtol=1e-3)


def test_copies_of_a_model_route_to_it_and_one_client_to_its_own():
    for count in (3, 1):
        merged = fedmerge.merge([net(1)] * count, "twin_merging", base=net(0), data=[(X, Y)], steps=3)
        torch.testing.assert_close(merged(X), net(1)(X), rtol=1e-4, atol=1e-5)


def test_order_of_clients_and_frozen_layers():
    base = net(0)
    base[0].requires_grad_(False)
    models = [copy.deepcopy(base) for _ in range(3)]
    for shift, model in enumerate(models):
        model[2].weight.data += torch.randn(3, 6, generator=torch.Generator().manual_seed(shift))
    given = {"base": base, "data": [(X, Y)], "steps": 3}
    one, two = fedmerge.merge(models, "twin_merging", **given), fedmerge.merge(models[::-1], "twin_merging", **given)
    torch.testing.assert_close(one(X), two(X), rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("0.") for name in one.routing.experts[0])
