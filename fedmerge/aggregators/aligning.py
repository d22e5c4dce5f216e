"""What methods share that bring the clients' neurons into one order and average then."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from fedmerge.aggregators.base import Aggregator
from fedmerge.permutations import PermutationSpec
from fedmerge.state import State, WeightedSum
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Aligning", "Permuting"]


class Aligning(Aggregator):
    """Brings models into one order of neurons, then averages them by their weights.

    Running statistics follow the neurons, so :meth:`align` sees them; how they are merged is the pipeline's
    policy, applied to what :meth:`align` gives.
    """

    requires_model: ClassVar[bool] = True

    @abstractmethod
    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Updates that may be averaged tensor by tensor, one at a time."""

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """The weighted mean of what :meth:`align` gave."""
        total = WeightedSum()
        for update in updates:
            total.add(update.state, update.weight)
        return total.mean(), {}


class Permuting(Aligning):
    """Alignment by permutations, which leave every client's function as it is."""

    @abstractmethod
    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """For each client, a permutation of each group."""

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Re-order each client's neurons."""
        if len(updates) == 1:
            yield from updates
            return
        spec = context.symmetries(updates[0].state, type(self).__name__)
        found = self.permutations(spec, updates, context)
        for update, perms in zip(updates, found, strict=True):
            yield replace(update, state=spec.apply(update.state, perms))
