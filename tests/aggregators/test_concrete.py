"""Concrete subspace learning: a mask learnt by gradient, against NumPy and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.aggregators.concrete import Concrete, masked
from fedmerge.searching.search import Judged, Problem, Span


def net(seed):
    """A layer whose outputs are logits."""
    torch.manual_seed(seed)
    return nn.Linear(3, 2, bias=False)


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(9))
Y = torch.arange(8) % 2


def test_a_step_is_that_of_numpy():
    search = Concrete(evaluations=1, learning_rate=0.2, temperature=0.5).search(
        Problem(
            torch.ones(1), 3, span=Span({"w": torch.ones(3)}, ({"w": torch.tensor([1.0, -2.0, 3.0])},), torch.ones(1))
        )
    )
    trial, tau = next(search), np.array([1.0, -2.0, 3.0])
    draw = fedmerge.seeding.torch_generator(3, "mask")
    u = torch.rand(3, generator=draw, dtype=torch.float64).numpy()
    m = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u)) / 0.5))
    np.testing.assert_allclose(trial.state["w"].numpy(), 1 + m / m.mean() * tau, rtol=1e-9)
    slope = np.array([0.3, 0.1, -0.4])
    with pytest.raises(StopIteration) as ended:
        search.send(Judged(torch.zeros(1), gradient={"w": torch.from_numpy(slope)}))
    by_mask = slope * tau / m.mean() - (slope * tau * m).sum() / (3 * m.mean() ** 2)
    x = -0.2 * np.sign(by_mask * m * (1 - m) / 0.5)  # the first step of Adam
    median = 1 / (1 + np.exp(-x / 0.5))
    want = 1 + median / median.mean() * tau
    np.testing.assert_allclose(ended.value.value["w"].numpy(), want, rtol=1e-5)
    np.testing.assert_allclose(want, GOLDEN, rtol=1e-5)


GOLDEN = [1.8591496594965096, -0.7182993189930191, 4.845102043020942]


def test_a_mask_that_is_the_same_everywhere_leaves_the_merge_as_it_is():
    base, change = {"w": torch.randn(5)}, {"w": torch.randn(5)}
    for logit in (-3.0, 0.0, 40.0):
        found = masked(base, change, {"w": torch.full((5,), logit)})["w"]
        torch.testing.assert_close(found.float(), base["w"] + change["w"])
    models = [net(1), net(2)]
    merged = fedmerge.merge(models, "concrete", base=net(0), weights=[1, 3], evaluations=0)
    torch.testing.assert_close(merged(X), fedmerge.merge(models, "fedavg", weights=[1, 3])(X), rtol=1e-5, atol=1e-6)
    half = fedmerge.merge(models, "concrete", base=net(0), scale=0.5, evaluations=0)
    torch.testing.assert_close(half(X), fedmerge.merge(models, "fedavg")(X), rtol=1e-5, atol=1e-6)


def loss(model):
    return float(nn.functional.cross_entropy(model(X), Y).detach())


def test_training_lowers_the_loss_on_the_server_and_through_clients():
    models, base = [net(1), net(2)], net(0)
    start = loss(fedmerge.merge(models, "concrete", base=base, evaluations=0))
    server = fedmerge.merge(models, "concrete", base=base, data=[(X, Y)], evaluations=30)
    assert loss(server) < start - 0.02
    halves = [[(X[:4], Y[:4])], [(X[4:], Y[4:])]]
    clients = fedmerge.merge(models, "concrete", base=base, clients=halves, evaluations=30)
    torch.testing.assert_close(clients(X), server(X), rtol=1e-3, atol=1e-4)


def test_entropy_needs_no_labels():
    def entropy(evaluations):
        p = (
            fedmerge.merge([net(1), net(2)], "concrete", base=net(0), data=X, evaluations=evaluations)(X)
            .detach()
            .softmax(1)
        )
        return float(-(p * p.log()).sum(1).mean())

    assert entropy(30) < entropy(0) - 0.01


def test_frozen_parameters_stay_and_order_does_not_matter():
    def two(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        model[0].requires_grad_(False)
        model[2].weight.data += torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        return model

    models, base = [two(1), two(2), two(3)], two(0)
    given = {"base": base, "data": [(X, Y)], "evaluations": 4}
    one, other = fedmerge.merge(models, "concrete", **given), fedmerge.merge(models[::-1], "concrete", **given)
    torch.testing.assert_close(one(X), other(X), rtol=1e-4, atol=1e-5)
    assert torch.equal(one[0].weight, base[0].weight)
    assert not torch.equal(one[2].weight, fedmerge.merge(models, "fedavg")[2].weight)
