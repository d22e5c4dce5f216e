"""Training of gates, while all else of a routed model stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedmerge.inputs import OnDeviceOf
from fedmerge.routing.routed_model import RoutedModel
from fedmerge.routing.routing import Routing
from fedmerge.tasks import Task, as_batch, reading_of
from fedmerge.tasks.entropy import prediction_entropy
from fedmerge.tasks.reading import called_as_told

__all__ = ["Objective", "fit_gates", "objective"]

log = logging.getLogger("fedmerge")

Objective = Callable[[RoutedModel, int], Tensor]
"""Of a model, and the number of a step: the mean that is to become small."""


def objective(
    what: Literal["entropy", "loss"], batches: Sequence[tuple[Any, Tensor]], task: Task | None, who: str
) -> Objective:
    """The mean entropy of predictions, or the task's mean loss, on one batch after the other.

    Parameters
    ----------
    batches
        ``(inputs, targets)``, at least one; entropy looks at inputs alone.
    task
        Whose loss; read from outputs and targets where not given.
    who
        The method, in front of errors.
    """
    reading = reading_of(task)

    def mean(model: RoutedModel, step: int) -> Tensor:
        inputs, targets = batches[step % len(batches)]
        outputs = as_batch(model(inputs))
        if what == "entropy":
            return prediction_entropy(outputs, who).mean()
        return reading.of(model, batches)(inputs, outputs, targets).losses(outputs, targets).mean()

    return mean


def fit_gates(
    model: RoutedModel,
    batches: Sequence[tuple[Any, Tensor]],
    mean: Callable[[Sequence[tuple[Any, Tensor]]], Objective],
    *,
    steps: int,
    learning_rate: float,
    task: Task | None,
) -> Routing:
    """Minimise an objective by Adam on the gates' layers; the routing with the gates that come of it.

    A step whose gradient is not finite ends it: the gates are then those of the step before.

    Parameters
    ----------
    model
        It is not changed.
    batches
        On any device.
    mean
        Makes the objective of batches on the model's device.
    steps, learning_rate
        Of Adam.
    task
        How the model is called.
    """
    if not steps:
        return model.routing
    running = called_as_told(RoutedModel(model.model, model.routing), task, batches[0][0]).eval()
    assert isinstance(running, RoutedModel)
    value = mean(list(OnDeviceOf(running, batches)))
    running.model.requires_grad_(False)
    gates = list(running.parts.parameters())
    optimizer = torch.optim.Adam(gates, lr=learning_rate)
    with torch.enable_grad():
        for step in range(steps):
            gradients = torch.autograd.grad(value(running, step), gates, allow_unused=True)
            if not all(bool(one.isfinite().all()) for one in gradients if one is not None):
                log.warning("gates are trained for %d of %d steps: the next gradient is not finite", step, steps)
                break
            for parameter, gradient in zip(gates, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    routing = running.routing
    return Routing.from_tensors({name: tensor.detach() for name, tensor in routing.to_tensors().items()})
