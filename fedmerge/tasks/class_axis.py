"""Which axis of a model's outputs holds the classes, and whether labels are classes of such outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption, ModelError
from fedmerge.tasks.classification import Classification

__all__ = ["axis_by_length", "check_classes", "classification_of"]

_MOST_SHOWN = 5


@torch.no_grad()
def classification_of(model: nn.Module, x: Tensor, outputs: Any, y: Tensor, what: str = "") -> Classification:
    """The classification with the class axis that this model has.

    It is read from shapes: labels have the outputs' without the class axis, which is axis 1, as in torch's losses, or
    the last. Where there are as many classes as positions, so that both would do, the model runs on inputs that are
    shorter by one position: what becomes shorter is no class axis.

    Parameters
    ----------
    model, x
        What gave the outputs, and for which inputs.
    outputs, y
        Of a batch, and its labels.
    what
        Whose they are, in front of an error.

    Raises
    ------
    ModelError
        The model does not return a tensor.
    InvalidOption
        Outputs and labels do not belong together.

    Examples
    --------
    >>> x, y = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    >>> model = nn.Embedding(9, 3)  # as many classes as positions
    >>> classification_of(model, x, model(x), y).class_axis
    2
    """
    what = f"{what}: " if what else ""
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"{what}the model returns a {type(outputs).__name__}, no tensor of scores: wrap it in a module whose "
            "forward returns the scores of the classes alone"
        )
    _check_kind(outputs, y, what)
    try:
        axis = Classification().axis(outputs, y)
    except InvalidOption as error:
        found = axis_by_length(model, x, outputs, y)
        if found is None:
            raise InvalidOption(f"{what}{error}") from error
        axis = found
    if outputs.shape[axis] == 1:
        raise InvalidOption(
            f"{what}the outputs have shape {list(outputs.shape)}, one score for each label, with which cross-entropy "
            'has nothing to learn: give the model an output for each class, or say task="binary" where it is a logit'
        )
    return Classification(class_axis=axis)


def check_classes(labels: Tensor, classes: int, task: Classification, what: str = "") -> None:
    """Make sure that labels are classes, or to be ignored.

    Raises
    ------
    InvalidOption
        They are not.

    Examples
    --------
    >>> check_classes(torch.tensor([0, -100, 2]), 3, Classification())
    """
    if not labels.numel() or (int(labels.max()) < classes and int(labels.min()) >= 0):
        return
    bad = labels[((labels < 0) | (labels >= classes)) & (labels != task.ignore_index)].tolist()
    if bad:
        found = sorted({*bad})
        shown = ", ".join(map(str, found[:_MOST_SHOWN])) + (", ..." if len(found) > _MOST_SHOWN else "")
        raise InvalidOption(
            f"{what + ': ' if what else ''}labels {shown} are not among the model's {classes} classes, numbered from 0 "
            f"to {classes - 1}: number them so, give the model more outputs, or set labels that are to be ignored to "
            f"{task.ignore_index}"
        )


def _check_kind(outputs: Tensor, y: Tensor, what: str) -> None:
    """Labels that look like something else than class numbers, in words that fit them."""
    hot = y.shape == outputs.shape and y.ndim > 1 and y.shape[1] > 1
    if hot and bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all()):
        raise InvalidOption(
            f"{what}labels of shape {list(y.shape)} are one-hot, cross-entropy wants class numbers: pass y.argmax(1), "
            'or say task="multilabel" where several may be true at once'
        )
    if y.is_floating_point():
        raise InvalidOption(
            f"{what}labels are {y.dtype}, cross-entropy wants class numbers: pass y.long() where they are whole "
            'numbers, or say task="regression" or task="binary" (as client_app(..., task=...) takes it)'
        )


def axis_by_length(model: nn.Module, x: Tensor, outputs: Tensor, y: Tensor) -> int | None:
    """The class axis where shapes leave it open between axis 1 and the last, None where nothing tells."""
    n, *rest = y.shape
    last = outputs.ndim - 1
    unclear = (
        isinstance(x, Tensor)
        and rest
        and outputs.shape == (*y.shape, rest[0])
        and outputs.shape == (n, outputs.shape[-1], *rest)
    )
    if not unclear:
        return None
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for axis in range(x.ndim - 1, 0, -1):
            if x.shape[axis] != rest[-1] or rest[-1] < 2:
                continue
            try:
                shape = [*model(x.narrow(axis, 0, rest[-1] - 1).contiguous()).shape]
            except (RuntimeError, ValueError, IndexError, AttributeError, AssertionError):
                continue
            for found, want in ((last, [*y.shape[:-1], rest[-1] - 1, outputs.shape[-1]]),
                                (1, [n, outputs.shape[1], *rest[:-1], rest[-1] - 1])):  # fmt: skip
                if shape == want:
                    return found
        return None
    finally:
        for module, mode in modes:
            module.training = mode
