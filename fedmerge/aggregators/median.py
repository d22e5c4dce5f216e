"""Coordinate-wise median."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.pieces import coordinate_wise
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Median"]


@register("median", paper="arXiv:1803.01498")
@dataclass(frozen=True)
class Median(Aggregator):
    """Median of the clients in every coordinate, which fewer than half of them cannot carry away.

    Yin et al. 2018, algorithm 1, option I: the middle value, or the mean of the two in the middle. Every client
    has one vote, as in the paper: an example count is only what a client says of itself, and a hostile one would
    say a large number.

    Examples
    --------
    >>> import torch
    >>> sent = [ClientUpdate(i, {"w": torch.tensor([value])}) for i, value in enumerate((1.0, 2.0, 1e6))]
    >>> Median().merge(sent, MergeContext(), {})[0]["w"]
    tensor([2.])
    """

    separable = "tensor"

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """The middle of every coordinate."""
        return coordinate_wise(list(updates), _middle), {}


def _middle(values: Tensor) -> Tensor:
    ordered, count = values.sort(0).values, len(values)
    # Halves are added, for the sum of two huge values may overflow.
    return ordered[(count - 1) // 2] / 2 + ordered[count // 2] / 2
