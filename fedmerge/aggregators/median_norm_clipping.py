"""Norm clipping, by the clients' median norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.norm_clipping import clipped
from fedmerge.aggregators.pieces import squared_norm
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["MedianNormClipping"]


@register("median_norm_clipping", paper="arXiv:1911.07963")
@dataclass(frozen=True)
class MedianNormClipping(Aggregator):
    """Average of the clients' updates, none longer than their median norm.

    As ``norm_clipping`` (Sun et al. 2019), with ``bound = factor * median_i ||theta_i - base||``, so that nobody has
    to know how long updates are; but all updates have to be there before the first is clipped.

    Parameters
    ----------
    factor
        Of the median norm, positive.

    Examples
    --------
    >>> import torch
    >>> base = {"w": torch.zeros(1)}
    >>> sent = [ClientUpdate(i, {"w": torch.tensor([v])}) for i, v in enumerate((1.0, 1.0, -1e6))]
    >>> MedianNormClipping().merge(sent, MergeContext(base=base), {})[0]["w"]
    tensor([0.3333])
    """

    requires_base: ClassVar[bool] = True

    factor: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "factor", 1e-6, math.inf, open_high=True)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Step by the mean of the clipped updates."""
        updates, base = list(updates), context.required_base("median_norm_clipping")
        norms = [math.sqrt(squared_norm(update.state, base)) for update in updates]
        bound, total = self.factor * median(norms), WeightedSum()
        for update, norm in zip(updates, norms, strict=True):
            total.add(clipped(update.state, base, bound, norm), update.weight)
        return {name: base[name] + step for name, step in total.mean().items()}, {}
