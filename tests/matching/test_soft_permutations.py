"""Permutations learnt softly: Sinkhorn's matrices beside NumPy, the loss's gradient, and the laws of what is kept."""

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption
from fedmerge.matching.soft_permutations import learn_permutations, sinkhorn
from fedmerge.permutations import trace
from tests.permutations.zoo_of_models import MODELS, difference, free_perms, permuted

OPTIONS = {"steps": 40, "learning_rate": 0.1, "temperature": 1.0, "iterations": 20}


def _mlp(seed, hidden=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def _both(first, second):
    a, b = (dict(_mlp(seed).state_dict()) for seed in (first, second))
    return trace(_mlp(0), torch.zeros(2, 3, dtype=torch.float64)), a, b


@pytest.mark.parametrize(("temperature", "iterations"), [(1.0, 3), (0.5, 20)])
def test_sinkhorn_as_numpy_has_it(temperature, iterations):
    scores = np.random.default_rng(0).normal(size=(5, 5))
    expected = np.exp(scores / temperature)
    for _ in range(iterations):
        expected /= expected.sum(1, keepdims=True)
        expected /= expected.sum(0, keepdims=True)
    np.testing.assert_allclose(sinkhorn(torch.from_numpy(scores), temperature, iterations), expected, rtol=1e-12)


def test_rows_and_columns_sum_to_one_and_little_temperature_makes_them_hard():
    scores = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    soft = sinkhorn(scores, 1.0, 200)
    torch.testing.assert_close(soft.sum(0), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(soft.sum(1), torch.ones(6, dtype=torch.float64))
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    scores[torch.arange(6), order] += 5
    assert float(soft.max()) < 0.9
    torch.testing.assert_close(sinkhorn(scores, 0.05, 50), torch.eye(6, dtype=torch.float64)[order])


def test_a_golden_number():
    # Row-scaled [[.75, .25], [.25, .75]] has columns that sum to one already.
    found = sinkhorn(torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log(), 1.0, 1)
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))


def _numpy_loss(a, b, perms):
    """Relative squared distance over tensors with neurons: all but the last bias."""
    p, q = (perm.numpy() for perm in perms)
    a, b = ({n: t.numpy() for n, t in s.items()} for s in (a, b))
    moved = {
        "0.weight": b["0.weight"][p],
        "0.bias": b["0.bias"][p],
        "2.weight": b["2.weight"][q][:, p],
        "2.bias": b["2.bias"][q],
        "4.weight": b["4.weight"][:, q],
    }
    return sum(np.square(a[n] - t).sum() for n, t in moved.items()) / sum(np.square(a[n]).sum() for n in moved)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_loss_is_that_of_numpy_and_below_the_identitys(seed):
    spec, a, b = _both(seed, seed + 1)
    perms, loss = learn_permutations(spec, a, b, **OPTIONS)
    assert loss == pytest.approx(_numpy_loss(a, b, perms), rel=1e-9)
    assert loss < 0.95 * _numpy_loss(a, b, spec.identity())


def test_where_no_step_finds_better_the_identity_stays():
    spec, a, _ = _both(5, 6)
    noise = {n: 1e-3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(2)) for n, t in a.items()}
    near = {n: t + noise[n] for n, t in a.items()}
    for b in (a, near):
        perms, loss = learn_permutations(spec, a, b, **OPTIONS)
        assert all(torch.equal(p, q) for p, q in zip(perms, spec.identity(), strict=True))
        assert loss < 1e-4
    assert learn_permutations(spec, a, near, **OPTIONS)[1] > 0


@pytest.mark.parametrize("name", ["mlp", "lenet", "encoder", "resnet20_group_norm"])
def test_planted_orders_are_found_without_data(name):
    model, batch = MODELS[name].make(1)
    spec = trace(model, batch)
    other = permuted(model, spec, free_perms(spec, 10))
    merged = fedmerge.merge([model, other], "sinkhorn_rebasin", example=batch)
    assert difference(model, merged, batch) < 1e-4


def test_the_merge_is_of_hard_permutations():
    models, x = [_mlp(seed) for seed in (7, 8, 9)], torch.randn(4, 3).double()
    merged = fedmerge.merge(models, "sinkhorn_rebasin", example=x, combine="median").state_dict()
    entries = torch.cat([m.state_dict()["0.bias"] for m in models])
    assert all(bool((entries == value).any()) for value in merged["0.bias"])


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"learning_rate": 0.0}, {"temperature": 0.0}, {"iterations": 0}, {"steps": 2.5}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        fedmerge.merge([_mlp(0), _mlp(1)], "sinkhorn_rebasin", example=torch.randn(4, 3).double(), **options)
