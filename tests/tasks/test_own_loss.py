"""A task whose loss is one's own: what it inherits of another loss's likelihood is derived from its own, or refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.errors import TaskError
from fedmerge.tasks import Binary, Classification, LanguageModel, Regression

OUTPUTS = torch.tensor([[1.0, -2.0, 0.5], [0.2, 0.1, -0.3], [2.0, 1.0, 0.0]])
LABELS = torch.tensor([2, 0, -100])
NUMBERS = torch.tensor([[0.0, -1.0, 0.5], [1.0, 0.1, 0.3], [0.0, 0.0, 3.0]])


@dataclass(frozen=True)
class Focal(Classification):
    """Overrides the mean alone, and has an option."""

    power: float = 2.0

    def mean_loss(self, outputs, targets):
        kept = targets != self.ignore_index
        each = F.cross_entropy(outputs[kept], targets[kept], reduction="none")
        return ((1 - (-each).exp()) ** self.power * each).sum() / kept.sum().clamp(min=1)


class Absolute(Regression):
    """Overrides the losses alone."""

    def losses(self, outputs, targets):
        return (outputs - targets).abs().flatten(1).sum(1)


class Mixin:
    def mean_loss(self, outputs, targets):
        return F.huber_loss(outputs, targets)


class Mixed(Mixin, Regression):
    """Has its loss from elsewhere."""


class Further(Focal):
    """Inherits what was derived."""


KINDS = [(Focal(), LABELS), (Further(), LABELS), (Absolute(), NUMBERS), (Mixed(), NUMBERS)]


@pytest.mark.parametrize(("task", "targets"), KINDS)
def test_one_loss_follows_from_the_other_and_the_residual_is_their_gradient(task, targets):
    total = task.losses(OUTPUTS, targets).sum()
    assert float(total) == pytest.approx(float(task.mean_loss(OUTPUTS, targets) * task.weight(OUTPUTS, targets)))
    leaf = OUTPUTS.clone().requires_grad_()
    (task.mean_loss(leaf, targets) * task.weight(leaf, targets)).backward()
    torch.testing.assert_close(task.residual(OUTPUTS, targets), leaf.grad)
    (vector,) = task.vectors(OUTPUTS, targets, "auto", torch.Generator())
    torch.testing.assert_close(vector, leaf.grad)


@pytest.mark.parametrize(("task", "targets"), KINDS)
@pytest.mark.parametrize("asked", ["curvature", "output_fisher", "exact", "sampled"])
def test_nothing_is_measured_by_the_curvature_of_another_loss(task, targets, asked):
    more = {"curvature": (OUTPUTS[None],), "sampled": (torch.Generator(),)}.get(asked, ())
    with pytest.raises(TaskError, match=f"{type(task).__name__} has a loss of its own.*override residual"):
        getattr(task, asked)(OUTPUTS, targets, *more)
    if asked in ("exact", "sampled"):
        with pytest.raises(TaskError, match="has a loss of its own"):
            list(task.vectors(OUTPUTS, targets, asked, torch.Generator()))


def test_whoever_overrides_the_likelihood_as_well_is_believed():
    class Scaled(Regression):
        def mean_loss(self, outputs, targets):
            return 3 * super().mean_loss(outputs, targets)

        def losses(self, outputs, targets):
            return 3 * super().losses(outputs, targets)

        def residual(self, outputs, targets):
            return 3 * super().residual(outputs, targets)

        def curvature(self, outputs, targets, directions):
            return 3 * super().curvature(outputs, targets, directions)

    assert torch.equal(Scaled().residual(OUTPUTS, NUMBERS), 3 * (OUTPUTS - NUMBERS))
    assert torch.equal(Scaled().curvature(OUTPUTS, NUMBERS, OUTPUTS[None]), 3 * OUTPUTS[None])
    with pytest.raises(TaskError, match="Scaled has a loss of its own"):
        Scaled().output_fisher(OUTPUTS, NUMBERS)


@pytest.mark.parametrize("parent", [Classification, Binary, Regression, LanguageModel])
def test_a_task_with_the_loss_of_its_parent_keeps_all_of_it(parent):
    class Same(parent):
        def forward(self, model, inputs):
            return super().forward(model, inputs)

    for name in ("losses", "mean_loss", "residual", "curvature", "vectors", "residual_bound", "lowest_loss"):
        assert getattr(Same, name) is getattr(parent, name)


def test_perplexity_is_that_of_the_labels_whatever_the_loss():
    wanted = F.cross_entropy(OUTPUTS, LABELS, reduction="sum")
    torch.testing.assert_close(Focal().surprise(OUTPUTS, LABELS), wanted)


def test_a_fisher_is_of_ones_own_loss():
    model, data = nn.Linear(2, 3), [(torch.randn(4, 2), torch.tensor([0, 1, 2, 2]))]
    ours = fedmerge.compute_statistics(model, data, ["fisher_diag"], task=Focal())["fisher_diag"]
    plain = fedmerge.compute_statistics(model, data, ["fisher_diag"], task=Focal(power=0.0))["fisher_diag"]
    assert not torch.allclose(ours["weight"], plain["weight"])
    with pytest.raises(TaskError, match="Focal has a loss of its own"):
        fedmerge.compute_statistics(model, data, ["head_gradient"], task=Focal())
