"""The task that a user means by a name or by a loss of torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional as F

from fedmerge.errors import FedMergeError, TaskError
from fedmerge.lookup.loading import load_named
from fedmerge.registry import build, entries
from fedmerge.tasks.any_loss import AnyLoss, Loss
from fedmerge.tasks.binary import Binary
from fedmerge.tasks.classification import Classification
from fedmerge.tasks.metric import check_metrics
from fedmerge.tasks.regression import Regression
from fedmerge.tasks.task import Task

__all__ = ["TaskLike", "either", "make_task", "task_of"]

TaskLike = Task | str | Loss
"""A task, its name, or a loss of torch's or one's own."""

_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.MSELoss: F.mse_loss,
}
# Losses of a number for each output, of which no more is known.
_OF_NUMBERS = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.huber_loss,
    F.l1_loss,
    F.mse_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
    F.soft_margin_loss,
)
_MODULES_OF_NUMBERS = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.HuberLoss,
    nn.L1Loss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)


def task_of(task_or_loss: TaskLike | None) -> Task | None:
    """The task that is meant; None for None, which leaves it to outputs and targets.

    Parameters
    ----------
    given
        A :class:`~fedmerge.tasks.Task`; ``"classification"``, ``"multilabel"``, ``"binary"``, ``"regression"``,
        ``"language_model"`` or ``"module:Task"``; a loss of torch's, as function, ``functools.partial`` of one, or
        module, whose ``ignore_index``, ``label_smoothing``, ``weight`` and ``pos_weight`` are kept; any other
        ``loss(outputs, targets)``, of which only gradients are known.

    Raises
    ------
    UnknownName
        No task of that name.
    TaskError
        Something else.

    Examples
    --------
    >>> task_of(nn.CrossEntropyLoss(ignore_index=0)).ignore_index
    0
    >>> task_of("regression")
    Regression()
    """
    if task_or_loss is None or isinstance(task_or_loss, Task):
        return task_or_loss
    if isinstance(task_or_loss, str):
        return make_task(task_or_loss)
    if isinstance(task_or_loss, type) or not callable(task_or_loss):
        raise TaskError(
            f"a task is a name ({', '.join(entries('task'))}), a loss such as nn.MSELoss(), or a fedmerge.tasks.Task, "
            f"got {task_or_loss!r}"
        )
    return _of_loss(task_or_loss)


def make_task(
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    loss: str | None = None,
    metrics: Sequence[str] | None = None,
) -> Task:
    """The task that a configuration names.

    Parameters
    ----------
    name
        A registered task, or ``module:Task``: a class, a function that makes a task, or a task. Classification where
        neither it nor a loss is given.
    options
        What it is made with; without a name, what the loss is made with where that is a class.
    loss
        ``module:function`` of outputs and targets, such as ``torch.nn.functional:huber_loss``. Beside a name it is what
        clients train with, and the task is what models are judged as.
    metrics
        Names and ``module:function``; those that are usual for the task where not given.

    Raises
    ------
    UnknownName
        No task, option or metric of that name.
    TaskError, InvalidOption
        It cannot be imported or made.

    Examples
    --------
    >>> make_task("classification", {"class_weights": [1, 3]}, metrics=["f1"]).class_weights
    (1.0, 3.0)
    >>> make_task(loss="torch.nn:HuberLoss", options={"delta": 0.5}).loss
    HuberLoss()
    """
    task = _task(name, dict(options or {}), loss)
    if metrics is not None:
        task = replace(task, metrics=tuple(metrics))
    check_metrics(
        task, task.measured
    )  # one that does not exist, or is none of the task, is told here, not in the first round
    return task


def _task(name: str | None, options: dict[str, Any], loss: str | None) -> Task:
    if name is not None and loss is not None:
        return _judged_as(_task(name, options, None), name, _task(None, {}, loss), loss)
    if loss is not None:
        loss_function = load_named(loss, "loss", "function", "my_losses:focal", TaskError)
        if isinstance(loss_function, type) or options:
            loss_function = _made("loss", loss, loss_function, options)
        task = task_of(loss_function)
    elif name is not None and ":" in name:
        task = load_named(name, "task", "Task", "my_tasks:Survival", TaskError)
        if not isinstance(task, Task) or options:
            task = _made("task", name, task, options)
    else:
        task = build("task", name or "classification", options)
    if not isinstance(task, Task):
        raise TaskError(
            f"task {name!r} is no fedmerge.tasks.Task but a {type(task).__name__}: a loss function goes under loss"
        )
    return task


def _judged_as(judge: Task, name: str, task: Task, loss: str) -> Task:
    """The task of a loss of one's own, judged as another."""
    if not isinstance(task, AnyLoss):
        raise TaskError(
            f"task {name!r} and loss {loss!r} say the same thing: name one of them. Beside a name stands a loss whose "
            "likelihood is not known"
        )
    return replace(task, judge=judge)


def _made(kind: str, name: str, make: Any, options: Mapping[str, Any]) -> Any:
    """What a user's class or function makes with options."""
    if not callable(make):
        raise TaskError(f"{kind} {name!r} is a {type(make).__name__}, which takes no options")
    try:
        return make(**options)
    except FedMergeError:
        raise
    except Exception as error:  # somebody else's code may raise anything
        raise TaskError(
            f"{kind} {name!r}: it cannot be made with {dict(options)} ({type(error).__name__}: {error})"
        ) from error


def either(task: TaskLike | None, loss: TaskLike | None) -> Task | None:
    """The task of two arguments that mean the same.

    Raises
    ------
    TaskError
        Both are given.
    """
    if task is not None and loss is not None:
        raise TaskError(f"task={task!r} and loss={loss!r} say the same thing: pass one of them")
    return task_of(loss if task is None else task)


def _of_loss(loss: Loss) -> Task:
    function, options = _opened(loss)
    numbers = function in _OF_NUMBERS or isinstance(loss, _MODULES_OF_NUMBERS)
    weight, yes = options.get("weight"), options.get("pos_weight")
    if function in (F.cross_entropy, F.nll_loss):
        # A softmax leaves the logarithms of probabilities that nll_loss takes as they are. Both have classes on axis 1.
        kept = {name: options[name] for name in ("ignore_index", "label_smoothing") if name in options}
        weights = None if weight is None else tuple(weight.tolist())
        return Classification(**kept, class_weights=weights, where_unclear=1)
    if function is F.binary_cross_entropy_with_logits and weight is None and (yes is None or yes.ndim <= 1):
        return Binary(pos_weight=None if yes is None else tuple(yes.flatten().tolist()))
    if not (weight is None and yes is None):  # weights of single examples, or of pictures' channels
        return AnyLoss(loss, partial(function, **{**options, "reduction": "sum"}), numbers)
    if function is F.mse_loss:
        return Regression()
    if isinstance(loss, nn.Module) and isinstance(getattr(loss, "reduction", None), str):
        each = copy.copy(loss)
        each.reduction = "sum"  # type: ignore[assignment]
        return AnyLoss(loss, each, numbers)
    return AnyLoss(loss, elementwise=numbers)


def _opened(loss: Loss) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that a loss calls, and its options, where they can be seen."""
    if isinstance(loss, partial) and not loss.args:
        return loss.func, dict(loss.keywords)
    for kind, function in _MODULES.items():
        if isinstance(loss, kind) and type(loss).forward is kind.forward:
            names = ("weight", "pos_weight", "ignore_index", "label_smoothing")
            return function, {name: getattr(loss, name) for name in names if hasattr(loss, name)}
    return loss, {}
