"""What statistics have in common that are measured layer by layer over a client's examples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption, TaskError
from fedmerge.inputs import examples_in, rows
from fedmerge.state import State
from fedmerge.statistics.statistic_type import Batches, Statistic
from fedmerge.tasks import Estimator, Loss, Reading, Task, TaskAt, reading_of, task_of
from fedmerge.training.report import TrainingReport

__all__ = ["Bounded", "ComparingStatistic", "FisherStatistic", "LayerStatistic"]


@dataclass(frozen=True)
class LayerStatistic(Statistic):
    """A statistic that is measured layer by layer over a client's examples.

    Parameters
    ----------
    layers
        Patterns of parameter names, with ``*`` for anything; a bare layer name such as ``"fc1"`` means all of
        its parameters. Everything where not given.
    examples
        At most so many examples, the first that the loader gives.
    task
        What the model is asked to do, for what depends on it; known where it is measured, and never sent. Read from
        outputs and targets where not given, see :func:`~fedmerge.tasks.read_task`.
    """

    layers: tuple[str, ...] | None = None
    examples: int | None = None
    task: Task | Reading | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.layers is not None:  # a list where it was read from JSON or TOML
            object.__setattr__(self, "layers", tuple(self.layers))
            if not all(isinstance(pattern, str) for pattern in self.layers or ()):
                raise InvalidOption(f"statistic {self.name!r}: layers must be texts, got {self.layers!r}")
        if self.examples is not None and (not isinstance(self.examples, int) or self.examples < 1):
            raise InvalidOption(f"statistic {self.name!r}: examples must be at least 1, got {self.examples!r}")

    def told(self, task: Task | Reading | None) -> LayerStatistic:
        """This statistic with this task, unless it has one."""
        return self if not self.of_labels or self.task is not None else replace(self, task=task)

    def selects(self, name: str) -> bool:
        """Whether the parameter called `name` is to be measured."""
        if self.layers is None:
            return True
        return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in self.layers)

    def limited(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``examples`` of `batches`.

        Raises
        ------
        InvalidOption
            There are none.
        """
        seen = 0
        for inputs, targets in batches:
            end = None if self.examples is None else self.examples - seen
            count = examples_in(inputs)
            if count:
                yield (inputs, targets) if end is None else (rows(inputs, slice(end)), targets[:end])
            seen += count
            if self.examples is not None and seen >= self.examples:
                break
        if not seen:
            raise InvalidOption(f"statistic {self.name!r}: there are no examples to measure on")


class ComparingStatistic(LayerStatistic):
    """A statistic of a merged model beside the one that the client itself has trained."""

    def answer(self, model: nn.Module, batches: Batches, own: nn.Module | None, directions: Sequence[State]) -> State:
        """The comparison; see :meth:`Statistic.answer`."""
        if own is None:
            raise InvalidOption(f"statistic {self.name!r} needs the client's own model, and it has kept none")
        return self.compare(model, own, batches)

    @abstractmethod
    def compare(self, model: nn.Module, own: nn.Module, batches: Batches) -> State:
        """Measure on the client: the merged `model`, its `own` one in the merged order of neurons, its examples."""

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Refused, for there is only one model.

        Raises
        ------
        InvalidOption
            Always.
        """
        raise InvalidOption(f"statistic {self.name!r} compares a merged model with the client's own: call compare()")


@dataclass(frozen=True)
class Bounded(LayerStatistic):
    """A statistic of which it is known how much one example adds, once its features are clipped.

    Parameters
    ----------
    clip
        Longest norm of an example's features, which are shortened to it; none where not given.
    layers, examples
        See :class:`~fedmerge.statistics.statistic_type.LayerStatistic`.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    """Parts that are symmetric matrices without negative eigenvalues."""

    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and not (isfinite(self.clip) and self.clip > 0):
            raise InvalidOption(f"statistic {self.name!r}: clip must be a positive number, got {self.clip!r}")

    @abstractmethod
    def bounds(self) -> Mapping[str, float]:
        """Largest Frobenius norm that one example adds to the sum of each part (last piece of a tensor's name)."""


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
