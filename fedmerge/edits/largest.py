"""Which numbers of a model are the largest, found without a second copy of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.edits.delta import parts

__all__ = ["Cut", "cuts", "kth_largest"]

_BINS = 1 << 15


@dataclass(frozen=True)
class Cut:
    """Which numbers of a tensor are among the largest.

    Parameters
    ----------
    threshold
        Numbers of larger magnitude are.
    equal
        Of those of just this magnitude, the first so many are. A threshold alone would keep all of them, and zeros of
        parameters that nobody moved are many.
    """

    threshold: float
    equal: int

    def masks(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Where they are, for each of the pieces that the tensor comes in; pieces are as they come, with signs."""
        left = self.equal
        for piece in pieces:
            sizes = piece.abs()
            mask = sizes > self.threshold
            if left:
                first = (sizes == self.threshold).nonzero().flatten()[:left]
                mask[first] = True
                left -= len(first)
            yield mask

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in which all other numbers are 0."""
        kept = tensor.clone(memory_format=torch.contiguous_format)
        row = kept.view(-1)
        pieces = [row[part] for part in parts(len(row))]
        for piece, mask in zip(pieces, self.masks(pieces), strict=True):
            piece.masked_fill_(~mask, 0.0)
        return kept


def cuts(tensors: Mapping[str, Callable[[], Iterable[Tensor]]], count: int) -> dict[str, Cut]:
    """Where the `count` numbers of largest magnitude are, among those of all tensors; of equal ones, the first.

    Parameters
    ----------
    tensors
        Each gives the pieces [n] of a tensor each time that it is called.
    count
        From 0 to the number of all.

    Examples
    --------
    >>> row = torch.tensor([1.0, -3.0, 1.0, 2.0])
    >>> cuts({"w": lambda: [row]}, 3)
    {'w': Cut(threshold=1.0, equal=1)}
    """
    if count <= 0:
        return dict.fromkeys(tensors, Cut(math.inf, 0))
    wide = any(piece.dtype == torch.float64 for pieces in tensors.values() for piece in pieces())
    kind = torch.float64 if wide else torch.float32
    threshold = kth_largest(lambda: (p.abs().to(kind) for pieces in tensors.values() for p in pieces()), count)
    equal, left = {}, count
    for name, pieces in tensors.items():
        equal[name] = 0
        for piece in pieces():
            sizes = piece.abs()
            left -= int((sizes > threshold).sum())
            equal[name] += int((sizes == threshold).sum())
    made = {}
    for name, number in equal.items():
        made[name] = Cut(threshold, min(left, number))
        left -= made[name].equal
    return made


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
