"""Classes on either axis, labels that are to be ignored, and their likelihood."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedmerge.errors import InvalidOption
from fedmerge.tasks import Classification


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2)], ids=["plain", "sequence", "dense"])
def test_the_class_axis_is_read_from_the_shape_of_the_targets(shape):
    outputs = torch.randn(shape)
    targets = torch.randint(0, 3, (shape[0], *shape[2:]))
    want = F.cross_entropy(outputs, targets)  # torch has classes on axis 1
    assert torch.allclose(Classification().mean_loss(outputs, targets), want)
    assert torch.allclose(Classification().mean_loss(outputs.movedim(1, -1), targets), want)


def test_as_many_classes_as_positions_have_to_be_told():
    outputs, targets = torch.randn(2, 4, 4), torch.randint(0, 4, (2, 4))
    with pytest.raises(InvalidOption, match="class_axis=1"):
        Classification().mean_loss(outputs, targets)
    first = Classification(class_axis=1).mean_loss(outputs, targets)
    assert torch.allclose(first, F.cross_entropy(outputs, targets))
    assert not torch.allclose(first, Classification(class_axis=-1).mean_loss(outputs, targets))


def test_labels_that_do_not_fit_the_outputs_are_refused():
    with pytest.raises(InvalidOption, match=r"labels of shape \[2, 5\]"):
        Classification().mean_loss(torch.randn(2, 4, 3), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(InvalidOption, match="regression"):
        Classification().mean_loss(torch.randn(2, 1), torch.randn(2))
    with pytest.raises(InvalidOption, match="no class axis"):
        Classification().mean_loss(torch.randn(2), torch.zeros(2, dtype=torch.long))


def test_a_column_of_labels_is_a_list_of_labels():
    outputs, targets = torch.randn(6, 3), torch.randint(0, 3, (6, 1))
    sums = Classification().sums(outputs, targets)
    assert sums["hits"] == (outputs.argmax(1) == targets[:, 0]).sum()
    assert sums["labels"] == 6


def test_ignored_labels_count_in_no_sum():
    outputs, targets = torch.randn(3, 7, 4), torch.randint(0, 4, (3, 7))
    targets[0, 2:] = targets[2] = -100
    sums, kept = Classification().sums(outputs, targets), targets != -100
    assert sums["labels"] == kept.sum() == 9
    assert sums["hits"] == ((outputs.argmax(-1) == targets) & kept).sum()
    assert torch.allclose(sums["loss"].float(), F.cross_entropy(outputs[kept], targets[kept], reduction="sum"))
    assert Classification().losses(outputs, targets)[2] == 0


def test_a_batch_without_any_label_that_counts_has_no_loss_and_no_gradient():
    outputs = torch.randn(3, 4, requires_grad=True)
    loss = Classification().mean_loss(outputs, torch.full((3,), -100))
    loss.backward()
    assert loss == 0
    assert not outputs.grad.any()
