"""How many labels of each class a client has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.state import State
from fedmerge.statistics.base import Batches, LayerStatistic
from fedmerge.tasks import outputs_like, reading_of
from fedmerge.training.report import TrainingReport

__all__ = ["ClassCounts"]


@dataclass(frozen=True)
class ClassCounts(LayerStatistic):
    """Labels by class, [C] under ``class_counts``, C the model's number of outputs; ``8 C`` bytes.

    Where outputs are no classes, as in regression, every example tells about each of them.

    Examples
    --------
    >>> batch = torch.randn(3, 2), torch.tensor([0, 2, 2])
    >>> ClassCounts().measure(nn.Linear(2, 4), [batch], None)["class_counts"]
    tensor([1, 0, 2, 0])
    """

    name: ClassVar[str] = "class_counts"
    among_metrics: ClassVar[bool] = True
    of_labels: ClassVar[bool] = True

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Count, with a forward pass of one example a batch to learn how many classes there are."""
        tasks = reading_of(self.task).of(model, batches)
        counts = torch.zeros(0, dtype=torch.int64)
        for inputs, targets in self.limited(batches):
            outputs = outputs_like(model, inputs)
            found = tasks(inputs, outputs, targets).known(outputs, targets).cpu()
            counts = found + counts if len(counts) else found
        return {"class_counts": counts}

    def nbytes(self, model: nn.Module, example: Tensor) -> int:
        """One whole number per class."""
        outputs = outputs_like(model, example)
        return 8 * (outputs.shape[-1] if outputs.ndim > 1 else 1)

    def parse(self, value: Mapping[str, Any]) -> State:
        """Read the counts; `value` may hold other keys too, and the counts be a plain list.

        Raises
        ------
        InvalidOption
            There are none, or they are no numbers.
        """
        try:
            return {"class_counts": torch.as_tensor(value["class_counts"])}
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidOption(f"statistic 'class_counts': want counts [C] under that name, got {value!r}") from error

    def check(self, value: State, state: State) -> None:
        """Counts of no class can be negative, and some must be positive."""
        super().check(value, state)
        counts = value.get("class_counts")
        if counts is None or counts.ndim != 1 or bool((counts < 0).any()) or not bool((counts > 0).any()):
            raise InvalidOption(f"statistic 'class_counts': want counts [C], some positive, got {counts}")
