"""Which label belongs to which output and to which example."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedmerge.errors import TaskError

__all__ = ["by_example", "like_outputs", "units"]


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
    one, other = ([size for size in tensor.shape[1:] if size != 1] for tensor in (outputs, targets))
    same = one == other or (targets[:1].numel() == outputs[:1].numel() and min(len(one), len(other)) == 1)
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
        one = torch.zeros(shape.numel(), dtype=torch.bool, device=device)
        one[i] = True
        yield one.view(1, *shape)
