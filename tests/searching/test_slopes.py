"""Slopes of an objective along directions: against finite differences, and as sums over clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedmerge.errors import InvalidOption
from fedmerge.questions import Question, pooled, respond
from fedmerge.statistics import EntropySlopes, LossSlopes

STEP = 1e-5


def net():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return made.double()


def batch(seed, n=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def vectors(module, count=3):
    generator = torch.Generator().manual_seed(1)
    state = module.state_dict()
    return [
        {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in state.items()}
        for _ in range(count)
    ]


def numpy_objective(kind, state, x, y):
    """Mean cross-entropy or mean entropy of the net above, without torch."""
    w = {name: tensor.numpy() for name, tensor in state.items()}
    z = np.tanh(x.numpy() @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    if kind is LossSlopes:
        return -log_p[np.arange(len(z)), y.numpy()].mean()
    return -(np.exp(log_p) * log_p).sum(1).mean()


@pytest.mark.parametrize("kind", [LossSlopes, EntropySlopes])
def test_slopes_by_coefficients_are_finite_differences_of_the_objective_over_all_clients(kind):
    """What AdaMerging descends: theta_0 + sum_i lambda_i tau_i, its gradient a sum over clients of unequal size."""
    module, sizes = net(), (20, 7, 40)
    directions, data = vectors(module), [batch(i, n) for i, n in enumerate(sizes)]
    coefficients = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def at(point):
        return Question(module.state_dict(), tuple(directions), (tuple(point.tolist()),)).point(0)

    question = Question(at(coefficients), tuple(directions), needs=(kind(),), holdout=0)
    answers = [(i, [respond(question, module, [pair])]) for i, pair in enumerate(data)]
    found = pooled([question], answers)[0]
    assert found.examples == sum(sizes)

    def whole(point):
        state = at(point)
        return sum(n * numpy_objective(kind, state, *pair) for n, pair in zip(sizes, data, strict=True)) / sum(sizes)

    got = found.statistics[kind.name]
    assert float(got["value"]) == pytest.approx(whole(coefficients), abs=1e-9)
    for j, slope in enumerate(got["slope"].tolist()):
        step = STEP * torch.eye(3, dtype=torch.float64)[j]
        assert slope == pytest.approx((whole(coefficients + step) - whole(coefficients - step)) / (2 * STEP), abs=1e-7)


def test_a_direction_may_be_about_one_tensor_and_together_they_are_the_whole_one():
    module, pair = net(), batch(0)
    whole = vectors(module, 1)[0]
    parts = [{name: tensor} for name, tensor in whole.items()]
    found = LossSlopes().along(module, [whole, *parts], [pair])["slope"]
    assert float(found[0]) == pytest.approx(float(found[1:].sum()), abs=1e-12)
    assert float(found[0]) != 0


def test_batches_do_not_matter_nor_do_labels_for_the_entropy():
    module, (x, y) = net(), batch(0)
    one = EntropySlopes().along(module, vectors(module), [(x, y)])
    two = EntropySlopes().along(module, vectors(module), [(x[:3], 0 * y[:3]), (x[3:], 0 * y[3:])])
    for part, tensor in one.items():
        torch.testing.assert_close(two[part], tensor)


def test_entropy_of_single_outputs_is_that_of_yes_and_no():
    module = nn.Linear(2, 1).double()
    with torch.no_grad():
        module.weight.zero_()
        module.bias.fill_(1.0)
    p = 1 / (1 + np.exp(-1.0))
    found = EntropySlopes().along(module, [], [(torch.zeros(3, 2).double(), torch.zeros(3))])["value"]
    assert float(found) == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p))


def test_outputs_that_are_no_logits_of_examples_have_no_entropy_here():
    with pytest.raises(InvalidOption, match="no logits"):
        EntropySlopes().along(nn.Linear(2, 3), [], [(torch.zeros(4, 5, 2), torch.zeros(4))])


def test_the_model_is_left_as_it_was_and_its_mode_too():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x, y = batch(0)
    LossSlopes().along(module, [{"0.bias": torch.ones(3)}], [(x.float(), y)])
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"value": torch.zeros(1), "slope": torch.zeros(2)}, "2 slopes along 3 directions"),
        ({"value": torch.zeros(1)}, "want value"),
        ({"value": torch.zeros(2), "slope": torch.zeros(3)}, "want value"),
        ({"value": torch.zeros(1), "slope": torch.tensor([0.0, torch.nan, 0.0])}, "NaN"),
    ],
)
def test_an_answer_of_another_form_is_refused(value, words):
    with pytest.raises(InvalidOption, match=words):
        LossSlopes().check_answer(value, net().state_dict(), 3)


def test_what_is_no_parameter_has_no_slope():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(InvalidOption, match="running_mean"):
        LossSlopes().along(module, [{"1.running_mean": torch.ones(3)}], [(torch.zeros(2, 4), torch.arange(2))])
    with pytest.raises(InvalidOption, match="directions"):
        LossSlopes().measure(module, [], None)
