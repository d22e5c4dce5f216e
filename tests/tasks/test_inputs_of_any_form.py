"""Inputs in tuples and mappings, and tasks with a forward pass of their own: measured as plain tensors are."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.offline.compute import compute_statistics
from fedmerge.statistics import FisherDiag, FisherKfac, Gram, HeadGradient, HeadSums, LossGradient
from fedmerge.tasks import Classification, LanguageModel, Regression, called_as_told
from fedmerge.training import judge, train
from fedmerge.training.local import LocalTraining

KINDS = [FisherDiag(), FisherKfac(), Gram(), LossGradient(), HeadSums(), HeadGradient()]


class Net(nn.Module):
    """Takes one table; its subclasses take it in two pieces."""

    def __init__(self):
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(5, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last((self.first(x) * self.scale).tanh())


class Pieces(Net):
    def forward(self, numbers, flags, offset=None):
        assert offset is None or offset.shape == (7,)  # what all examples share is not cut into examples
        return super().forward(torch.cat([numbers, flags], 1))


class Answering(Net):
    """Gives more than its scores."""

    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x), loss=None)


@dataclass(frozen=True)
class Halved(Regression):
    def forward(self, model, inputs):
        return super().forward(model, inputs) / 2


def _made(kind, targets=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().double()
        x, y = torch.randn(10, 5, dtype=torch.float64), torch.randint(0, 3, (10,))
        numbers = torch.randn(10, 3, dtype=torch.float64)
    other = kind().double()
    other.load_state_dict(model.state_dict())
    return model, other, x, numbers if targets == "numbers" else y


FORMS = {
    "tuple": lambda x: (x[:, :3], x[:, 3:]),
    "mapping": lambda x: {"numbers": x[:, :3], "flags": x[:, 3:]},
    "with what all share": lambda x: {"numbers": x[:, :3], "flags": x[:, 3:], "offset": torch.zeros(7)},
}


def _same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        for part, tensor in value.items():
            torch.testing.assert_close(found[name][part], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_statistics_of_inputs_in_pieces_are_those_of_one_table(form):
    plain, pieces, x, y = _made(Pieces)
    wanted = compute_statistics(plain, [(x[:6], y[:6]), (x[6:], y[6:])], KINDS)
    batches = [(FORMS[form](x[:6]), y[:6]), (FORMS[form](x[6:]), y[6:])]
    _same(compute_statistics(pieces, batches, KINDS), wanted)
    few = [Gram(examples=4), FisherDiag(examples=4)]
    _same(compute_statistics(pieces, batches, few), compute_statistics(plain, [(x, y)], few))


def test_scores_beside_other_answers_are_taken_by_the_task():
    plain, answering, x, y = _made(Answering)
    task = LanguageModel(class_axis=1)
    wanted = compute_statistics(plain, [(x, y)], KINDS, task="classification")
    _same(compute_statistics(answering, [(x, y)], KINDS, task=task), wanted)


def test_a_forward_of_ones_own_is_measured_and_trained():
    plain, own, x, numbers = _made(Net, "numbers")
    with torch.no_grad():
        plain.last.weight /= 2
        plain.last.bias /= 2
    wanted = compute_statistics(plain, [(x, numbers)], [LossGradient(), Gram()], task="regression")
    found = compute_statistics(own, [(x, numbers)], [LossGradient(), Gram()], task=Halved())
    torch.testing.assert_close(found["gram"], wanted["gram"])
    # The chain rule through the half.
    torch.testing.assert_close(found["loss_gradient"]["first.weight"], wanted["loss_gradient"]["first.weight"])
    torch.testing.assert_close(found["loss_gradient"]["last.bias"], wanted["loss_gradient"]["last.bias"] / 2)
    assert judge(own, x, numbers, task=Halved()).loss == pytest.approx(judge(plain, x, numbers, task=Regression()).loss)
    before = judge(own, x, numbers, task=Halved()).loss
    train(own, x, numbers, LocalTraining(epochs=20, learning_rate=0.1), seed=0, client=0, round=1, task=Halved())
    assert judge(own, x, numbers, task=Halved()).loss < 0.8 * before


@pytest.mark.parametrize("method", ["fedfisher", "fedkfac", "regmean", "fedavg+ridge_head", "fedavg+logistic_head"])
def test_merging_with_inputs_in_pieces_gives_what_one_table_gives(method):
    merged = []
    for kind, form in ((Net, lambda x: x), (Pieces, FORMS["mapping"])):
        models, clients = [], []
        for seed in range(2):
            _, model, x, y = _made(kind)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            models.append(model)
            clients.append([(form(x[seed::2]), y[seed::2])])
        merged.append(fedmerge.merge(models, method, base=models[0], clients=clients, task="classification"))
    for one, other in zip(merged[0].parameters(), merged[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_copies_of_a_model_that_is_called_as_told_run_with_their_own_weights():
    plain, pieces, x, _ = _made(Pieces)
    told = called_as_told(pieces, Classification(), FORMS["tuple"](x))
    twin = copy.deepcopy(told)
    with torch.no_grad():
        twin.last.bias += 1
    torch.testing.assert_close(told(FORMS["tuple"](x)), plain(x))
    torch.testing.assert_close(twin(FORMS["tuple"](x)), plain(x) + 1)
    torch.testing.assert_close(pieces(*FORMS["tuple"](x)), plain(x))
    assert [name for name, _ in told.named_parameters()] == [name for name, _ in pieces.named_parameters()]
