"""Losses that are trained with stacked weights: one number for each label, of which shares are added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.data.example_sets import IGNORED
from fedmerge.errors import CannotStack
from fedmerge.tasks import Binary, Classification, LanguageModel, Multilabel, Reading, Regression, Task
from fedmerge.tasks.label_shapes import check_classes, like_outputs
from fedmerge.training.cohort_batches import Participant

__all__ = ["StackedLoss", "as_stacked", "is_plain", "is_stackable", "settled_loss"]


@dataclass(frozen=True)
class StackedLoss:
    """The mean over labels of a task's loss, label by label, so that rows that a client lacks can have no share.

    Parameters
    ----------
    task
        One that :func:`is_stackable`, its class axis known.

    Examples
    --------
    >>> outputs, labels = torch.zeros(2, 1), torch.tensor([0, 1])
    >>> round(float(StackedLoss(Binary()).of(outputs, labels, torch.tensor([1.0, 0.0]))), 4)  # log 2
    0.6931
    """

    task: Task

    def of(self, outputs: Tensor, labels: Tensor, shares: Tensor | None) -> Tensor:
        """The loss of a batch; `shares` [labels] add up to one, and are all alike where not given."""
        if isinstance(self.task, Classification) and shares is None:
            return F.cross_entropy(*self._rows(self.task, outputs, labels), label_smoothing=self.task.label_smoothing)
        each = self._each(outputs, labels)
        return each.mean() if shares is None else torch.dot(each, shares.flatten().to(each.dtype))

    def _each(self, outputs: Tensor, labels: Tensor) -> Tensor:
        task = self.task
        if isinstance(task, Classification):
            rows = self._rows(task, outputs, labels)
            return F.cross_entropy(*rows, reduction="none", label_smoothing=task.label_smoothing)
        wanted = like_outputs(labels, outputs).to(outputs.dtype)
        if isinstance(task, Binary):
            yes = None if task.pos_weight is None else outputs.new_tensor(task.pos_weight)
            return F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none", pos_weight=yes).flatten()
        return F.mse_loss(outputs, wanted, reduction="none").flatten()

    @staticmethod
    def _rows(task: Classification, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        axis = -1 if task.class_axis is None else task.class_axis
        return outputs if outputs.ndim == 2 else outputs.movedim(axis, -1).flatten(0, -2), labels.flatten()


def is_plain(task: Task | None, participants: Sequence[Participant]) -> bool:
    """Whether clients minimise plain cross-entropy, whose class axis is read from shapes.

    Examples
    --------
    >>> is_plain(None, []), is_plain(Classification(ignore_index=0), [])
    (True, False)
    """
    # Torch's own has the classes on axis 1, which says nothing where examples have one label each.
    single = all(participant.y is not None and participant.y.ndim == 1 for participant in participants)
    return (task == Classification(where_unclear=1) and single) or task in (None, Classification())


def is_stackable(task: Task | None) -> bool:
    """Whether a task's loss is a mean over labels that count alike; tasks of one's own train one by one.

    Examples
    --------
    >>> is_stackable(Regression()), is_stackable(Classification(class_weights=(1.0, 2.0)))
    (True, False)
    """
    if type(task) in (Classification, LanguageModel):
        return isinstance(task, Classification) and task.class_weights is None
    return task is None or type(task) in (Binary, Multilabel, Regression)


def as_stacked(task: Task | None, participants: Sequence[Participant]) -> tuple[Task | None, Sequence[Participant]]:
    """The task and the clients as stacks take them: whatever label does not count is -100.

    Raises
    ------
    CannotStack
        The task's loss is none that can be stacked.

    Examples
    --------
    >>> one = Participant(0, torch.zeros(1, 3), torch.tensor([[5, 0, 6]]))
    >>> as_stacked(LanguageModel(padding=0, shift=True), [one])[1][0].y
    tensor([[-100,    6, -100]])
    """
    if not is_stackable(task):
        raise CannotStack(f"clients of {task} train one by one")
    ignored = getattr(task, "ignore_index", IGNORED)
    if isinstance(task, LanguageModel):
        participants = [replace(participant, y=task.next_tokens(participant.y)) for participant in participants]
        task = replace(task, padding=None, shift=False)
    if ignored != IGNORED and isinstance(task, Classification | Binary):
        participants = [
            replace(participant, y=torch.where(participant.y == ignored, IGNORED, participant.y))
            for participant in participants
        ]
        task = replace(task, ignore_index=IGNORED)
    return task, participants


def settled_loss(
    task: Task, model: nn.Module, x: Tensor, outputs: Tensor, y: Tensor, participants: Sequence[Participant]
) -> StackedLoss:
    """The loss at the first batch, once all clients' labels are known to be those of the task.

    Raises
    ------
    TaskError, InvalidOption
        Some are not.
    """
    task = Reading(task)(outputs, y, None, model, x)
    if isinstance(task, Classification):
        task = replace(task, class_axis=task.axis(outputs, y))
        for participant in participants:
            check_classes(
                participant.y, outputs.shape[task.class_axis or 0], f"client {participant.client}", task.ignore_index
            )
        return StackedLoss(task)
    for participant in participants:
        task.check(outputs[:1].expand(len(participant.y), *outputs.shape[1:]), participant.y)
    return StackedLoss(task)
