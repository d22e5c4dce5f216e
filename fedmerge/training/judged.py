"""Loss and accuracy of a model: one definition, for clients, test sets and the server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.data.client_data import examples_of
from fedmerge.tasks import Classification, Metric, Reading, Task
from fedmerge.tasks.label_shapes import check_classes, class_axis_of
from fedmerge.training.model_on_data import batches, outputs_of

__all__ = ["Judged", "evaluate", "judge"]


@dataclass(frozen=True)
class Judged:
    """Sums over labels, which add up over batches and clients.

    Parameters
    ----------
    total_loss
        Sum of the losses.
    labels
        How many labels count; those that are to be ignored do not.
    hits
        How many of them the model gives the highest score; None where outputs are numbers, neither right nor wrong.
    weight
        What the losses' mean is divided by, where labels have weights; the number of labels where not given.
    metrics, sums
        The task's further metrics, and what they add up, by name.
    """

    total_loss: float = 0.0
    labels: int = 0
    hits: int | None = 0
    weight: float | None = None
    metrics: tuple[Metric, ...] = ()
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Judged) -> Judged:
        """Of both; of nothing and something what there is."""
        if not (self.labels and other.labels):
            return self if self.labels else other
        hits = None if self.hits is None or other.hits is None else self.hits + other.hits
        weight = None if self.weight is None and other.weight is None else self._divided_by + other._divided_by
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        total = self.total_loss + other.total_loss
        return Judged(total, self.labels + other.labels, hits, weight, self.metrics, sums)

    @property
    def loss(self) -> float:
        """Mean over labels; 0 without any."""
        return self.total_loss / self._divided_by if self._divided_by else 0.0

    @property
    def _divided_by(self) -> float:
        return self.labels if self.weight is None else self.weight

    @property
    def accuracy(self) -> float:
        """Share of labels; 0 without any, and NaN where there are no hits."""
        return math.nan if self.hits is None else self.hits / max(1, self.labels)

    @property
    def figures(self) -> dict[str, float]:
        """Every further metric by its name; NaN where nothing was judged that would tell."""
        return {m.name: float(m.value(self.sums[m.name])) if m.name in self.sums else math.nan for m in self.metrics}


@torch.no_grad()
def judge(
    model: nn.Module,
    x: Any,
    y: Tensor | None = None,
    *,
    batch_size: int = 512,
    what: str = "",
    task: Task | None = None,
) -> Judged:
    """Sums of cross-entropy and hits of `model`, left in evaluation mode, over all labels of ``y`` that count.

    Parameters
    ----------
    model
        The model.
    x, y
        Inputs [n, ...] and labels [n] or [n, T]; those of -100 do not count. Or, without `y`, examples in any other
        form that :class:`~fedmerge.data.ClientData` takes.
    batch_size
        Examples at a time.
    what
        Whose they are, in front of an error.
    task
        Whose loss and hits; classification where not given.

    Raises
    ------
    InvalidOption, DataError, ModelError
        As :func:`~fedmerge.training.train`.

    Examples
    --------
    >>> logits, labels = torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, -100])
    >>> judge(nn.Identity(), logits, labels).accuracy
    1.0
    """
    data = examples_of(x, y, what)
    known = None if data.tensors is None else data.tensors[1]
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    model.eval()
    sums: dict[str, Tensor] = {}
    reading = None if task is None else Reading(task)
    for inputs, labels in batches(data, None, batch_size, device):
        outputs = outputs_of(model, inputs, what, None if reading is None else task)
        if reading is None and (task is None or known is None):
            axis = class_axis_of(model, inputs, outputs, labels, what)
            check_classes(labels if known is None else known, outputs.shape[axis], what)
            task = Classification(class_axis=axis)
        elif reading is not None and (not sums or known is None):
            task = reading(outputs, labels, None, model, inputs)
        assert task is not None
        for name, value in task.sums(outputs, labels).items():
            sums[name] = sums[name] + value if name in sums else value
    if task is None or not sums:
        return Judged(metrics=() if task is None else task.measured)
    total = {name: float(sums[name]) for name in ("loss", "weight", "labels", "hits") if name in sums}
    hits = int(total["hits"]) if "hits" in total else None
    own = {metric.name: sums[metric.name].cpu() for metric in task.measured}
    weight = None if total["weight"] == total["labels"] else total["weight"]
    return Judged(total["loss"], int(total["labels"]), hits, weight, task.measured, own)


def evaluate(
    model: nn.Module,
    x: Any,
    y: Tensor | None = None,
    *,
    batch_size: int = 512,
    what: str = "",
    task: Task | None = None,
) -> tuple[float, float]:
    """Mean loss and accuracy of `model` over the labels of ``y`` that count; as :func:`judge`.

    Examples
    --------
    >>> evaluate(nn.Identity(), torch.tensor([[9.0, 0.0]]), torch.tensor([0]))[1]
    1.0
    """
    judged = judge(model, x, y, batch_size=batch_size, what=what, task=task)
    return judged.loss, judged.accuracy
