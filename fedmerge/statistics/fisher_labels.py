"""What every Fisher information has to be told: whose labels it speaks of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import TaskError
from fedmerge.statistics.statistic_type import Batches, LayerStatistic
from fedmerge.tasks import Estimator, Loss, Reading, TaskAt, reading_of, task_of

__all__ = ["FisherStatistic"]


@dataclass(frozen=True)
class FisherStatistic(LayerStatistic):
    """A Fisher information, measured layer by layer.

    Parameters
    ----------
    layers, examples, task
        See :class:`~fedmerge.statistics.statistic_type.LayerStatistic`.
    estimator
        Whose labels: see :meth:`~fedmerge.tasks.Task.vectors`.
    loss
        What the model was trained with: another way to say `task`, see :func:`~fedmerge.tasks.task_of`.
    """

    of_labels: ClassVar[bool] = True

    estimator: Estimator = "auto"
    loss: Loss | None = None

    def tasks(self, model: nn.Module, batches: Batches) -> TaskAt:
        """The task, told or to be read."""
        reading = reading_of(self.task) if self.loss is None else Reading(task_of(self.loss))
        return reading.of(model, batches)

    def vectors(
        self, tasks: TaskAt, inputs: Tensor, outputs: Tensor, targets: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Vectors v at the outputs with ``F = mean_x sum_v (J^T v)(J^T v)^T``.

        Raises
        ------
        TaskError
            The task cannot be known, or the outputs are not one row for each example.
        """
        if outputs.ndim == 0 or len(outputs) != len(targets):
            raise TaskError(
                f"outputs of shape {list(outputs.shape)} for {len(targets)} examples: a Fisher information is of "
                "single examples, so that the first axis has to be theirs"
            )
        yield from tasks(inputs, outputs, targets).vectors(outputs, targets, self.estimator, generator)
