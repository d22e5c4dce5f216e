"""A loss of one's own, of which nothing is known but its values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import TaskError
from fedmerge.tasks.classification import Classification
from fedmerge.tasks.label_shapes import like_outputs
from fedmerge.tasks.metric import Decisions, Metric
from fedmerge.tasks.own_loss import gradient_of_losses
from fedmerge.tasks.reading import read_task
from fedmerge.tasks.regression import Regression
from fedmerge.tasks.task import Estimator, Task

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
    judge
        The task that models are judged as: it says what is decided, what is right, and which labels count.
    metrics
        Those of the judge where not given. Without a judge, outputs and targets tell what they count: numbers where
        there is one for each output, classes where the outputs have an axis more.

    Examples
    --------
    >>> AnyLoss(torch.nn.functional.l1_loss).losses(torch.tensor([[3.0], [1.0]]), torch.ones(2, 1)).tolist()
    [2.0, 0.0]
    """

    lowest_loss: ClassVar[float] = float("-inf")

    loss: Loss
    each: Loss | None = None
    elementwise: bool = False
    judge: Task | None = None

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The metrics, built."""
        return self.judge.measured if self.judge is not None and self.metrics is None else super().measured

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """As the judge has it."""
        return super().forward(model, inputs) if self.judge is None else self.judge.forward(model, inputs)

    def outputs_for(self, targets: Tensor, classes: int) -> int:
        """As the judge has it."""
        return classes if self.judge is None else self.judge.outputs_for(targets, classes)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """That targets are one for each output, where they have to be; of others the judge or the loss alone knows."""
        self._laid(outputs, targets)
        if self.judge is not None:
            self.judge.check(outputs, targets)

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
        """Those of the judge, or of what is decided where the accuracy is asked for; else one per example."""
        judge = self._decider(outputs, targets) if self._counts_hits else self.judge
        if judge is not None:
            return judge.labels(outputs, targets)
        return torch.ones(len(outputs), dtype=torch.long, device=outputs.device)

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """As the judge has it; else nothing is known to be right or wrong, unless the accuracy is asked for."""
        judge = self._decider(outputs, targets) if self._counts_hits else self.judge
        if judge is None and self._counts_hits:
            raise TaskError(
                f"metric 'accuracy' counts decisions, and outputs of shape {list(outputs.shape)} for {targets.dtype} "
                f"targets of shape {list(targets.shape)} make none that {self} would tell of: name the task beside it"
            )
        return None if judge is None else judge.hits(outputs, targets)

    def decisions(self, outputs: Tensor, targets: Tensor) -> Decisions | None:
        """As the judge has it, or as outputs and targets tell."""
        judge = self._decider(outputs, targets)
        return None if judge is None else judge.decisions(outputs, targets)

    def expected(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As the judge has it; else the outputs."""
        return outputs if self.judge is None else self.judge.expected(outputs, targets)

    def as_outputs(self, expected: Tensor) -> Tensor:
        """As the judge has it; else the same."""
        return expected if self.judge is None else self.judge.as_outputs(expected)

    def surprise(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """As the judge has it, or of classes where targets are some."""
        judge = self._decider(outputs, targets)
        return None if judge is None else judge.surprise(outputs, targets)

    def errors(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """As the judge has it; else outputs and targets, where each output has a target of its own."""
        if self.judge is not None:
            return self.judge.errors(outputs, targets)
        try:
            return Regression().errors(outputs, targets)
        except TaskError:
            return None

    @property
    def reads_outputs(self) -> bool:
        """Whether only outputs and targets tell which metrics there are."""
        return self.judge is None and not self.elementwise

    @property
    def _counts_hits(self) -> bool:
        """Whether the accuracy is asked for, and no judge knows it anyway."""
        return self.judge is None and "accuracy" in (self.metrics or ())

    def _decider(self, outputs: Tensor, targets: Tensor) -> Task | None:
        """The judge, or the task that decides as outputs and targets look; None where they look like numbers."""
        if not self.reads_outputs:
            return self.judge
        try:
            read = read_task(outputs, targets)
        except TaskError:
            return None
        if isinstance(read, Classification):
            return Classification(where_unclear=1)  # as in torch's losses
        return None if isinstance(read, Regression) else read

    def __str__(self) -> str:
        """Its loss by name, for messages."""
        return f"the loss {getattr(self.loss, '__name__', self.loss)}"

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """By autograd."""
        return gradient_of_losses(self, outputs, targets)

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
            f"{self} has no known label distribution, hence no curvature of its own: set estimator = "
            '"empirical" where a Fisher is measured, or say task="classification", "binary" or "regression"'
        )
