"""What is heard of models, and of how many examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.aggregators.cca import CCAMerge
from fedmerge.errors import InvalidOption
from fedmerge.inputs import evenly
from fedmerge.matching.features import units
from fedmerge.matching.listening import consumers, moments
from fedmerge.matching.optimal_transport import distances
from fedmerge.permutations import trace


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("sizes", "most"), [([4, 4, 4], 6), ([1] * 20, 7), ([5, 2, 9], 100), ([8], 3)])
def test_examples_come_evenly_from_all_batches(sizes, most):
    batches = list(torch.arange(sum(sizes)).split(sizes))
    found = torch.cat(list(evenly(batches, len(batches), most)))
    assert len(found) <= most
    assert len(found.unique()) == len(found)
    if most >= sum(sizes) * len(sizes):
        assert len(found) == sum(sizes)
    assert found.double().mean() == pytest.approx((sum(sizes) - 1) / 2, abs=0.15 * sum(sizes))


def test_of_batches_without_number_the_first_are_taken():
    assert torch.cat(list(evenly(iter(torch.arange(12).split(4)), None, 6))).tolist() == [0, 1, 2, 3, 4, 6]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    )


def test_moments_are_those_of_what_layers_take_in():
    """Whatever the batches, and in whichever order channels lie in memory."""
    models, x = [network(0), network(1)], normal(30, 1, 12, 12)
    spec = trace(models[0], x[:2])
    sites = [[consumers(unit.sites) for unit in units(spec)]] * 2
    with torch.no_grad():
        wanted = [(m[:3](x).movedim(1, -1).reshape(-1, 4), m[:5](x).movedim(1, -1).reshape(-1, 6)) for m in models]
    for batches in ([x], list(x.split(7))):
        heard = moments(sites, models, [(0, 1), (1, 1)], batches)
        for group, (one, other) in enumerate(zip(*wanted, strict=True)):
            both = torch.cov(torch.cat([one, other], 1).T.double(), correction=0)
            n = one.shape[1]
            torch.testing.assert_close(heard[group, 0, 1].covariance(), both[:n, n:], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(heard[group, 1, 1].covariance(), both[n:, n:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["rebasin(ground=activations)", "otfusion(ground=activations)", "zipit", "cca"])
def test_no_more_examples_are_listened_to(method):
    """What lies between the chosen ones may be anything."""
    models, x = [network(0), network(1)], normal(40, 1, 12, 12)
    other = x.clone()
    other[1::2] = 1e3
    merged = [fedmerge.merge(models, method, data=[d], example=x[:2], examples=20).state_dict() for d in (x, other)]
    every = fedmerge.merge(models, method, data=[other], example=x[:2], examples=40).state_dict()
    assert all(torch.equal(merged[0][n], t) for n, t in merged[1].items())
    assert any(not torch.equal(merged[0][n], t) for n, t in every.items())
    with pytest.raises(InvalidOption, match="examples"):
        fedmerge.merge(models, method, data=[x], example=x[:2], examples=0)


def test_cca_by_cholesky_is_cca_by_roots():
    z = normal(500, 6, dtype=torch.float64) @ normal(6, 12, seed=1, dtype=torch.float64)
    joint = torch.cov((z + normal(500, 12, seed=2, dtype=torch.float64)).T)
    sxx, syy, sxy = joint[:6, :6], joint[6:, 6:], joint[:6, 6:]

    def roots(s):
        values, vectors = torch.linalg.eigh(s + 0.1 * s.diagonal().mean() * torch.eye(6, dtype=torch.float64))
        return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T

    (x, x_inverse), (y, y_inverse) = roots(sxx), roots(syy)
    u, _, vt = torch.linalg.svd(x_inverse @ sxy @ y_inverse)
    plan = CCAMerge()._plan(sxx, syy, sxy, torch.arange(6))
    torch.testing.assert_close(plan.produce.T, y_inverse @ vt.T @ u.T @ x)
    torch.testing.assert_close(plan.consume, x_inverse @ u @ vt @ y)


def test_distances_of_many_features():
    a, b = normal(5, 2500), normal(7, 2500, seed=1)
    torch.testing.assert_close(distances(a, b), torch.cdist(a.double(), b.double()))
    assert distances(a, a).diagonal().max() < 1e-5


def test_variances_of_neurons_that_cca_mixes_are_mixed_by_the_squares_of_what_mixes_their_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, other = (
            nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double() for _ in range(2)
        )
        x = torch.randn(200, 9, dtype=torch.float64)
    for model in (one, other):  # as training leaves them
        model[1].running_mean, model[1].running_var = model[0](x).detach().mean(0), model[0](x).detach().var(0)
        model.eval()
    merged = fedmerge.merge([one, other], "cca", weights=[3.0, 1.0], example=x[:2], data=[x], repair="none")
    ours, theirs, both = (torch.cat([m[0].weight, m[0].bias[:, None]], 1).detach() for m in (one, other, merged))
    mixing = (4 * both - 3 * ours) @ torch.linalg.pinv(theirs)  # the heavier of two models stays as it is
    assert (mixing.abs() > 0.01).sum() > 4  # no mere order
    wanted = (3 * one[1].running_var + mixing.square() @ other[1].running_var) / 4
    torch.testing.assert_close(merged[1].running_var, wanted)
    means = (3 * one[1].running_mean + mixing @ other[1].running_mean) / 4
    torch.testing.assert_close(merged[1].running_mean, means)


def test_neurons_cost_as_far_as_what_is_heard_of_them_lies_apart(monkeypatch):
    from fedmerge.aggregators import otfusion

    costs, plain = [], otfusion.coupling
    monkeypatch.setattr(otfusion, "coupling", lambda cost, *rest: costs.append(cost) or plain(cost, *rest))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, other = (nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in range(2))
        x = torch.randn(50, 5)
    fedmerge.merge([one, other], "otfusion", weights=[3.0, 1.0], example=x, data=[x], ground="activations")
    ours, theirs = (model[:2](x).detach().T.double() for model in (one, other))
    wanted = torch.cdist(ours, theirs)  # over all examples, in whatever unit
    (cost,) = costs
    torch.testing.assert_close(cost.double() / cost.max(), wanted / wanted.max(), rtol=1e-4, atol=1e-5)
