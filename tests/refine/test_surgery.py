"""Representation surgery: against least squares in NumPy, on models that agree, and when it does harm."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption
from fedmerge.questions import Question, pooled, respond
from fedmerge.refine.surgery import SurgeryStep, surgical_map
from fedmerge.state import module_state
from fedmerge.statistics import SurgerySums
from fedmerge.statistics.sending.compression import decode


def _net(seed: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Linear(5, 3, bias=bias)).double()


def _batch(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)).double()
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def _proposed(merged, owns, data, *, rank=None, ridge=1e-3):
    """The head that the server proposes after one exchange with the clients, holdout and all."""
    step = SurgeryStep(rank, ridge, None)
    question = Question(merged.state_dict(), needs=step.needs())
    answers = [(i, [respond(question, merged, [data[i]], own=own)]) for i, own in enumerate(owns)]
    proposal, _ = step.propose(merged.state_dict(), pooled([question], answers)[0].statistics, {})
    head = copy.deepcopy(merged[3])
    head.load_state_dict({n: t + proposal.directions[0][f"3.{n}"] for n, t in head.state_dict().items()})
    return head


def _features(model, data):
    """Of the examples that do not judge."""
    with torch.no_grad():
        return [model[:3](x[torch.arange(len(x)) % 10 != 0]).numpy() for x, _ in data]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_the_head_is_that_of_a_dozen_lines_of_numpy(rank, bias):
    """All features in one place: ridge as further rows, then the first singular vectors of the fitted values."""
    merged, owns, data = _net(0, bias), [_net(1, bias), _net(2, bias)], [_batch(40, 1), _batch(90, 2)]
    head, ridge = _proposed(merged, owns, data, rank=rank, ridge=1e-2), 1e-2
    z = np.vstack(_features(merged, data))
    f = np.vstack([_features(own, [one])[0] for own, one in zip(owns, data, strict=True)])
    h = np.hstack([z, np.ones((len(z), 1))]) if bias else z
    rows = np.vstack([h, np.sqrt(ridge * (h**2).sum() / h.shape[1]) * np.eye(h.shape[1])])
    wanted = np.vstack([f - z, np.zeros((h.shape[1], 5))])
    w = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    directions = np.linalg.svd(rows @ w.T)[2][: rank or 5]
    w = directions.T @ directions @ w
    weight = merged[3].weight.detach().numpy()
    np.testing.assert_allclose(head.weight.detach(), weight + weight @ w[:, :5], rtol=1e-6, atol=1e-8)
    if bias:
        np.testing.assert_allclose(
            head.bias.detach(), merged[3].bias.detach().numpy() + weight @ w[:, 5], rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("rank", [None, 2])
def test_clients_whose_model_is_the_merged_one_leave_it(rank):
    model = _net(0)
    head = _proposed(model, [model, model], [_batch(30, 1), _batch(50, 2)], rank=rank)
    torch.testing.assert_close(head.weight, model[3].weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(head.bias, model[3].bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("away", "rank"), [(5, None), (2, 2)])
def test_a_linear_relation_is_found_exactly(away, rank):
    """Own features are an affine map of the merged ones, of a rank: the head behind it is the own model's."""
    merged, own = _net(0), _net(0)
    rng = torch.Generator().manual_seed(3)
    apart = torch.randn(5, away, generator=rng).double() @ torch.randn(away, 5, generator=rng).double()
    with torch.no_grad():
        own[2].bias.copy_(own[2].bias + apart @ (own[2].bias + 1))
        own[2].weight.add_(apart @ own[2].weight)
    data = [_batch(300, 4)]
    head = _proposed(merged, [own], data, rank=rank, ridge=1e-12)
    x, _ = data[0]
    assert float((merged(x) - own(x)).abs().max()) > 0.1
    torch.testing.assert_close(head(merged[:3](x)), own(x), rtol=1e-6, atol=1e-6)


def test_moments_without_full_rank_give_the_shortest_map():
    w = surgical_map(torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[3.0, 0.0], [1.0, 0.0]]), 1e-9)
    torch.testing.assert_close(w, torch.tensor([[2.0, 0.0], [1.0, 0.0]]).double(), atol=1e-6, rtol=0)


def _tuned(start, batch, rate=0.05, steps=60):
    model = copy.deepcopy(start)
    optimiser = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimiser.step()
    return model


def test_it_helps_clients_of_other_classes_and_never_does_worse_than_the_merge():
    start, (x, y) = _net(0), _batch(600, 1)
    batches = [(x[own], y[own]) for own in ((y == 0) | (y == 1), (y == 2) | (y == 1))]
    models = [_tuned(start, batch) for batch in batches]
    (x, y), loaders = _batch(1000, 9), [[batch] for batch in batches]

    def loss(method: str) -> float:
        return float(nn.functional.cross_entropy(fedmerge.merge(models, method, clients=loaders)(x), y).detach())

    assert loss("fedavg+surgery") < 0.9 * loss("fedavg")


def test_harmful_surgery_is_declined():
    """A client that hardly weighs in the merge, with most of the data and a model of noise."""
    batch = _batch(300, 1)
    good, bad = _tuned(_net(0), batch), _net(7)
    with torch.no_grad():
        bad[2].weight.mul_(50)
    merged = fedmerge.merge([good, bad], "fedavg+surgery", weights=[1, 1e-9], clients=[[batch], [_batch(2000, 5)]])
    torch.testing.assert_close(merged[3].weight, good[3].weight, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_is_left_and_told(caplog):
    models = [_net(0), _net(1)]
    for model in models:
        model[3].requires_grad_(False)
        model[3].load_state_dict(_net(0)[3].state_dict())
    merged = fedmerge.merge(models, "fedavg+surgery", clients=[[_batch(40, 1)], [_batch(40, 2)]])
    assert torch.equal(merged[3].weight, models[0][3].weight)
    assert "no head to fold" in caplog.text


def test_clients_send_sums_and_nothing_else():
    state, _ = module_state(_net(0))
    question = Question(state, needs=(SurgerySums(),))
    answer = respond(question, _net(0), [_batch(50, 1)], own=_net(1))
    assert {n: t.shape for n, t in decode(answer.statistics["surgery_sums"]).items()} == {
        "3.weight.S": (6, 6),
        "3.weight.F": (5, 6),
    }
    with pytest.raises(InvalidOption, match="kept none"):
        respond(question, _net(0), [_batch(20, 0)])


@pytest.mark.parametrize(
    ("mend", "what"),
    [
        (lambda value: value.pop("3.weight.F"), "want S and F"),
        (lambda value: value.update({"3.weight.F": torch.ones(4, 6)}), "has shape"),
        (lambda value: value.update({"3.weight.S": -torch.eye(6)}), "negative diagonal"),
    ],
)
def test_sums_that_cannot_be_are_refused(mend, what):
    value = dict(SurgerySums().compare(_net(0), _net(1), [_batch(20, 0)]))
    SurgerySums().check(value, _net(0).state_dict())
    mend(value)
    with pytest.raises(InvalidOption, match=what):
        SurgerySums().check(value, _net(0).state_dict())


@pytest.mark.parametrize("setting", ["rank=0", "ridge=0", "rank=1.5"])
def test_options_out_of_their_ranges_are_refused(setting):
    with pytest.raises(InvalidOption, match=setting.partition("=")[0]):
        fedmerge.merge([_net(0)] * 2, f"fedavg+surgery({setting})", clients=[[_batch(20, 1)]] * 2)
