"""Matching by weights and activations together: beside NumPy, at both ends of the balance, and its laws."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption
from fedmerge.matching.activation_costs import Heard, match_activations
from fedmerge.matching.dual_space import DualSpace, match_dual
from fedmerge.matching.features import WeightSimilarity
from fedmerge.permutations import trace
from tests.permutations.zoo_of_models import MODELS, calibrate, difference, free_perms, permuted


def _mlp(seed, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def _spaces(balance, a, b, x, perms=None):
    spec = trace(a, x[:2])
    states = [dict(m.state_dict()) for m in (a, b)]
    heard = Heard.of(spec, [a, b], [(0, 1)], [x])
    start = spec.identity() if perms is None else perms
    return spec, states, heard, DualSpace(WeightSimilarity(spec, *states, start), heard, (0, 1), balance)


def _numpy_similarity(a, b, x, balance, second):
    """Of the first layer's neurons, where those of the second stand in the order `second`."""
    a, b = ({n: t.numpy() for n, t in m.state_dict().items()} for m in (a, b))
    features = [
        np.concatenate([a["0.weight"], a["0.bias"][:, None], a["2.weight"].T], 1),
        np.concatenate([b["0.weight"], b["0.bias"][:, None], b["2.weight"][second].T], 1),
    ]
    said = [np.tanh(x.numpy() @ s["0.weight"].T + s["0.bias"]).T for s in (a, b)]
    width = len(said[0])
    by_weights, by_activations = (np.corrcoef(*both)[:width, width:] for both in (features, said))
    return balance * by_weights + (1 - balance) * by_activations


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_similarities_are_those_of_numpy(balance):
    a, b, x = _mlp(0), _mlp(1), torch.randn(40, 3, dtype=torch.float64)
    second = [4, 1, 0, 2, 3]
    _, _, _, space = _spaces(balance, a, b, x, [torch.arange(6), torch.tensor(second)])
    found, kinds = space.similarities(0)
    assert not kinds
    np.testing.assert_allclose(found, _numpy_similarity(a, b, x, balance, second), atol=1e-5)  # activations: float32


@pytest.mark.parametrize("balance", [0.2, 0.8])
def test_the_match_is_a_fixed_point_of_assignment_and_not_below_the_identity(balance):
    a, b, x = _mlp(2), _mlp(3), torch.randn(40, 3, dtype=torch.float64)
    spec, states, heard, space = _spaces(balance, a, b, x)
    perms, value = match_dual(spec, states, heard, (0, 1), balance=balance, sweeps=30)
    assert value > space.objective() + 1e-3
    similarity = _numpy_similarity(a, b, x, balance, perms[1].numpy())
    best = similarity[linear_sum_assignment(-similarity)].sum()
    assert similarity[np.arange(6), perms[0].numpy()].sum() == pytest.approx(best, abs=1e-5)


def test_without_a_share_of_weights_it_is_activation_matching():
    a, b, x = _mlp(4), _mlp(5), torch.randn(60, 3, dtype=torch.float64)
    spec, states, heard, _ = _spaces(0.0, a, b, x)
    perms, _ = match_dual(spec, states, heard, (0, 1), balance=0.0, sweeps=10)
    expected = match_activations(spec, [a, b], states, [x], 0)[1]
    assert all(torch.equal(p, q) for p, q in zip(perms, expected, strict=True))


def test_with_weights_alone_what_neurons_say_does_not_matter():
    a, b = _mlp(6), _mlp(7)
    merged = [
        fedmerge.merge([a, b], "mudsc", data=[scale * torch.randn(30, 3).double()], balance=1.0) for scale in (1.0, 9.0)
    ]
    torch.testing.assert_close(*(m.state_dict() for m in merged), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "lenet", "encoder"])
@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_planted_orders_are_found(name, balance):
    model, batch = MODELS[name].make(1)
    generator = torch.Generator().manual_seed(5)
    x = batch if name == "encoder" else torch.randn((48, *batch.shape[1:]), generator=generator)
    calibrate(model, x)
    spec = trace(model, batch)
    other = permuted(model, spec, free_perms(spec, 10))
    merged = fedmerge.merge([model, other], "mudsc", data=[x], balance=balance)
    assert difference(model, merged, batch) < 1e-4


def test_equal_models_stay_in_their_order():
    a, x = _mlp(8), torch.randn(40, 3, dtype=torch.float64)
    spec, states, heard, _ = _spaces(0.5, a, a, x)
    perms, value = match_dual(spec, states, heard, (0, 1), balance=0.5, sweeps=5)
    assert all(torch.equal(p, q) for p, q in zip(perms, spec.identity(), strict=True))
    assert value == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("options", [{"balance": 1.5}, {"balance": -0.1}, {"sweeps": 0}, {"examples": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        fedmerge.merge([_mlp(0), _mlp(1)], "mudsc", data=[torch.randn(4, 3)], **options)


def test_without_data_it_is_refused():
    with pytest.raises(InvalidOption, match="data"):
        fedmerge.merge([_mlp(0), _mlp(1)], "mudsc", example=torch.randn(4, 3))
