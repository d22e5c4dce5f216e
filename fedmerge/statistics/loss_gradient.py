"""The gradient of a client's loss, as one sum over its examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmerge.models.resize import copy_of
from fedmerge.registry import register
from fedmerge.state import State, trained_names
from fedmerge.statistics.layer_statistic import LayerStatistic
from fedmerge.statistics.measuring.measurable import Measurable, check_parameter_shape, doubted_parameters
from fedmerge.statistics.measuring.taps import stored_dtype
from fedmerge.statistics.sending.laws import Breach, cancelling
from fedmerge.statistics.statistic_type import Batches, Shapes
from fedmerge.tasks import TaskAt, as_batch, reading_of
from fedmerge.tasks.entropy import prediction_entropy
from fedmerge.training.report import TrainingReport

__all__ = ["EntropyGradient", "LossGradient"]


@register("loss_gradient")
@dataclass(frozen=True)
class LossGradient(LayerStatistic):
    """Mean gradient of the task's loss over labels, in evaluation mode, under the parameters' names.

    As many bytes as the parameters. A label that is to be ignored is one without gradient.

    Parameters
    ----------
    layers, examples, task
        See :class:`~fedmerge.statistics.layer_statistic.LayerStatistic`.

    Examples
    --------
    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> LossGradient().measure(model, [(torch.eye(2), torch.tensor([0, 1]))], None)["weight"]
    tensor([[-0.2500,  0.2500],
            [ 0.2500, -0.2500]])
    """

    name: ClassVar[str] = "loss_gradient"
    of_labels: ClassVar[bool] = True
    looks_inside: ClassVar[bool] = False

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one forward and backward pass, on a copy."""
        copied = copy_of(model).eval()
        trained = trained_names(model)
        named = {n: p.requires_grad_() for n, p in copied.named_parameters() if n in trained and self.selects(n)}
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
        tasks, count = reading_of(self.task).of(model, batches), 0
        with torch.enable_grad():
            for inputs, targets in self.limited(batches):
                outputs = as_batch(copied(inputs))
                loss = self._sum(tasks, inputs, outputs, targets)
                gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                for name, gradient in zip(named, gradients, strict=True):
                    if gradient is not None:
                        total[name] += gradient
                count += self._count(outputs, targets)
        return {name: (value / count).to(stored_dtype(model)) for name, value in total.items()}

    def _sum(self, tasks: TaskAt, inputs: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        """The objective, added up over a batch."""
        return tasks(inputs, outputs, targets).losses(outputs, targets).sum()

    def _count(self, outputs: Tensor, targets: Tensor) -> int:
        """Over how much it was added up."""
        return targets.numel()

    def identities(self, value: State) -> Mapping[str, Breach]:
        """Rows of a softmax layer's gradient add up to zero."""
        return {name: cancelling(tensor) for name, tensor in value.items() if tensor.ndim and len(tensor) > 1}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Those of parameters."""
        for name, shape in shapes.items():
            check_parameter_shape(self.name, name, shape, state)

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """A parameter that is not trained, or one that is and is missing."""
        return doubted_parameters(model, shapes, self.selects)


@register("entropy_gradient")
@dataclass(frozen=True)
class EntropyGradient(LossGradient):
    """Mean gradient of the entropy of a classifier's predictions, under the parameters' names.

    No target is looked at. As many bytes as the parameters.

    Parameters
    ----------
    layers, examples, task
        See :class:`~fedmerge.statistics.layer_statistic.LayerStatistic`.

    Examples
    --------
    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)  # no prediction is less sure than an even one
    >>> EntropyGradient().measure(model, [(torch.ones(3, 1), torch.zeros(3))], None)["weight"].abs().max()
    tensor(0.)
    """

    name: ClassVar[str] = "entropy_gradient"
    of_labels: ClassVar[bool] = False

    def _sum(self, tasks: TaskAt, inputs: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        return prediction_entropy(outputs, f"statistic {self.name!r}").sum()

    def _count(self, outputs: Tensor, targets: Tensor) -> int:
        return len(outputs)
