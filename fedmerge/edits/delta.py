"""What one client's training did to the model, computed tensor by tensor when it is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedmerge.state import State, accumulator_dtype

__all__ = ["PIECE", "Delta", "blocks", "parts"]

PIECE = 1 << 20
"""Numbers that are worked on at a time, so that what a formula needs in between takes no memory of a model's size."""


class Delta(Mapping[str, Tensor]):
    """``delta = theta - theta_0``, of which no more than one tensor is held, in float32 or better.

    Parameters
    ----------
    state, base
        theta and theta_0, with the same tensors.

    Examples
    --------
    >>> import torch
    >>> Delta({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})["w"]
    tensor([2.])
    """

    def __init__(self, state: State, base: State) -> None:
        self._state, self._base = state, base

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, name: str) -> Tensor:
        end = self._state[name]
        return end.to(accumulator_dtype(end.dtype), copy=True).sub_(self._base[name])

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Parts of one tensor in a row, with their places; whoever takes one may change it."""
        end, start = self._state[name].reshape(-1), self._base[name].reshape(-1)
        for part in parts(len(end)):
            yield part, end[part].to(accumulator_dtype(end.dtype), copy=True).sub_(start[part])


def parts(length: int) -> Iterator[slice]:
    """Pieces of a row."""
    for first in range(0, length, PIECE):
        yield slice(first, first + PIECE)


def blocks(rows: Tensor) -> Iterable[Tensor]:
    """A matrix [m, n] in blocks of whole rows."""
    return torch.split(rows, max(1, PIECE // max(1, rows.shape[1])))
