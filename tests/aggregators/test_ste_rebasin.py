"""Straight-through re-basin: a step beside NumPy, and the loss half-way that it may not raise."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.aggregators.ste_rebasin import MidpointLoss, StraightThroughRebasin
from fedmerge.errors import InvalidOption
from fedmerge.permutations import trace
from tests.permutations.zoo_of_models import MODELS, calibrate, difference, free_perms, permuted


def _mlp(seed, x=None, y=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimiser = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(40 if x is not None else 0):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model


def _examples(n=60):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(3))
    return x, (x[:, 0] > 0).long() + (x[:, 1] * x[:, 2] > 0).long()


def _midpoint(a, b, order):
    """The mean of `a` and of `b` with its hidden neurons in this order."""
    middle = copy.deepcopy(a)
    with torch.no_grad():
        middle[0].weight.copy_((a[0].weight + b[0].weight[order]) / 2)
        middle[0].bias.copy_((a[0].bias + b[0].bias[order]) / 2)
        middle[2].weight.copy_((a[2].weight + b[2].weight[:, order]) / 2)
        middle[2].bias.copy_((a[2].bias + b[2].bias) / 2)
    return middle


def test_loss_and_gradient_half_way():
    """One linear layer, no neurons: softmax regression in NumPy."""
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        b.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    x, y = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([1, 1])
    logits = x @ np.diag([1.0, 2.0])  # of the mean
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    spec = trace(a, torch.zeros(1, 2))
    batch = torch.from_numpy(x).float(), torch.from_numpy(y)
    loss = MidpointLoss(spec, copy.deepcopy(a), a.state_dict(), b.state_dict(), [batch], None)
    assert loss.of([]) == pytest.approx(-np.log(shares[:, 1]).mean(), rel=1e-5)
    free = {"weight": torch.zeros(2, 2, requires_grad=True)}
    loss.at([], batch, free).backward()
    gradient = (shares - np.eye(2)[y]).T @ x / 2
    np.testing.assert_allclose(free["weight"].grad, gradient / 2, rtol=1e-4, atol=1e-6)  # half of it is w


@pytest.mark.parametrize("seed", [0, 2, 4])
@pytest.mark.parametrize("steps", [0, 30])
def test_the_merge_is_of_a_hard_order_and_its_loss_not_above_that_without_matching(seed, steps):
    x, y = _examples()
    a, b = _mlp(seed, x, y), _mlp(seed + 1, x, y)
    spec = trace(a, x)
    method = StraightThroughRebasin(steps=steps, learning_rate=0.1)
    loss = MidpointLoss(spec, copy.deepcopy(a), a.state_dict(), b.state_dict(), [(x, y)], None)
    (order,) = method._match(loss, dict(a.state_dict()), dict(b.state_dict()), torch.Generator().manual_seed(0))
    merged = fedmerge.merge([a, b], f"ste_rebasin(steps={steps},learning_rate=0.1)", data=[(x, y)])
    assert difference(merged, _midpoint(a, b, order), x) < 1e-6
    with torch.no_grad():
        plain, reached = (float(F.cross_entropy(m(x), y)) for m in (_midpoint(a, b, torch.arange(8)), merged))
    assert loss.of([order]) == pytest.approx(reached, rel=1e-5)
    assert reached <= plain + 1e-6


def test_of_all_orders_that_steps_come_by_the_one_of_least_loss_is_kept(monkeypatch):
    x, y = _examples()
    a, b = _mlp(4, x, y), _mlp(5, x, y)
    judged = []

    def noted(self, perms, of=MidpointLoss.of):
        judged.append((of(self, perms), perms[0].tolist()))
        return judged[-1][0]

    monkeypatch.setattr(MidpointLoss, "of", noted)
    spec = trace(a, x)
    loss = MidpointLoss(spec, copy.deepcopy(a), a.state_dict(), b.state_dict(), [(x, y)], None)
    states = dict(a.state_dict()), dict(b.state_dict())
    (order,) = StraightThroughRebasin(steps=60, learning_rate=1.0)._match(loss, *states, torch.Generator())
    assert judged[0][1] == list(range(8))
    assert len({tuple(perm) for _, perm in judged}) > 3  # the steps lead to new orders
    assert order.tolist() == min(judged)[1]


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_planted_orders_are_found(name):
    model, batch = MODELS[name].make(1)
    x = torch.randn((40, *batch.shape[1:]), generator=torch.Generator().manual_seed(5))
    calibrate(model, x)
    with torch.no_grad():
        labels = model(x).argmax(-1)
    spec = trace(model, batch)
    others = [permuted(model, spec, free_perms(spec, seed)) for seed in (1, 2)]
    merged = fedmerge.merge([model, *others], "ste_rebasin", data=[(x, labels)], steps=2)
    assert difference(model, merged, batch) < 1e-4


def test_equal_models_stay_as_they_are():
    x, y = _examples()
    model = _mlp(0, x, y)
    merged = fedmerge.merge([model, copy.deepcopy(model)], "ste_rebasin", data=[(x, y)], steps=5)
    torch.testing.assert_close(merged.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_without_labels_or_data_it_is_refused():
    x, _ = _examples()
    models = [_mlp(0), _mlp(1)]
    with pytest.raises(InvalidOption, match=r"\(inputs, targets\)"):
        fedmerge.merge(models, "ste_rebasin", data=[x], example=x)
    with pytest.raises(InvalidOption, match="data"):
        fedmerge.merge(models, "ste_rebasin", example=x)


@pytest.mark.parametrize("options", [{"steps": -1}, {"learning_rate": 0.0}, {"momentum": 1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        fedmerge.merge([_mlp(0), _mlp(1)], "ste_rebasin", data=[_examples()], **options)
