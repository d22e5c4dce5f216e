"""The task, read from what a model puts out and what it is given as targets, where nobody has told it; and models
called as their task says, for whatever only knows ``model(inputs)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.data.example_sets import IGNORED
from fedmerge.errors import TaskError
from fedmerge.inputs import examples_in, rows
from fedmerge.models.resize import copy_of
from fedmerge.tasks.binary import Binary
from fedmerge.tasks.classification import Classification
from fedmerge.tasks.label_shapes import axis_by_length, like_outputs
from fedmerge.tasks.regression import Regression
from fedmerge.tasks.task import Task, as_batch

__all__ = ["Reading", "TaskAt", "called_as_told", "outputs_like", "read_task", "reading_of"]

Batches = Iterable[tuple[Any, Tensor]]

TaskAt = Callable[[Any, Tensor, Tensor], Task]
"""The task at a batch's inputs, outputs and targets."""


class Reading:
    """The task of a series of batches: what was told, or what the first batch says and all others agree to.

    One reading for all clients of a merge makes sure that they are measured alike.

    Parameters
    ----------
    told
        The task, where it is known.

    Examples
    --------
    >>> Reading()(torch.zeros(2, 1), torch.tensor([0, 1])) == Binary()
    True
    """

    def __init__(self, told: Task | None = None) -> None:
        self._told = told
        self._read: Task | None = None

    @property
    def told(self) -> Task | None:
        """The task, where somebody has told it."""
        return self._told

    def of(self, model: nn.Module, batches: Batches) -> TaskAt:
        """What tells the task of ``(inputs, outputs, targets)`` of one of the batches, see :meth:`__call__`."""

        def task_at(inputs: Any, outputs: Tensor, targets: Tensor) -> Task:
            return self(outputs.detach(), targets, batches, model, inputs)

        return task_at

    def __call__(
        self,
        outputs: Tensor,
        targets: Tensor,
        batches: Batches | None = None,
        model: nn.Module | None = None,
        inputs: Any = None,
    ) -> Task:
        """The task, once it is sure that it is that of this batch.

        Parameters
        ----------
        outputs, targets
            Of one batch.
        batches
            All of them, ``(inputs, targets)``: what a few numbers leave unclear many may tell. Read only where nobody
            has told the task, each output has a target of its own, and they can be read more than once.
        model, inputs
            What gave the outputs: a shorter input tells the class axis where there are as many classes as positions.

        Raises
        ------
        TaskError
            It cannot be known, or its labels cannot be these.
        """
        task = self._told
        if task is None:
            every = targets
            if self._read is None and batches is not None and _one_each(outputs, targets):
                every = _all_targets(batches, targets)
            shown = outputs if len(every) == len(targets) else outputs.new_zeros(len(every), *outputs.shape[1:])
            task = self._read = read_task(shown, every, self._read)
        if isinstance(task, Classification) and model is not None and isinstance(inputs, Tensor):
            task = self._with_axis(task, outputs, targets, model, inputs)
        task.check(outputs, targets)
        return task

    def _with_axis(
        self, task: Classification, outputs: Tensor, targets: Tensor, model: nn.Module, inputs: Tensor
    ) -> Classification:
        """The task with its class axis where shapes leave that open."""
        try:
            task.axis(outputs, targets)
        except TaskError:
            axis = axis_by_length(model, inputs, outputs, targets)
            if axis is not None:
                task = replace(task, class_axis=axis)
                if self._told is None:
                    self._read = task
                else:
                    self._told = task
        return task


def reading_of(task: Task | Reading | None) -> Reading:
    """A reading as it is, or a new one of what was told."""
    return task if isinstance(task, Reading) else Reading(task)


def read_task(outputs: Tensor, targets: Tensor, before: Task | None = None) -> Task:
    """What outputs and targets of a batch say of the task.

    Whole numbers are classes where the outputs have an axis more. With one output for each of them they are yes or no
    if all are 0 or 1, and unclear otherwise. Fractional numbers, one for each output, are a regression where one of
    them lies outside [0, 1], yes or no where all are 0 or 1, and unclear otherwise: probabilities and measurements look
    the same. So do rows with a single 1 among several zeros, as classes and as labels of several that may all be true.

    Parameters
    ----------
    outputs, targets
        Of a batch.
    before
        What earlier batches of the same data said.

    Raises
    ------
    TaskError
        It is unclear, or contradicts what was read before.
    """
    single = _one_each(outputs, targets)
    if not single:
        if targets.is_floating_point() and targets.shape != outputs.shape:
            raise TaskError(
                f"targets of {targets.dtype} and shape {list(targets.shape)} for outputs of shape "
                f"{list(outputs.shape)}: give class numbers as whole numbers (targets.long()), "
                "and numbers to be regressed on in the outputs' shape"
            )
        task: Task = Classification()
    else:
        task = _of_single_outputs(outputs, targets, before)
    if before is not None and type(task) is not type(before):
        raise TaskError(
            f"some targets look like {_word(before)}, others like {_word(task)}: say which by task= "
            '("classification", "binary", "regression", or a loss)'
        )
    return before or task


def _all_targets(batches: Batches, first: Tensor) -> Tensor:
    """Targets of all batches, or the first ones where the others cannot be had or are of other shapes."""
    if iter(batches) is batches:
        return first
    every = [targets for _, targets in batches]
    if any(targets.shape[1:] != first.shape[1:] or targets.dtype != first.dtype for targets in every):
        return first
    return torch.cat(every)


def outputs_like(model: nn.Module, inputs: Any) -> Tensor:
    """Zeros of the shape that the model's outputs for these inputs have, from one example alone.

    Examples
    --------
    >>> outputs_like(nn.Linear(3, 2), torch.zeros(5, 3)).shape
    torch.Size([5, 2])
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            batch: Tensor = model(rows(inputs, slice(1)))
    finally:
        for module, mode in modes:
            module.training = mode
    batch = as_batch(batch)
    return batch.new_zeros(len(batch) * examples_in(inputs), *batch.shape[1:])


def _one_each(outputs: Tensor, targets: Tensor) -> bool:
    """Whether there is a target for every output."""
    try:
        like_outputs(targets, outputs)
    except TaskError:
        return False
    return True


def _of_single_outputs(outputs: Tensor, targets: Tensor, before: Task | None) -> Task:
    flat = targets.reshape(len(targets), -1)
    counted = flat[flat != IGNORED]
    zero_or_one = bool(((counted == 0) | (counted == 1)).all())
    if targets.is_floating_point():
        if isinstance(before, Regression) or not bool(((flat >= 0) & (flat <= 1)).all()):
            return Regression()
        if not zero_or_one:
            raise TaskError(
                "targets from 0 to 1 may be measurements or probabilities: "
                'say task="regression" (squared error) or task="binary" (binary cross-entropy on logits)'
            )
    elif not zero_or_one:
        raise TaskError(
            f"whole numbers from {int(counted.min())} to {int(counted.max())}, one for each of the outputs of shape "
            f'{list(outputs.shape)}, may be measurements or classes: say task="regression" (squared error), or give '
            "each class an output"
        )
    several = flat.shape[1] > 1 and outputs.shape[1] == flat.shape[1]
    if several and before is None and bool((torch.where(flat == 1, 1, 0).sum(1) == 1).all()):
        raise TaskError(
            "rows with a single 1 may be classes or yes and no for each: give classes as numbers "
            '(targets.argmax(1)), or say task="multilabel" or task="classification"'
        )
    return Binary()


def _word(task: Task) -> str:
    known = {Classification: "classes", Binary: "yes or no", Regression: "a regression"}
    return next(word for kind, word in known.items() if isinstance(task, kind))


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
