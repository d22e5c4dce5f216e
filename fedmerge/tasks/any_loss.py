"""A loss of one's own, of which nothing is known but its values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.errors import TaskError
from fedmerge.tasks.task import Estimator, Task, like_outputs

__all__ = ["AnyLoss", "Loss"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(outputs, targets)`` of a batch."""


@dataclass(frozen=True)
class AnyLoss(Task):
    """Any ``loss(outputs, targets)``: it trains, judges, and has an empirical Fisher, from each example's gradient.

    No label can be drawn, so that what needs the curvature of the outputs (``natural_gradient``, ``ridge_head`` and
    their like) refuses it.

    Parameters
    ----------
    loss
        What training minimises; a mean is taken of several values.
    each
        The loss of one example as a batch of one, summed over its labels; `loss` where not given.
    elementwise
        Whether each output has a target of its own, which then come in the outputs' shape: torch's losses of numbers
        would set targets [n] against each of the outputs [n, 1].
    metrics
        See :class:`~fedmerge.tasks.Task`.

    Examples
    --------
    >>> AnyLoss(torch.nn.functional.l1_loss).losses(torch.tensor([[3.0], [1.0]]), torch.ones(2, 1)).tolist()
    [2.0, 0.0]
    """

    lowest_loss: ClassVar[float] = float("-inf")

    loss: Loss
    each: Loss | None = None
    elementwise: bool = False

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """That targets are one for each output, where they have to be; of others the loss alone knows."""
        self._laid(outputs, targets)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One example after the other, for a mean over the batch would mix them."""
        loss = self.each or self.loss
        pairs = zip(outputs, self._laid(outputs, targets), strict=True)
        return torch.stack([loss(output[None], target[None]).sum() for output, target in pairs])

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of the batch."""
        return self.loss(outputs, self._laid(outputs, targets)).mean()

    def _laid(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return like_outputs(targets, outputs).to(outputs.dtype) if self.elementwise else targets

    def labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One per example."""
        return torch.ones(len(outputs), dtype=torch.long, device=outputs.device)

    def hits(self, outputs: Tensor, targets: Tensor) -> None:
        """Nothing is known to be right or wrong."""

    def errors(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Outputs and targets, where each output has a target of its own."""
        if not self.elementwise:
            return None
        columns = outputs.shape[-1] if outputs.ndim == 2 else 1
        return outputs.reshape(-1, columns), self._laid(outputs, targets).reshape(-1, columns)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """By autograd."""
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = self.losses(leaf, targets).sum()
        return torch.autograd.grad(total, leaf)[0]

    def curvature(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """Not known."""
        raise self._unknown()

    def output_fisher(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Not known."""
        raise self._unknown()

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Not known."""
        raise self._unknown()

    def sampled(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Not known."""
        raise self._unknown()

    def regressed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Not known."""
        raise self._unknown()

    def vectors(
        self, outputs: Tensor, targets: Tensor, estimator: Estimator, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Of the labels given; see :meth:`~fedmerge.tasks.Task.vectors`."""
        return super().vectors(outputs, targets, "empirical" if estimator == "auto" else estimator, generator)

    def _unknown(self) -> TaskError:
        return TaskError(
            f"the loss {self.loss!r} has no known label distribution, hence no curvature of its own: set estimator = "
            '"empirical" where a Fisher is measured, or say task="classification", "binary" or "regression"'
        )
