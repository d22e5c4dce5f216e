"""Coordinate-wise trimmed mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.pieces import coordinate_wise, counted
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["TrimmedMean"]


@register("trimmed_mean", paper="arXiv:1803.01498")
@dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """Mean in every coordinate without its largest and its smallest values.

    Yin et al. 2018, algorithm 1, option II: of n values the ``floor(trim n)`` at either end are left out. Every
    client has one vote, as in the paper.

    Parameters
    ----------
    trim
        beta, the share left out at each end, in [0, 0.5): no less than the share of hostile clients. 0 is the mean
        of all.

    Examples
    --------
    >>> import torch
    >>> sent = [ClientUpdate(i, {"w": torch.tensor([value])}) for i, value in enumerate((-9.0, 1.0, 3.0, 1e6))]
    >>> TrimmedMean(trim=0.25).merge(sent, MergeContext(), {})[0]["w"]
    tensor([2.])
    """

    separable = "tensor"
    trim: float = 0.2

    def __post_init__(self) -> None:
        check_range(self, "trim", 0.0, 0.5, open_high=True)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """The mean of what is left of every coordinate."""
        updates = list(updates)
        out, count = counted(self.trim, len(updates)), len(updates)

        def trimmed(values: Tensor) -> Tensor:
            return values.sort(0).values[out : count - out].mean(0)

        return coordinate_wise(updates, trimmed), {}
