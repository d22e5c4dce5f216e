"""What Gaussian classifiers need of the features before a linear head: moments class by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption, TaskError
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.head import HeadStatistic
from fedmerge.statistics.measuring.weight_matrices import bias_of
from fedmerge.statistics.statistic_type import Batches, Shapes
from fedmerge.tasks import Task
from fedmerge.training.report import TrainingReport

__all__ = ["ClassMoments"]


@register("class_moments")
@dataclass(frozen=True)
class ClassMoments(HeadStatistic):
    """Second moments of the head's inputs h (with a final 1) by class: ``M_c = mean [y = c] h h^T``.

    [classes, d, d] under ``<weight>.M``; its last row and column hold the classes' sums and frequencies. With
    `diagonal`, ``C = mean onehot(y) h^T`` and ``D = mean onehot(y) (h * h)^T`` instead, [classes, d] each. Takes
    ``4 classes d^2`` bytes, or ``8 classes d``: the first may be more than the model. Of heads with a bias only.

    Parameters
    ----------
    diagonal
        Whether squares are enough.
    layers, examples, clip
        See :class:`~fedmerge.statistics.sending.noise.Bounded`.

    Examples
    --------
    >>> batch = torch.tensor([[2.0], [4.0]]), torch.tensor([0, 1])
    >>> ClassMoments().measure(nn.Linear(1, 2), [batch], None)["weight.M"].tolist()
    [[[2.0, 1.0], [1.0, 0.5]], [[8.0, 2.0], [2.0, 0.5]]]
    """

    name: ClassVar[str] = "class_moments"
    square: ClassVar[tuple[str, str]] = ("M", "A")
    other: ClassVar[str] = "C"

    diagonal: bool = False

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one forward pass, in evaluation mode, on a copy."""
        return self.means(model, batches, _squares if self.diagonal else _moments)

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Of one weight with a bias, of its sizes; nothing of a frozen one."""
        if not shapes:
            return
        weight = next(iter(shapes)).rpartition(".")[0]
        if weight not in state or state[weight].ndim != 2 or bias_of(weight) not in state:
            raise InvalidOption(f"statistic {self.name!r}: {weight!r} is the weight of no linear layer with a bias")
        classes, size = state[weight].shape[0], state[weight].shape[1] + 1
        row = (classes, size)
        wanted = {f"{weight}.C": row, f"{weight}.D": row} if self.diagonal else {f"{weight}.M": (*row, size)}
        if dict(shapes) != wanted:
            raise InvalidOption(f"statistic {self.name!r}: want {wanted}, got {dict(list(shapes.items())[:4])}")

    def bounds(self) -> Mapping[str, float]:
        """``|h h^T| = |h|^2``, no more than which ``|h * h|`` is, and ``|h|``."""
        clip = float("inf") if self.clip is None else self.clip
        return {"C": clip, "D": clip**2} if self.diagonal else {"M": clip**2}


def _labels(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """One-hot labels [n, classes], times the weights of classes."""
    if not task.exclusive or outputs.shape[-1] < 2:
        raise TaskError(f"statistic 'class_moments': {type(task).__name__} has no classes of which one is true")
    labels = task.regressed(outputs, targets).flatten(0, -2)
    weights = task.row_weights(outputs, targets)
    return labels if weights is None else labels * weights[:, None]


def _moments(task: Task, rows: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    labels = _labels(task, outputs, targets)
    sums = torch.stack([(rows * column[:, None]).T @ rows for column in labels.T.to(rows)])
    return {"M": (sums + sums.transpose(-1, -2)) / 2}


def _squares(task: Task, rows: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    labels = _labels(task, outputs, targets).to(rows)
    return {"C": labels.T @ rows, "D": labels.T @ rows.square()}
