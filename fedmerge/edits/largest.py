"""Where the largest numbers of a model begin, without a second copy of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["kth_largest"]

_BINS = 1 << 15


def kth_largest(pieces: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th largest of numbers of at least 0 that come in pieces, exactly.

    The bits of such numbers, read as whole ones, have their order. So the upper bits are counted first, and only
    numbers that share them with the k-th are collected, about one in a hundred.

    Parameters
    ----------
    pieces
        Gives the pieces [n], of float32 or float64, each time that it is called.
    k
        From 1 to the number of all.

    Examples
    --------
    >>> kth_largest(lambda: [torch.tensor([0.5, 3.0]), torch.tensor([2.0])], 2)
    2.0
    """
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for piece in pieces():
        counts += torch.bincount(_upper(piece), minlength=_BINS).cpu()
    reached = counts.flip(0).cumsum(0)
    place = int((reached < k).sum())
    above = int(reached[place - 1]) if place else 0
    nearby = torch.cat([piece[_upper(piece) == _BINS - 1 - place] for piece in pieces()])
    return float(nearby.sort(descending=True).values[k - above - 1])


def _upper(numbers: Tensor) -> Tensor:
    """The upper 15 bits below the sign."""
    if numbers.dtype == torch.float64:
        return numbers.contiguous().view(torch.int64) >> 48
    return numbers.contiguous().view(torch.int32) >> 16
