"""Regression: numbers, under a normal distribution of unit variance around each output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmerge.errors import TaskError
from fedmerge.registry import register
from fedmerge.tasks.label_shapes import by_example, like_outputs, units
from fedmerge.tasks.task import Task

__all__ = ["Regression"]


@register("regression")
@dataclass(frozen=True)
class Regression(Task):
    """A number for every output, of one or several, squared error.

    Targets have the outputs' shape, up to axes of size 1. The likelihood is a unit normal around each output, so that
    the curvature is ``J^T J``; it is the same, up to one factor, for every noise that does not depend on the output,
    such as Laplace's (absolute error).

    Parameters
    ----------
    metrics
        See :class:`~fedmerge.tasks.Task`; the mean absolute error and R2 where not given.

    Examples
    --------
    >>> Regression().losses(torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, 1.0])).tolist()
    [2.0, 0.0]
    """

    usual_metrics: ClassVar[tuple[str, ...]] = ("mae", "r2")

    def outputs_for(self, targets: Tensor, classes: int) -> int:
        """One for each number of an example; as many as are wanted for pictures of them.

        Examples
        --------
        >>> Regression().outputs_for(torch.zeros(8, 3), 0), Regression().outputs_for(torch.zeros(8), 0)
        (3, 1)
        """
        return {1: 1, 2: targets.shape[-1]}.get(targets.ndim, classes or 1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Finite numbers."""
        numbers = like_outputs(targets, outputs)
        bad = int((~torch.isfinite(numbers)).sum())
        if bad:
            raise TaskError(f"{bad} of {numbers.numel()} targets of a regression are NaN or infinite")

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error."""
        return by_example(self.residual(outputs, targets).square() / 2, outputs)

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error over all numbers, as ``F.mse_loss`` has it: without the half."""
        return F.mse_loss(outputs, like_outputs(targets, outputs).to(outputs.dtype))

    def labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """All numbers."""
        return torch.full((len(outputs),), outputs[:1].numel(), device=outputs.device)

    def hits(self, outputs: Tensor, targets: Tensor) -> None:
        """Nothing is right or wrong."""

    def errors(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets; a column for each of the last axis, one where there is a single output."""
        columns = outputs.shape[-1] if outputs.ndim == 2 else 1
        true = like_outputs(targets, outputs).to(outputs.dtype)
        return outputs.reshape(-1, columns), true.reshape(-1, columns)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Output minus target."""
        return outputs - like_outputs(targets, outputs).to(outputs.dtype)

    def curvature(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """`directions` as they are."""
        return directions

    def output_fisher(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The identity, for each example and position."""
        count = outputs[..., 0].numel()
        return count * torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """1 at every output in turn."""
        for unit in units(outputs.shape[1:], outputs.device):
            yield unit.to(outputs.dtype).expand_as(outputs)

    def sampled(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Normal noise."""
        return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)

    def regressed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The targets."""
        return like_outputs(targets, outputs).to(outputs.dtype)
