"""Consensus merging: entries of the update that several clients need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.tall_masks import tall_mask
from fedmerge.aggregators.task_vectors import TaskVectors
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Consensus"]


@register("consensus", paper="arXiv:2405.07813")
@dataclass(frozen=True)
class Consensus(Aggregator):
    """The mean update without what no client needs, and what only few need.

    Wang et al. 2024, equation 6: client i needs the entries in
    ``mask_i = [|tau_i| > threshold * |tau - tau_i|]`` of the sum ``tau = sum_j tau_j``, see ``tall_masks``; what at
    least `agreeing` clients need stays, ``theta_0 + scale * keep * tau``, and all else is theta_0. Updates count by
    their examples: with p_i the clients' shares, tau_i stands for ``K p_i tau_i``.

    With more clients the sum of the others grows, and where they agree none may need an entry: with K equal updates
    ``threshold * (K - 1)`` must stay below 1 for anything to move.

    Parameters
    ----------
    threshold
        lambda, at least 0; the authors choose from 0.2 to 0.6.
    agreeing
        k, how many clients must need an entry, at least 0. 0 keeps all, which is task arithmetic; more than there are
        clients keeps none.
    scale
        alpha, by which the sum is multiplied, at least 0; where not given 1 / K, which makes it the mean.

    Examples
    --------
    >>> base = {"w": torch.zeros(3)}
    >>> sent = [ClientUpdate(0, {"w": torch.tensor([2.0, 2.0, 0.0])})]
    >>> sent += [ClientUpdate(1, {"w": torch.tensor([2.0, 0.0, 2.0])})]
    >>> Consensus().merge(sent, MergeContext(base=base), {})[0]["w"]
    tensor([2., 0., 0.])
    """

    separable = "tensor"
    requires_base: ClassVar[bool] = True

    threshold: float = 0.4
    agreeing: int = 2
    scale: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "threshold", 0.0, math.inf, open_high=True)
        check_range(self, "agreeing", 0, math.inf, open_high=True)
        if self.scale is not None:
            check_range(self, "scale", 0.0, math.inf, open_high=True)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Count the clients that need each entry; the memory stays empty."""
        vectors, merged = TaskVectors.of(updates, context, "consensus"), {}
        for name in vectors.names:
            merged[name] = vectors.base[name] + vectors.by_parts(name, partial(self._kept, vectors, name))
        return merged, {}

    def _kept(self, vectors: TaskVectors, name: str, part: slice) -> Tensor:
        factor = 1.0 if self.scale is None else self.scale * len(vectors)
        mean = vectors.mean(name, part)
        needing = torch.zeros(mean.shape, dtype=torch.int32, device=mean.device)
        for share, vector in zip(vectors.shares, vectors.each(name, part), strict=True):
            needing += tall_mask(share * vector, mean, self.threshold)
        return torch.where(needing >= self.agreeing, factor * mean, 0.0)
