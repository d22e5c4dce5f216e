"""Models called as their task says, for whatever only knows ``model(inputs)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from fedmerge.models.copies import copy_of
from fedmerge.tasks.task import Task

__all__ = ["called_as_told"]


def called_as_told(model: nn.Module, task: Task | None, inputs: Any) -> nn.Module:
    """The model, or a copy whose ``copy(inputs)`` is ``task.forward(model, inputs)``.

    Statistics call models with one argument, and want a tensor. A copy does so where inputs are several, or where the
    task has a ``forward`` of its own; its parameters have the same names.

    Parameters
    ----------
    model
        Any module.
    task
        Whose ``forward``; that of all tasks where not given.
    inputs
        Of a batch, to see what they are.

    Examples
    --------
    >>> import torch
    >>> both = nn.Bilinear(2, 3, 1)
    >>> inputs = torch.ones(4, 2), torch.ones(4, 3)
    >>> called_as_told(both, None, inputs)(inputs).shape
    torch.Size([4, 1])
    """
    if isinstance(inputs, Tensor) and (task is None or type(task).forward is Task.forward):
        return model
    if isinstance(vars(model).get("forward"), partial):  # it is such a copy
        return model
    copied = copy_of(model)
    # Bound to the copy, and so to copies of it: deepcopy binds methods anew.
    copied.forward = partial(_forward, task, copied.forward)
    copied.train(model.training)
    return copied


def _forward(task: Task | None, forward: Callable[..., Any], inputs: Any) -> Any:
    own = _Bare(forward)
    return Task.forward(task, own, inputs) if task is None else task.forward(own, inputs)  # type: ignore[arg-type]


class _Bare:
    """What a task calls as the model: its own forward, without the copy's around it."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def parameters(self) -> Any:
        """None to be beside: the inputs are there already."""
        return iter(())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.forward.__self__, name)  # type: ignore[attr-defined]
