"""What an objective is at a model, and its slopes along directions that a server gives: one pass back for all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.inputs import examples_in
from fedmerge.models.resize import copy_of
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.layer_statistic import LayerStatistic
from fedmerge.statistics.statistic_type import Batches, Shapes
from fedmerge.tasks import as_batch, reading_of
from fedmerge.tasks.entropy import prediction_entropy
from fedmerge.training.report import TrainingReport

__all__ = ["EntropySlopes", "LossSlopes"]


@dataclass(frozen=True)
class _Slopes(LayerStatistic):
    """``value`` [1], the mean of an objective over examples, and ``slope`` [m], ``<gradient, direction_j>``."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64,)
    looks_inside: ClassVar[bool] = False

    @abstractmethod
    def _sums(self, model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, int]]:
        """The objective summed over the examples of each batch, and how many these are."""

    def along(self, model: nn.Module, directions: Sequence[State], batches: Batches) -> State:
        """Measure on the client, on a copy, in evaluation mode.

        Parameters
        ----------
        model
            Where the directions start.
        directions
            What is added to parameters, by name; each may be about some of them.
        batches
            ``(inputs, targets)``.

        Raises
        ------
        InvalidOption
            There are no examples, or directions are about what is no parameter.
        """
        copied = copy_of(model).eval()
        known = dict(copied.named_parameters(remove_duplicate=False))
        moved = dict.fromkeys(name for direction in directions for name in direction)
        unknown = [name for name in moved if name not in known]
        if unknown:
            raise InvalidOption(f"statistic {self.name!r}: {unknown[0]!r} is no parameter of the model")
        parameters = [known[name].requires_grad_() for name in moved]
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in zip(moved, parameters, strict=True)}
        value, count = 0.0, 0
        with torch.enable_grad():
            for objective, examples in self._sums(copied, batches):
                if parameters and objective.requires_grad:
                    gradients = torch.autograd.grad(objective, parameters, allow_unused=True)
                    for name, gradient in zip(moved, gradients, strict=True):
                        if gradient is not None:
                            total[name] += gradient
                value, count = value + float(objective.detach()), count + examples
        slopes = [
            sum(float((total[name] * step.to(total[name])).sum()) for name, step in direction.items())
            for direction in directions
        ]
        numbers = torch.tensor([value, *slopes], dtype=torch.float64) / count
        return {"value": numbers[:1], "slope": numbers[1:]}

    def answer(self, model: nn.Module, batches: Batches, own: nn.Module | None, directions: Sequence[State]) -> State:
        """Along the question's directions; see :meth:`~fedmerge.statistics.Statistic.answer`."""
        return self.along(model, directions, batches)

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Refused, for there are no directions.

        Raises
        ------
        InvalidOption
            Always.
        """
        raise InvalidOption(f"statistic {self.name!r} needs directions: call along()")

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """A value and a row of slopes."""
        if set(shapes) != {"value", "slope"} or shapes["value"] != (1,) or len(shapes["slope"]) != 1:
            raise InvalidOption(f"statistic {self.name!r}: want value [1] and slope [m], got {dict(shapes)}")

    def check_answer(self, value: State, state: State, directions: int) -> None:
        """A slope for each direction, see :meth:`check`."""
        super().check_answer(value, state, directions)
        if value["slope"].shape != (directions,):
            raise InvalidOption(f"statistic {self.name!r}: {len(value['slope'])} slopes along {directions} directions")


@register("loss_slopes")
@dataclass(frozen=True)
class LossSlopes(_Slopes):
    """The task's mean loss ``value`` [1], and ``slope`` [m], the inner products of its gradient with m directions.

    Exact, by one pass back whatever the number of directions; ``8 (m + 1)`` bytes. What a client sends of its gradient
    is as much as coefficients of task vectors need, and no more.

    Parameters
    ----------
    layers
        Has no effect.
    examples, task
        See :class:`~fedmerge.statistics.statistic_type.LayerStatistic`.

    Examples
    --------
    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> batch = torch.eye(2), torch.tensor([0, 1])
    >>> LossSlopes().along(model, [{"weight": torch.eye(2)}], [batch])["slope"]
    tensor([-0.5000], dtype=torch.float64)
    """

    name: ClassVar[str] = "loss_slopes"
    of_labels: ClassVar[bool] = True

    def _sums(self, model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, int]]:
        tasks = reading_of(self.task).of(model, batches)
        for inputs, targets in self.limited(batches):
            outputs = as_batch(model(inputs))
            yield tasks(inputs, outputs, targets).losses(outputs, targets).double().sum(), examples_in(inputs)


@register("entropy_slopes")
@dataclass(frozen=True)
class EntropySlopes(_Slopes):
    """The mean entropy ``value`` [1] of a classifier's predictions, and its ``slope`` [m] along m directions.

    No target is looked at. Outputs are logits [B, classes], or one for each example, of yes and no.

    Parameters
    ----------
    layers, task
        Have no effect.
    examples
        See :class:`~fedmerge.statistics.statistic_type.LayerStatistic`.

    Examples
    --------
    >>> model = nn.Linear(2, 2)
    >>> _ = [nn.init.zeros_(p) for p in model.parameters()]
    >>> EntropySlopes().along(model, [], [(torch.eye(2), torch.zeros(2))])["value"]
    tensor([0.6931], dtype=torch.float64)
    """

    name: ClassVar[str] = "entropy_slopes"

    def _sums(self, model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, int]]:
        for inputs, _ in self.limited(batches):
            outputs: Tensor = model(inputs)
            entropies = prediction_entropy(as_batch(outputs), f"statistic {self.name!r}")
            yield entropies.double().sum(), examples_in(inputs)
