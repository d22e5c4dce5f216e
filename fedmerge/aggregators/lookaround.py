"""Lookaround: the plain mean of copies that each keep their momentum."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.registry import register
from fedmerge.state import WeightedSum
from fedmerge.training.rules.kept_momentum import KeptMomentum
from fedmerge.training.rules.local_rule import LocalRule
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["Lookaround"]


@register("lookaround", paper="arXiv:2306.07684")
@dataclass(frozen=True)
class Lookaround(FedAvg):
    """Plain mean of clients that keep their momentum from round to round.

    Zhang et al. 2023, algorithm 1: h copies of a model take k steps each on differently augmented data, and their mean
    is where all of them go on, with ``theta+ = 1 / h sum_i theta_i``; momenta are neither averaged nor set back. Here
    the copies are the clients, who should all take part in every round, and the k steps are ``training.steps``, which
    the paper sets to 5. With one client it is SGD, however many steps make a round. Every client counts the same.

    Examples
    --------
    >>> import torch
    >>> updates = [ClientUpdate(0, {"w": torch.zeros(2)}, 1), ClientUpdate(1, {"w": torch.ones(2)}, 3)]
    >>> Lookaround().merge(updates, MergeContext(), {})[0]["w"]
    tensor([0.5000, 0.5000])
    """

    @property
    def local_rule(self) -> LocalRule:
        """Momentum goes on."""
        return KeptMomentum()

    def add(self, total: WeightedSum, update: ClientUpdate, context: MergeContext) -> WeightedSum:
        """Add ``theta_i``."""
        total.add(update.state, 1.0)
        return total

    def add_stacked(self, total: WeightedSum, updates: StackedUpdates, context: MergeContext) -> WeightedSum:
        """Add ``sum_i theta_i``."""
        total.add_stacked(updates.states, [1.0] * len(updates))
        return total
