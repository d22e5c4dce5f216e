"""Slope and curvature of the loss along directions that a server gives: a few numbers instead of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.inputs import examples_in, split
from fedmerge.models.resize import copy_of
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.layer_statistic import LayerStatistic
from fedmerge.statistics.measuring.taps import stored_dtype
from fedmerge.statistics.sending.soundness import FIXED_POINT, semidefinite
from fedmerge.statistics.statistic_type import Batches
from fedmerge.tasks import as_batch, reading_of
from fedmerge.training.report import TrainingReport

__all__ = ["Secants"]

_ROWS = 1 << 24  # numbers held at once


@register("secants")
@dataclass(frozen=True)
class Secants(LayerStatistic):
    """What the task's loss does along m directions: ``slope`` [m] and Gauss-Newton ``curvature`` [m, m].

    With logits z and their change per unit of direction j, the secant ``J_j = (z(theta + s D_j) - z(theta)) / s``,
    ``slope_j = mean J_j^T r`` and ``curvature_jk = mean J_j^T F J_k`` over labels, in evaluation mode; r and F are the
    loss's gradient and Fisher by the outputs, for classes ``p - y`` and ``diag p - p p^T``.
    Secants rather than tangents, for they take nothing but forward passes (one for each direction), whatever
    the model is made of, and see kinks that lie within reach. Takes 4 (m + m^2) bytes, half of it where packed.

    Parameters
    ----------
    layers
        Has no effect.
    examples
        See :class:`~fedmerge.statistics.layer_statistic.LayerStatistic`.
    reach
        s, above 0.

    Examples
    --------
    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> batch = torch.eye(2), torch.tensor([0, 1])
    >>> found = Secants().along(model, [{"weight": torch.eye(2)}], [batch])
    >>> found["slope"].round(decimals=4), found["curvature"].round(decimals=4)
    (tensor([-0.5000]), tensor([[0.2500]]))
    """

    name: ClassVar[str] = "secants"
    of_labels: ClassVar[bool] = True

    reach: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reach, int | float) or not 0 < self.reach < float("inf"):
            raise InvalidOption(f"statistic {self.name!r}: reach must be above 0, got {self.reach!r}")

    def along(self, model: nn.Module, directions: Sequence[State], batches: Batches) -> State:
        """Measure on the client, on a copy.

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
            There are no examples.
        """
        moved = copy_of(model).eval()
        tasks, size, count = reading_of(self.task).of(model, batches), len(directions), 0
        slope, curvature = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        with torch.no_grad():
            for inputs, targets in self.limited(batches):
                here = as_batch(moved(inputs))
                task = tasks(inputs, here, targets)
                step = max(1, examples_in(inputs) * _ROWS // max(1, here.numel() * (size + 1)))
                for x, y in split(inputs, targets, step):
                    z = as_batch(moved(x)).double()
                    rows = [(at - z) / self.reach for at in self._outputs(moved, directions, x)]
                    j = task.seen(z, y, torch.stack(rows) if rows else z.new_zeros(0, *z.shape))
                    slope += (j * task.residual(z, y)).flatten(1).sum(1).cpu()
                    curvature += (j.flatten(1) @ task.curvature(z, y, j).flatten(1).T).cpu()
                    count += y.numel()
        kept = stored_dtype(model)
        return {"slope": (slope / count).to(kept), "curvature": ((curvature + curvature.T) / (2 * count)).to(kept)}

    def _outputs(self, model: nn.Module, directions: Sequence[State], x: Tensor) -> Iterator[Tensor]:
        """Outputs at the end of every direction; the model is back where it was after each."""
        parameters = dict(model.named_parameters())
        for direction in directions:
            before = {name: parameters[name].clone() for name in direction}
            for name, step in direction.items():
                parameters[name].add_(step.to(parameters[name]), alpha=self.reach)
            yield as_batch(model(x)).double()
            for name, tensor in before.items():
                parameters[name].copy_(tensor)

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Refused, for there are no directions.

        Raises
        ------
        InvalidOption
            Always.
        """
        raise InvalidOption(f"statistic {self.name!r} needs directions: call along()")

    def answer(self, model: nn.Module, batches: Batches, own: nn.Module | None, directions: Sequence[State]) -> State:
        """Along the question's directions; see :meth:`~fedmerge.statistics.Statistic.answer`."""
        return self.along(model, directions, batches)

    def check(self, value: State, state: State) -> None:
        """Real numbers, finite and bounded, and a curvature as every Gram matrix is."""
        super().check(value, state)
        if "curvature" in value:
            semidefinite(self.name, "curvature", value["curvature"], FIXED_POINT)

    def check_answer(self, value: State, state: State, directions: int) -> None:
        """A number, a row and a column for each direction, see :meth:`check`."""
        shapes = {name: tuple(tensor.shape) for name, tensor in value.items()}
        if shapes != {"slope": (directions,), "curvature": (directions, directions)}:
            raise InvalidOption(f"statistic {self.name!r}: shapes {shapes} for {directions} directions")
        super().check_answer(value, state, directions)
