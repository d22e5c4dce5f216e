"""RegMean under the merged prefix: against the formula written out, RegMean itself, and on copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption
from fedmerge.questions import Question, pooled, respond
from fedmerge.refine.prefix_regmean import PrefixStep
from fedmerge.statistics import PrefixSums
from tests.statistics.zoo import made


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)).double()


def batch(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator).double() + seed, torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize("shrinkage", [1.0, 0.6, 0.0])
def test_a_layer_is_regmean_on_inputs_of_the_merged_model_written_out(shrinkage):
    merged, owns, data = net(0), [net(1), net(2)], [batch(40, 1), batch(90, 2)]
    step = PrefixStep("2.weight", last=False, ridge=1e-2, examples=None, shrinkage=shrinkage)
    question = Question(merged.state_dict(), needs=step.needs(), holdout=0)
    answers = [(i, [respond(question, merged, [data[i]], own=owns[i])]) for i in range(2)]
    proposal, _ = step.propose(merged.state_dict(), pooled([question], answers)[0].statistics, {})
    got = (merged[2].weight + proposal.directions[0]["2.weight"]).detach().numpy()
    total, product, n = np.zeros((6, 6)), np.zeros((5, 6)), 130
    for own, (x, _) in zip(owns, data, strict=True):
        h = merged[:2](x).detach().numpy()
        gram = h.T @ h / n
        gram = shrinkage * gram + (1 - shrinkage) * np.diag(np.diag(gram))
        total, product = total + gram, product + own[2].weight.detach().numpy() @ gram
    pull = 1e-2 * np.trace(total) / 6 * np.eye(6)
    wanted = (product + merged[2].weight.detach().numpy() @ pull) @ np.linalg.inv(total + pull)
    np.testing.assert_allclose(got, wanted, atol=1e-9)


def test_of_one_layer_it_is_regmean():
    """Inputs to the first layer are nobody's but the data's."""
    torch.manual_seed(0)
    models = [nn.Linear(4, 3).double() for _ in range(2)]
    clients = [[batch(60, 1)], [batch(30, 2)]]
    measured = [  # one example of ten judges and is not measured
        [(x[torch.arange(len(x)) % 10 != 0], y[torch.arange(len(x)) % 10 != 0]) for x, y in one] for one in clients
    ]
    weights = [len(one[0][1]) for one in measured]
    options = {"shrinkage": 0.7, "ridge": 1e-9}
    plain = fedmerge.merge(models, "regmean", weights=weights, clients=measured, **options)
    # The pull is to a mean: equal labels make clients judge nothing but what they are shown.
    step = PrefixStep("weight", True, 1e-9, None, 0.7)
    mean = fedmerge.merge(models, weights=weights)
    question = Question(mean.state_dict(), needs=step.needs())
    answers = [(i, [respond(question, mean, clients[i], own=models[i])]) for i in range(2)]
    proposal, _ = step.propose(mean.state_dict(), pooled([question], answers)[0].statistics, {})
    torch.testing.assert_close(mean.weight + proposal.directions[0]["weight"], plain.weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mean.bias + proposal.directions[0]["bias"], plain.bias, atol=1e-6, rtol=1e-6)


def test_copies_of_one_model_merge_to_it():
    model = net(0)
    found = fedmerge.merge([model] * 3, "regmean_plusplus", clients=[[batch(30, 1)], [batch(50, 2)], [batch(7, 3)]])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "no bias", "cnn", "dilated", "conv1d"])
def test_products_are_own_weights_times_the_moments_in_every_kind_of_layer(name):
    model, x, y = made(name)
    value = PrefixSums(shrinkage=0.5).compare(model, model, [(x, y)])
    PrefixSums().check(value, model.state_dict())
    whole = PrefixSums().compare(model, model, [(x, y)])
    for key, tensor in value.items():
        if key.endswith(".S"):
            torch.testing.assert_close(tensor.diagonal(dim1=-2, dim2=-1), whole[key].diagonal(dim1=-2, dim2=-1))
            off = ~torch.eye(tensor.shape[-1], dtype=torch.bool)
            torch.testing.assert_close(tensor[..., off], 0.5 * whole[key][..., off])


def test_shares_that_are_none_and_clients_that_are_away_are_refused():
    with pytest.raises(InvalidOption, match="shrinkage"):
        PrefixSums(shrinkage=1.5)
    with pytest.raises(InvalidOption, match="shrinkage"):
        fedmerge.merge([net(0)] * 2, "regmean_plusplus", shrinkage=-1.0)
    with pytest.raises(InvalidOption, match="pass clients="):
        fedmerge.merge([net(0)] * 2, "regmean_plusplus")
