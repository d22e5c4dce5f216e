"""Whether a model fits the data of an experiment, told before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import FedMergeError, ModelError, TaskError
from fedmerge.inputs import call, tensors_of
from fedmerge.tasks import Reading, Task

__all__ = ["check_fit"]


def check_fit(
    make_model: Callable[[], nn.Module], x: Any, y: Tensor, classes: int, where: str, task: Task | None = None
) -> None:
    """Make sure that a model can be built and gives a score for each class, or what the task wants.

    Parameters
    ----------
    make_model
        Builds the model.
    x, y
        A few examples and their labels.
    classes
        Classes of the data set.
    where
        Names of model and data set, for errors.
    task
        What the model is to do; classification where not given.

    Raises
    ------
    ModelError
        It cannot be built, does not take the examples, or gives something else.
    UnknownName
        No such model, or no such option of it.
    """
    try:
        model = make_model().eval()
    except FedMergeError:  # names the model itself
        raise
    except Exception as error:  # a user's factory may raise anything
        raise ModelError(f"{where}: building it fails ({type(error).__name__}: {error}). Mend its factory.") from error
    lazy = [name for name, tensor in model.named_parameters() if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"{where}: {lazy[0]!r} belongs to a lazy layer and has no shape yet. "
            "Give the layer its input size, or run one batch through the model in its factory."
        )
    try:
        with torch.no_grad():
            outputs = call(model, x) if task is None else task.forward(model, x)
    except Exception as error:
        raise ModelError(
            f"{where}: it cannot take a batch of shape {_shapes(x)} ({type(error).__name__}: {error}). "
            "Change its first layer, or reshape the batch in its forward."
        ) from error
    wanted = [*y.shape, classes]
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"{where}: it returns a {type(outputs).__name__}, wanted are logits of shape {wanted}. "
            "Return a tensor from its forward."
        )
    shape = tuple(outputs.shape)
    if task is not None:
        try:
            Reading(task)(outputs, y, None, model, x)
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from error
        return
    if shape[:-1] != tuple(y.shape) or shape[-1] < classes:
        raise ModelError(
            f"{where}: it returns shape {list(shape)}, wanted are logits of shape {wanted}. Change its last layer."
        )


def _shapes(x: Any) -> str:
    """Shapes of inputs in the form that they have."""
    if isinstance(x, Tensor):
        return str(list(x.shape))
    if isinstance(x, Mapping):
        return ", ".join(f"{name!r}: {_shapes(part)}" for name, part in x.items())
    return ", ".join(str(list(tensor.shape)) for tensor in tensors_of(x))
