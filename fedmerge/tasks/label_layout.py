"""How class labels lie beside a model's outputs: which axis holds the classes."""

from __future__ import annotations

from torch import Tensor

from fedmerge.errors import TaskError

__all__ = ["laid"]


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
    >>> import torch
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
