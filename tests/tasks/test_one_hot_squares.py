"""Classification by least squares, beside NumPy."""

import numpy as np
import pytest
import torch

from fedmerge.errors import TaskError
from fedmerge.tasks import OneHotSquares, make_task

OUTPUTS = torch.tensor([[1.0, 2.0, -1.0], [0.0, 3.0, 1.0], [4.0, 0.5, 0.0]])
LABELS = torch.tensor([1, 1, 0])


def test_the_numbers():
    hot = np.eye(3)[LABELS.numpy()]
    each = ((OUTPUTS.numpy() - 15 * hot) ** 2).mean(1)
    task = make_task("one_hot_squares")
    np.testing.assert_allclose(task.losses(OUTPUTS, LABELS), each, rtol=1e-6)
    assert float(task.mean_loss(OUTPUTS, LABELS)) == pytest.approx(each.mean())
    np.testing.assert_allclose(task.residual(OUTPUTS, LABELS), 2 * (OUTPUTS.numpy() - 15 * hot) / 3, rtol=1e-6)
    assert task.hits(OUTPUTS, LABELS).tolist() == [1, 1, 1]


def test_what_is_ignored_does_not_count_and_classes_may_weigh():
    ignoring = OneHotSquares(scale=2.0).mean_loss(OUTPUTS, torch.tensor([1, -100, -100]))
    assert float(ignoring) == pytest.approx((1 + 0 + 1) / 3)
    task = OneHotSquares(scale=2.0, class_weights=(3.0, 1.0, 1.0))
    each = [2 / 3, (0 + 1 + 1) / 3, 3 * (4 + 0.25) / 3]
    assert float(task.mean_loss(OUTPUTS, LABELS)) == pytest.approx(sum(each) / 5)


def test_several_labels_an_example_and_smoothing():
    outputs, labels = torch.zeros(1, 2, 3), torch.tensor([[0, -100, 1]])  # classes on axis 1
    task = OneHotSquares(scale=2.0, label_smoothing=0.5)
    assert float(task.mean_loss(outputs, labels)) == pytest.approx((1.5**2 + 0.5**2) / 2)


def test_the_scale_is_checked():
    with pytest.raises(TaskError, match="scale must be positive"):
        OneHotSquares(scale=0.0)
