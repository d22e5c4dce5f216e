"""The task that a user means by a name or by a loss of torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional as F

from fedmerge.errors import TaskError, UnknownName
from fedmerge.tasks.any_loss import AnyLoss, Loss
from fedmerge.tasks.binary import Binary
from fedmerge.tasks.classification import Classification
from fedmerge.tasks.regression import Regression
from fedmerge.tasks.task import Task

__all__ = ["TaskLike", "either", "task_of"]

TaskLike = Task | str | Loss
"""A task, its name, or a loss of torch's or one's own."""

_NAMED: dict[str, Callable[[], Task]] = {
    "classification": Classification,
    "binary": Binary,
    "multilabel": Binary,
    "regression": Regression,
}
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


def task_of(given: TaskLike | None) -> Task | None:
    """The task that is meant; None for None, which leaves it to outputs and targets.

    Parameters
    ----------
    given
        A :class:`~fedmerge.tasks.Task`; ``"classification"``, ``"binary"``, ``"multilabel"`` or ``"regression"``; a
        loss of torch's, as function, ``functools.partial`` of one, or module, whose ``ignore_index`` and
        ``label_smoothing`` are kept; any other ``loss(outputs, targets)``, of which only gradients are known. So it is
        with losses that weigh classes or examples.

    Raises
    ------
    UnknownName
        No task of that name.
    TaskError
        Something else.

    Examples
    --------
    >>> task_of(nn.CrossEntropyLoss(ignore_index=0))
    Classification(class_axis=None, ignore_index=0, label_smoothing=0.0, where_unclear=1)
    >>> task_of("regression")
    Regression()
    """
    if given is None or isinstance(given, Task):
        return given
    if isinstance(given, str):
        if given not in _NAMED:
            raise UnknownName("task", given, _NAMED)
        return _NAMED[given]()
    if isinstance(given, type) or not callable(given):
        raise TaskError(
            f"a task is a name ({', '.join(_NAMED)}), a loss such as nn.MSELoss(), or a fedmerge.tasks.Task, "
            f"got {given!r}"
        )
    return _of_loss(given)


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


def _of_loss(given: Loss) -> Task:
    function, options = _opened(given)
    numbers = function in _OF_NUMBERS or isinstance(given, _MODULES_OF_NUMBERS)
    if not (options.get("weight") is None and options.get("pos_weight") is None):
        return AnyLoss(given, partial(function, **{**options, "reduction": "sum"}), numbers)
    if function in (F.cross_entropy, F.nll_loss):
        # A softmax leaves the logarithms of probabilities that nll_loss takes as they are. Both have classes on axis 1.
        kept = {name: options[name] for name in ("ignore_index", "label_smoothing") if name in options}
        return Classification(**kept, where_unclear=1)
    if function is F.binary_cross_entropy_with_logits:
        return Binary()
    if function is F.mse_loss:
        return Regression()
    if isinstance(given, nn.Module) and isinstance(getattr(given, "reduction", None), str):
        each = copy.copy(given)
        each.reduction = "sum"  # type: ignore[assignment]
        return AnyLoss(given, each, numbers)
    return AnyLoss(given, elementwise=numbers)


def _opened(given: Loss) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that a loss calls, and its options, where they can be seen."""
    if isinstance(given, partial) and not given.args:
        return given.func, dict(given.keywords)
    for kind, function in _MODULES.items():
        if isinstance(given, kind) and type(given).forward is kind.forward:
            names = ("weight", "pos_weight", "ignore_index", "label_smoothing")
            return function, {name: getattr(given, name) for name in names if hasattr(given, name)}
    return given, {}
