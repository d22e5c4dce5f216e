"""Geometric median (RFA)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.pieces import squared_norm
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["GeometricMedian"]


@register("geometric_median", paper="arXiv:1912.13445")
@dataclass(frozen=True)
class GeometricMedian(Aggregator):
    """The model with the least sum of distances to the clients, weighted by their examples.

    Pillutla et al. 2022 (RFA), algorithm 2, smoothed Weiszfeld: from ``v = sum_i p_i theta_i``, with
    ``p_i = n_i / sum_j n_j``, repeat ``b_i = p_i / max(smoothing, ||v - theta_i||)``,
    ``v = sum_i b_i theta_i / sum_i b_i``. Hostile clients with less than half of the examples move it boundedly,
    but examples are what clients say they have.

    Parameters
    ----------
    smoothing
        nu, the distance below which a client's pull no longer grows, positive.
    iterations
        At most so many steps, at least 1. The paper takes 3; the farther off hostile clients are, the more it
        takes to come back from the mean.
    tolerance
        Stop when no client's distance changes by a larger share, in [0, 1].

    Examples
    --------
    >>> import torch
    >>> sent = [ClientUpdate(i, {"w": torch.tensor([value])}) for i, value in enumerate((1.0, 2.0, 1e6))]
    >>> GeometricMedian().merge(sent, MergeContext(), {})[0]["w"].round()
    tensor([2.])
    """

    smoothing: float = 1e-6
    iterations: int = 100
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        check_range(self, "smoothing", 1e-30, math.inf, open_high=True)
        check_range(self, "iterations", 1, math.inf, open_high=True)
        check_range(self, "tolerance", 0.0, 1.0)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Weiszfeld's steps from the mean."""
        updates = list(updates)
        total = sum(update.weight for update in updates)
        weights = [update.weight / total for update in updates]
        centre = _mean(updates, weights)
        before = self._distances(updates, centre)
        for _ in range(self.iterations):
            pulls = [weight / distance for weight, distance in zip(weights, before, strict=True)]
            centre = _mean(updates, [pull / sum(pulls) for pull in pulls])
            # Each distance by its own measure: beside those of hostile clients all others look at rest.
            distances = self._distances(updates, centre)
            if all(abs(new - old) <= self.tolerance * old for new, old in zip(distances, before, strict=True)):
                break
            before = distances
        return centre, {}

    def _distances(self, updates: Sequence[ClientUpdate], centre: State) -> list[float]:
        return [max(self.smoothing, math.sqrt(squared_norm(update.state, centre))) for update in updates]


def _mean(updates: Sequence[ClientUpdate], shares: Sequence[float]) -> dict[str, Tensor]:
    total = WeightedSum()
    for update, share in zip(updates, shares, strict=True):
        total.add(update.state, share)
    return total.mean()
