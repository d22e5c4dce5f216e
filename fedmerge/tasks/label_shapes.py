"""Labels beside a model's outputs: which axis holds the classes, which label belongs to which output and example."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.data.example_sets import IGNORED
from fedmerge.errors import InvalidOption, ModelError, TaskError

__all__ = ["axis_by_length", "by_example", "check_classes", "class_axis_of", "laid", "like_outputs", "units"]

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


def like_outputs(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets of single outputs in the outputs' shape: axes of size 1 are no matter, nor is flattening one of them.

    Raises
    ------
    TaskError
        Their shapes do not belong together: torch would broadcast them, every output against every target.

    Examples
    --------
    >>> like_outputs(torch.zeros(5), torch.zeros(5, 1)).shape
    torch.Size([5, 1])
    """
    if targets.shape == outputs.shape:
        return targets
    if outputs.ndim == 0 and targets.numel() == 1:
        return targets.reshape(())
    first, other = ([size for size in tensor.shape[1:] if size != 1] for tensor in (outputs, targets))
    same = first == other or (targets[:1].numel() == outputs[:1].numel() and min(len(first), len(other)) == 1)
    if not (targets.ndim and outputs.ndim and len(targets) == len(outputs) and same):
        raise TaskError(
            f"targets of shape {list(targets.shape)} are not one for each of the outputs of shape "
            f"{list(outputs.shape)}: give both the same shape"
        )
    return targets.reshape(outputs.shape)


def by_example(values: Tensor, targets: Tensor) -> Tensor:
    """Sums [B] of what was found at every label of the examples.

    Examples
    --------
    >>> by_example(torch.ones(6), torch.zeros(2, 3)).tolist()
    [3.0, 3.0]
    """
    count = len(targets)
    return values.reshape(count, values.numel() // max(1, count)).sum(1)


def units(shape: torch.Size, device: torch.device) -> Iterator[Tensor]:
    """One-hot masks [1, *shape], one per output of an example.

    Examples
    --------
    >>> [mask.tolist() for mask in units(torch.Size([2]), torch.device("cpu"))]
    [[[True, False]], [[False, True]]]
    """
    for i in range(shape.numel()):
        unit = torch.zeros(shape.numel(), dtype=torch.bool, device=device)
        unit[i] = True
        yield unit.view(1, *shape)
