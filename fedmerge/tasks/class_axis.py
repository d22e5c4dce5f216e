"""Class labels beside a model's outputs: which axis holds the classes, and the cross-entropy that goes by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.data.example_sets import IGNORED
from fedmerge.errors import InvalidOption, ModelError, TaskError

__all__ = ["CrossEntropy", "axis_by_length", "check_classes", "class_axis_of", "laid"]

_MOST_SHOWN = 5


def laid(
    outputs: Tensor, targets: Tensor, class_axis: int | None = None, where_unclear: int | None = None
) -> tuple[int, Tensor]:
    """The class axis, and targets of the outputs' shape with or without it.

    Parameters
    ----------
    outputs, targets
        Of a batch.
    class_axis, where_unclear
        See :class:`~fedmerge.tasks.Classification`.

    Raises
    ------
    TaskError
        The shapes do not belong together, or do not tell.

    Examples
    --------
    >>> laid(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))[0]
    1
    """
    shape = list(outputs.shape)
    ends = {1, len(shape) - 1} if class_axis is None else {class_axis % max(1, len(shape))}
    if len(shape) < 2 or 0 in ends:
        raise TaskError(
            f"outputs of shape {shape} have no class axis besides the batch: a model with one output per example "
            'is told by task="binary" (0 or 1) or task="regression"'
        )
    if targets.is_floating_point():
        if targets.shape == outputs.shape:
            return min(ends), targets  # probabilities, as torch lays them
        raise TaskError(
            f"targets of {targets.dtype} and shape {list(targets.shape)} are no class numbers for outputs of shape "
            f'{shape}: pass whole numbers, or say task="regression" or task="binary"'
        )
    squeezed = [targets, *(targets.squeeze(i) for i in (1, -1) if targets.ndim > 1 and targets.shape[i] == 1)]
    for labels in squeezed:
        fits = [axis for axis in sorted(ends) if [*shape[:axis], *shape[axis + 1 :]] == list(labels.shape)]
        if len(fits) > 1 and where_unclear is not None:
            return where_unclear % len(shape), labels
        if len(fits) > 1:
            raise TaskError(
                f"outputs of shape {shape} have as many classes as positions, so that labels of shape "
                f"{list(targets.shape)} do not tell the class axis: say task=Classification(class_axis=1), or -1"
            )
        if fits:
            return fits[0], labels
    if len(shape) == 2 and len(outputs) == targets.numel() and 1 in ends:
        return 1, targets  # positions of all examples in one axis
    raise TaskError(
        f"labels of shape {list(targets.shape)} are not those of outputs of shape {shape}: want the outputs' shape "
        "without its class axis, which is axis 1 or the last"
    )


@torch.no_grad()
def class_axis_of(model: nn.Module, x: Any, outputs: Any, y: Tensor, what: str = "") -> int:
    """The class axis that this model's outputs have.

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
    >>> class_axis_of(model, x, model(x), y)
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
        axis = laid(outputs, y)[0]
    except InvalidOption as error:
        by_length = axis_by_length(model, x, outputs, y)
        if by_length is None:
            raise InvalidOption(f"{what}{error}") from error
        axis = by_length
    if outputs.shape[axis] == 1:
        raise InvalidOption(
            f"{what}the outputs have shape {list(outputs.shape)}, one score for each label, with which cross-entropy "
            'has nothing to learn: give the model an output for each class, or say task="binary" where it is a logit'
        )
    return axis


def check_classes(labels: Tensor, classes: int, what: str = "", ignored: int = IGNORED) -> None:
    """Make sure that labels are classes, or to be ignored.

    Raises
    ------
    InvalidOption
        They are not.

    Examples
    --------
    >>> check_classes(torch.tensor([0, -100, 2]), 3)
    """
    if not labels.numel() or (int(labels.max()) < classes and int(labels.min()) >= 0):
        return
    bad = labels[((labels < 0) | (labels >= classes)) & (labels != ignored)].tolist()
    if bad:
        numbers = sorted({*bad})
        shown = ", ".join(map(str, numbers[:_MOST_SHOWN])) + (", ..." if len(numbers) > _MOST_SHOWN else "")
        raise InvalidOption(
            f"{what + ': ' if what else ''}labels {shown} are not among the model's {classes} classes, numbered from 0 "
            f"to {classes - 1}: number them so, give the model more outputs, or set labels that are to be ignored to "
            f"{ignored}"
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
            for candidate, want in ((last, [*y.shape[:-1], rest[-1] - 1, outputs.shape[-1]]),
                                (1, [n, outputs.shape[1], *rest[:-1], rest[-1] - 1])):  # fmt: skip
                if shape == want:
                    return candidate
        return None
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy over the labels that count: ``Classification(class_axis).mean_loss``, in fewer calls.

    Parameters
    ----------
    class_axis
        Which axis of the outputs holds the classes.
    ignoring
        Whether some labels are to be ignored.

    Examples
    --------
    >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[0] * 5, [-100] * 5])
    >>> round(float(CrossEntropy(1, ignoring=True)(logits, labels)), 4)  # log 3
    1.0986
    """

    class_axis: int
    ignoring: bool

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, outputs: Any, y: Tensor, labels: Tensor, what: str) -> CrossEntropy:
        """The loss for this model and these labels.

        Parameters
        ----------
        model, x, outputs, y
            A batch and what the model makes of it.
        labels
            All labels.
        what
            Whose they are, in front of an error.

        Raises
        ------
        InvalidOption
            They do not belong together.
        """
        axis = class_axis_of(model, x, outputs, y, what)
        check_classes(labels, outputs.shape[axis], what)
        return cls(axis, bool((labels == IGNORED).any()))

    def rows(self, outputs: Tensor) -> Tensor:
        """Scores [labels, classes] of outputs."""
        return outputs if outputs.ndim == 2 else outputs.movedim(self.class_axis, -1).flatten(0, -2)

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch; 0 where no label counts, of which torch makes NaN."""
        logits, labels = self.rows(outputs), y.flatten()
        if self.ignoring and not bool((labels != IGNORED).any()):
            return logits.sum() * 0
        return F.cross_entropy(logits, labels)
