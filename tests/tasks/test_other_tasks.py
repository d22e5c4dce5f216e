"""Yes or no, numbers, and losses of one's own."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.errors import TaskError, UnknownName
from fedmerge.tasks import AnyLoss, Binary, Classification, Multilabel, Regression, either, task_of


def test_a_column_of_outputs_and_a_list_of_targets_are_not_broadcast():
    outputs, targets = torch.randn(6, 1), torch.randn(6)
    assert torch.allclose(Regression().mean_loss(outputs, targets), F.mse_loss(outputs[:, 0], targets))
    labels = (targets > 0).long()
    want = F.binary_cross_entropy_with_logits(outputs[:, 0], labels.float())
    assert torch.allclose(Binary().mean_loss(outputs, labels), want)
    for task in (Regression(), Binary()):
        with pytest.raises(TaskError, match="not one for each"):
            task.mean_loss(torch.randn(6, 2), labels)


def test_yes_and_no_are_counted_by_the_sign_of_the_logit():
    outputs, labels = torch.tensor([[2.0], [-1.0], [3.0], [-4.0]]), torch.tensor([1, 1, 0, -100])
    sums = Binary().sums(outputs, labels)
    assert (sums["hits"], sums["labels"]) == (1, 3)
    want = F.binary_cross_entropy_with_logits(outputs[:3, 0], labels[:3].float(), reduction="sum")
    assert torch.allclose(sums["loss"].float(), want)


def test_a_regression_has_sums_without_hits():
    outputs, targets = torch.randn(4, 3), torch.randn(4, 3)
    sums = Regression().sums(outputs, targets)
    assert sums["labels"] == 12
    assert "hits" not in sums
    assert torch.allclose(sums["loss"].float(), F.mse_loss(outputs, targets, reduction="sum"))


@pytest.mark.parametrize(
    ("task", "targets", "message"),
    [
        (Binary(), torch.tensor([0.0, 2.0]), "from 0 to 1"),
        (Binary(), torch.tensor([0.0, float("nan")]), "from 0 to 1"),
        (Regression(), torch.tensor([0.0, float("inf")]), "NaN or infinite"),
        (Classification(), torch.tensor([0, 1]), "no class axis"),
    ],
)
def test_targets_that_are_none_of_the_task_are_refused(task, targets, message):
    with pytest.raises(TaskError, match=message):
        task.check(torch.zeros(2), targets)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (F.cross_entropy, Classification(where_unclear=1)),
        (nn.CrossEntropyLoss(), Classification(where_unclear=1)),
        (nn.CrossEntropyLoss(ignore_index=7, label_smoothing=0.1), Classification(None, 7, 0.1, 1)),
        (functools.partial(F.cross_entropy, ignore_index=0), Classification(ignore_index=0, where_unclear=1)),
        (nn.NLLLoss(), Classification(where_unclear=1)),
        (F.mse_loss, Regression()),
        (nn.MSELoss(reduction="sum"), Regression()),
        (nn.BCEWithLogitsLoss(), Binary()),
        (F.binary_cross_entropy_with_logits, Binary()),
        ("multilabel", Multilabel()),
        ("classification", Classification()),
        (Regression(), Regression()),
        (None, None),
    ],
)
def test_a_task_may_be_said_by_a_loss_of_torchs_or_by_name(given, wanted):
    assert task_of(given) == wanted
    assert either(None, given) == wanted


def test_what_is_no_task_is_named():
    with pytest.raises(UnknownName, match="regression"):
        task_of("regresion")
    for given in (nn.MSELoss, 3):
        with pytest.raises(TaskError, match=r"nn\.MSELoss"):
            task_of(given)
    with pytest.raises(TaskError, match="same thing"):
        either("regression", F.mse_loss)


class Halved(nn.CrossEntropyLoss):
    """A cross-entropy that is not torch's."""

    def forward(self, outputs, targets):
        return super().forward(outputs, targets) / 2


def test_losses_that_are_not_known_are_taken_as_they_are():
    outputs, targets = torch.randn(5, 3), torch.randint(0, 3, (5,))
    task = task_of(Halved())
    assert isinstance(task, AnyLoss)
    assert torch.allclose(task.mean_loss(outputs, targets), F.cross_entropy(outputs, targets) / 2)
    absolute = task_of(nn.L1Loss())
    want = (outputs - 1).abs().sum(1)
    assert torch.allclose(absolute.losses(outputs, torch.ones(5, 3)), want)


def test_log_probabilities_have_the_curvature_of_their_softmax():
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 3, (4,))
    one, other = task_of(nn.NLLLoss()), task_of(F.cross_entropy)
    for found, wanted in zip(one.exact(logits.log_softmax(1), labels), other.exact(logits, labels), strict=True):
        assert torch.allclose(found, wanted)
    assert torch.allclose(one.mean_loss(logits.log_softmax(1), labels), F.cross_entropy(logits, labels))


def test_probabilities_of_classes_are_targets_of_a_classification():
    outputs, targets = torch.randn(4, 3, 5), torch.rand(4, 3, 5).softmax(1)
    task = task_of(nn.CrossEntropyLoss(label_smoothing=0.2))
    leaf = outputs.clone().requires_grad_()
    nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum")(leaf, targets).backward()
    assert torch.allclose(task.residual(outputs, targets), leaf.grad, atol=1e-6)
    task.check(outputs, targets)
    with pytest.raises(TaskError, match="no probabilities"):
        task.check(outputs, targets * 2)


@pytest.mark.parametrize(
    "loss",
    [
        nn.L1Loss(),
        nn.SmoothL1Loss(),
        nn.HuberLoss(delta=0.3),
        F.l1_loss,
        functools.partial(F.huber_loss, delta=0.3),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])),
    ],
    ids=["L1Loss", "SmoothL1Loss", "HuberLoss", "l1_loss", "huber_loss", "BCEWithLogitsLoss"],
)
def test_losses_of_numbers_set_each_target_against_its_own_output(loss):
    outputs, targets = torch.randn(6, 1), torch.rand(6)
    task = task_of(loss)
    want = loss(outputs, targets[:, None])
    assert torch.allclose(task.mean_loss(outputs, targets), want)
    assert torch.allclose(task.losses(outputs, targets).mean(), want)
    with pytest.raises(TaskError, match="not one for each"):
        task.check(torch.randn(6, 2), targets)


def test_one_score_has_no_classes_to_choose_from():
    with pytest.raises(TaskError, match='"binary"'):
        task_of(nn.CrossEntropyLoss()).check(torch.randn(4, 1), torch.zeros(4, dtype=torch.long))
