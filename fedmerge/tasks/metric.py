"""What models are judged by besides their loss: sums that add up over batches and clients, and the figure of a sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedmerge.errors import FedMergeError, TaskError
from fedmerge.lookup.loading import load_named
from fedmerge.registry import build

__all__ = ["Answers", "Decisions", "Metric", "OwnMetric", "check_metrics", "metrics_of"]


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a model decides, label by label: a row for each position, a column for each class or question.

    Parameters
    ----------
    scores
        Probabilities [n, C].
    chosen, truths
        What is decided and what is true, bool [n, C].
    kept
        Which of them count, bool [n, C].
    """

    scores: Tensor
    chosen: Tensor
    truths: Tensor
    kept: Tensor


class Answers(Protocol):
    """What a metric asks a task about outputs and targets; see :class:`~fedmerge.tasks.Task`, which has all of it."""

    exclusive: ClassVar[bool]

    def labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How many labels of each example count, [B]."""

    def decisions(self, outputs: Tensor, targets: Tensor) -> Decisions | None:
        """What is decided for each label; None where nothing is."""

    def errors(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Predicted and true numbers [n, outputs]; None where outputs are none."""

    def surprise(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Summed negative log-likelihood of the labels that count; None where labels are no classes."""


class Metric(ABC):
    """One figure of a model. Subclasses are frozen dataclasses, registered under their names.

    Sums of clients add up, so that the figure of all is that of their sums, as if their examples lay in one place.
    """

    kind: ClassVar[str] = "metric"
    name: str
    """Lower case: the record has it as ``test_<name>``."""
    asks: ClassVar[str] = ""
    """What the sums ask of a task: ``decisions``, ``errors`` or ``surprise``, which not all tasks have."""

    def asked(self, task: Answers, outputs: Tensor, targets: Tensor) -> Any:
        """What the task says there.

        Raises
        ------
        TaskError
            It has nothing to say.
        """
        values = getattr(task, self.asks)(outputs, targets)
        if values is None:
            raise self.lacking(task)
        return values

    def lacking(self, task: Answers) -> TaskError:
        """What to say of a task that has nothing to say."""
        return TaskError(f"metric {self.name!r} {_LACKING[self.asks].format(task=task)}")

    @abstractmethod
    def sums(self, task: Answers, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of a batch, in a shape that does not depend on the batch.

        Raises
        ------
        TaskError
            The task has no such metric.
        """

    @abstractmethod
    def value(self, sums: Tensor) -> float:
        """The figure; NaN where the sums do not tell."""


_LACKING = {
    "decisions": "counts decisions, and {task} makes none: choose mae, rmse or r2. A loss of your own is judged as the "
    'task that is named beside it, such as name = "classification" in [task]',
    "errors": "is of numbers, and {task} has none: choose f1, auroc or iou",
    "surprise": "is of classes, and {task} has none",
}


def check_metrics(task: Answers, metrics: Iterable[Metric]) -> None:
    """Make sure that a task has what its metrics are made of, before anything is measured.

    Raises
    ------
    TaskError
        It has not.

    Examples
    --------
    >>> from fedmerge.tasks import Regression
    >>> check_metrics(Regression(), metrics_of(["f1"]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fedmerge.errors.TaskError: metric 'f1' counts decisions, and Regression() makes none: choose mae, rmse or r2...
    """
    for metric in metrics:
        if metric.asks and not getattr(task, "reads_outputs", False):
            try:
                values = getattr(task, metric.asks)(torch.zeros(1, 1), torch.zeros(1))
            except Exception:  # these are no outputs that it knows, so it would look at others
                continue
            if values is None:
                raise metric.lacking(task)


@dataclass(frozen=True)
class OwnMetric(Metric):
    """A metric of one's own: ``function(outputs, targets)``, one number for each example or the mean of a batch.

    Parameters
    ----------
    name
        As it is called in the record.
    function
        Gives [B], or one number.

    Examples
    --------
    >>> from fedmerge.tasks import Regression
    >>> def within_one(outputs, targets):
    ...     return ((outputs - targets).abs() <= 1).float().mean(1)
    >>> task = Regression(metrics=(within_one,))
    >>> task.figures(task.sums(torch.tensor([[1.0], [5.0]]), torch.zeros(2, 1)))["within_one"]
    0.5
    """

    name: str
    function: Callable[[Tensor, Tensor], Any]

    def sums(self, task: Answers, outputs: Tensor, targets: Tensor) -> Tensor:
        """Total and number of examples."""
        try:
            values = torch.as_tensor(self.function(outputs, targets), dtype=torch.float64)
        except FedMergeError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise TaskError(
                f"metric {self.name!r} fails on outputs of shape {list(outputs.shape)} and targets of shape "
                f"{list(targets.shape)} ({type(error).__name__}: {error})"
            ) from error
        count = len(outputs)
        if values.ndim and values.shape != (count,):
            raise TaskError(
                f"metric {self.name!r} gives shape {list(values.shape)} for {count} examples: return one number for "
                "each of them, or their mean"
            )
        return torch.stack([values.sum() if values.ndim else values * count, values.new_tensor(float(count))])

    def value(self, sums: Tensor) -> float:
        """The mean over examples."""
        return float(sums[0] / sums[1])


def metrics_of(wanted: Iterable[Any]) -> tuple[Metric, ...]:
    """The metrics that are meant by names, functions or metrics; ``"accuracy"`` is always there, and left out here.

    Raises
    ------
    UnknownName
        No metric of that name.
    TaskError
        Something else, or two of one name.

    Examples
    --------
    >>> [metric.name for metric in metrics_of(("f1", "accuracy"))]
    ['f1']
    """
    metrics = tuple(metric for item in wanted for metric in _metric(item))
    names = [metric.name for metric in metrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or {"loss", "labels", "hits", "weight"} & set(names):
        raise TaskError(f"metrics {', '.join(names)}: each needs a name of its own, other than loss, labels, hits")
    return metrics


@lru_cache(maxsize=256)
def _metric(wanted: Any) -> tuple[Metric, ...]:
    if isinstance(wanted, Metric):
        return (wanted,)
    if isinstance(wanted, str) and ":" in wanted:
        wanted = load_named(wanted, "metric", "function", "my_metrics:hit_rate", TaskError)
        return _metric(wanted() if isinstance(wanted, type) and issubclass(wanted, Metric) else wanted)
    if isinstance(wanted, str):
        return () if wanted == "accuracy" else (build("metric", wanted, {}),)
    if isinstance(wanted, type) or not callable(wanted):
        raise TaskError(f"a metric is a name, a function of outputs and targets, or a Metric, got {wanted!r}")
    return (OwnMetric(getattr(wanted, "__name__", type(wanted).__name__).lower(), wanted),)
