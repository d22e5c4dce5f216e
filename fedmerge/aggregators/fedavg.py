"""Federated averaging."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.aggregators.aggregator import Fold
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["FedAvg"]


@register("fedavg", paper="arXiv:1602.05629")
@dataclass(frozen=True)
class FedAvg(Fold[WeightedSum]):
    """Average of the client models, weighted by their examples.

    McMahan et al. 2017, algorithm 1: ``theta+ = sum_i p_i theta_i`` with ``p_i = n_i / sum_j n_j``.

    Examples
    --------
    >>> import torch
    >>> updates = [ClientUpdate(0, {"w": torch.zeros(2)}, 1), ClientUpdate(1, {"w": torch.ones(2)}, 3)]
    >>> FedAvg().merge(updates, MergeContext(), {})[0]["w"]
    tensor([0.7500, 0.7500])
    """

    separable = "tensor"

    def zero(self, context: MergeContext) -> WeightedSum:
        """No model, no weight."""
        return WeightedSum()

    def add(self, total: WeightedSum, update: ClientUpdate, context: MergeContext) -> WeightedSum:
        """Add ``n_i theta_i``."""
        total.add(update.state, update.weight)
        return total

    def add_stacked(self, total: WeightedSum, updates: StackedUpdates, context: MergeContext) -> WeightedSum:
        """Add ``sum_i n_i theta_i``."""
        total.add_stacked(updates.states, updates.weights)
        return total

    def join(self, total: WeightedSum, other: WeightedSum) -> WeightedSum:
        """Add the sums."""
        total.join(other)
        return total

    def finish(self, total: WeightedSum, context: MergeContext, memory: State) -> tuple[State, State]:
        """Divide by ``sum_i n_i``."""
        return total.mean(), {}
