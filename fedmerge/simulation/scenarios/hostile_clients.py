"""Who is hostile, and the hooks by which the client side of every setting does what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedmerge.data import ClientData
from fedmerge.seeding import generator, torch_generator
from fedmerge.simulation.scenarios.attacks import Attack
from fedmerge.state import State

__all__ = ["Hostile", "HostileDataFn", "chosen_attackers"]


def chosen_attackers(seed: int, clients: int, share: float) -> frozenset[int]:
    """Which clients attack; those of a smaller share are among those of a larger one.

    Examples
    --------
    >>> len(chosen_attackers(0, 20, 0.2)), chosen_attackers(0, 20, 0.2) < chosen_attackers(0, 20, 0.3)
    (4, True)
    """
    order = generator(seed, "attackers").permutation(clients)
    return frozenset(order[: round(share * clients)].tolist())


@dataclass(frozen=True)
class Hostile:
    """The attackers of an experiment; called after training with what a client would send.

    Parameters
    ----------
    attack
        What they do.
    attackers
        Who they are.
    classes
        Of the data set.
    seed
        Root of their random streams.
    """

    attack: Attack
    attackers: frozenset[int]
    classes: int
    seed: int

    def __call__(self, state: State, base: State, client: int, round: int) -> State:
        """The parameters that the client sends instead of `state`."""
        if client not in self.attackers:
            return state
        return self.attack.sent(state, base, torch_generator(self.seed, "hostile model", client, round))

    def examples(self, data: ClientData, client: int) -> ClientData:
        """The examples that the client trains on, the same every round."""
        if client not in self.attackers:
            return data
        return self.attack.poisoned(data, self.classes, generator(self.seed, "hostile data", client))


@dataclass(frozen=True)
class HostileDataFn:
    """A ``data_fn`` in which attackers have examples of their own making."""

    honest: Callable[[int, int], ClientData]
    hostile: Hostile

    def __call__(self, partition_id: int, num_partitions: int) -> ClientData:
        """The client's examples."""
        return self.hostile.examples(self.honest(partition_id, num_partitions), partition_id)

    def loaded(self) -> HostileDataFn:
        """The same with the data in it, see :meth:`~fedmerge.clients.app.FedmergeClientApp.with_data`."""
        honest: Any = self.honest
        return replace(self, honest=honest.loaded())
