"""WEMoE: gates that mix task vectors, against NumPy and its laws."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption, UnknownName


def net(seed, bias=True):
    """A layer whose outputs are logits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2, bias=bias))


def inputs(seed=9, count=6):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def entropy_slopes(z, changes):
    """d entropy / d r_i, mean over examples, of logits z + sum_i r_i changes_i: in NumPy."""
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    entropy = -(p * np.log(p)).sum(1, keepdims=True)
    by_logit = -p * (np.log(p) + entropy)
    return np.array([(by_logit * change).sum(1).mean() for change in changes])


def test_steps_on_entropy_are_those_of_numpy():
    base, first, second, x = net(0, False), net(1, False), net(2, False), inputs()
    merged = fedmerge.merge(
        [first, second], "wemoe", base=base, weights=[1, 3], data=x, depth=0, steps=2, learning_rate=0.1
    )
    w0, w1, w2 = (one[0].weight.detach().double().numpy() for one in (base, first, second))
    data = x.double().numpy()
    changes, r = [data @ (w - w0).T for w in (w1, w2)], np.array([0.25, 0.75])
    m, v = np.zeros(2), np.zeros(2)
    for step in (1, 2):  # Adam
        g = entropy_slopes(data @ w0.T + r[0] * changes[0] + r[1] * changes[1], changes)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        r = r - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(merged.routing.gates["0"].layers[0][1].numpy(force=True), r, rtol=1e-4)
    want = data @ (w0 + r[0] * (w1 - w0) + r[1] * (w2 - w0)).T
    np.testing.assert_allclose(merged(x).numpy(force=True), want, rtol=1e-4, atol=1e-5)
    # As printed once: they move when a constant of the formula does.
    np.testing.assert_allclose(r, GOLDEN, rtol=1e-5)


GOLDEN = [0.07024245402506783, 0.5728205918575039]


def test_before_any_step_it_is_task_arithmetic():
    models, base, x = [net(1), net(2), net(3)], net(0), inputs()
    for options in ({}, {"scale": 0.3}):
        routed = fedmerge.merge(models, "wemoe", base=base, weights=[1, 2, 3], data=x, steps=0, **options)
        plain = {"form": "sum"} if options else {}
        plain_weights = [1, 1, 1] if options else [1, 2, 3]
        shared = fedmerge.merge(models, "task_arithmetic", base=base, weights=plain_weights, **options, **plain)
        torch.testing.assert_close(routed(x), shared(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(routed.model(x), shared(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_training_lowers_entropy_on_the_servers_inputs(depth):
    models, base, x = [net(1), net(2)], net(0), inputs(count=20)

    def entropy(steps):
        merged = fedmerge.merge(models, "wemoe", base=base, data=x, depth=depth, steps=steps)
        p = merged(x).detach().softmax(1)
        return float(-(p * p.log()).sum(1).mean())

    assert entropy(20) < entropy(0) - 0.01


def test_labels_teach_which_expert_serves_which_inputs():
    """Two clients that are right on one half of the space each; the mean is right nowhere in particular."""
    base, models = nn.Sequential(nn.Linear(2, 2, bias=False)), []
    with torch.no_grad():
        base[0].weight.zero_()
        for sign in (4.0, -4.0):
            own = copy.deepcopy(base)
            own[0].weight.copy_(torch.tensor([[0.0, sign], [0.0, -sign]]))
            models.append(own)
    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] * x[:, 1] < 0).long()  # in the right half the first client is right, in the left one the second
    merged = fedmerge.merge(
        models, "wemoe", base=base, data=[(x, y)], objective="loss", depth=1, steps=150, learning_rate=0.05
    )
    assert float((merged(x).argmax(1) == y).float().mean()) > 0.95
    assert float((merged.model(x).argmax(1) == y).float().mean()) < 0.7


def test_layers_are_chosen_by_patterns():
    torch.manual_seed(0)
    base, first, second = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3))
    given = {"base": base, "data": inputs(), "steps": 0}
    assert list(fedmerge.merge([first, second], "wemoe", layers="2", **given).routing.gates) == ["2"]
    assert list(fedmerge.merge([first, second], "wemoe", **given).routing.gates) == ["0", "2"]
    with pytest.raises(UnknownName, match="module in layers"):
        fedmerge.merge([first, second], "wemoe", layers="9*", **given)
    with pytest.raises(InvalidOption, match="learns from labels"):
        fedmerge.merge([first, second], "wemoe", objective="loss", **given)


def test_frozen_layers_are_not_routed():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    base[0].requires_grad_(False)
    models = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        for shift, model in enumerate(models):
            model[2].weight.add_(shift + 1.0)
    merged = fedmerge.merge(models, "wemoe", base=base, data=inputs(), steps=2)
    assert list(merged.routing.gates) == ["2"]
    assert torch.equal(merged.model[0].weight, base[0].weight)


def test_clients_in_another_order_mix_alike():
    models, base, x = [net(1), net(2), net(3)], net(0), inputs()
    one = fedmerge.merge(models, "wemoe", base=base, data=x, weights=[1, 2, 3], steps=3)
    two = fedmerge.merge(models[::-1], "wemoe", base=base, data=x, weights=[3, 2, 1], steps=3)
    torch.testing.assert_close(one(x), two(x), rtol=1e-4, atol=1e-5)


def test_data_that_can_be_read_once_are_enough_and_a_part_may_be_left_out():
    torch.manual_seed(0)
    base, first, second = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3))
    x = inputs(count=12)
    once = fedmerge.merge([first, second], "wemoe", base=base, data=iter(x.split(6)), steps=3)
    often = fedmerge.merge([first, second], "wemoe", base=base, data=list(x.split(6)), steps=3)
    assert torch.equal(once(x), often(x))
    part = fedmerge.merge([first, second], "wemoe", base=base, data=[x], steps=3, leave_out=["2"])
    assert list(part.routing.gates) == ["0"]
    assert torch.equal(part.model[2].weight, first[2].weight)
