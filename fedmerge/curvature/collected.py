"""All clients of a round side by side, for methods that need them at once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor

from fedmerge.state import State, WeightedSum
from fedmerge.update import ClientUpdate

__all__ = ["Collected", "report_averaged"]

log = logging.getLogger("fedmerge")


def report_averaged(method: str, state: State, solved: Collection[str]) -> None:
    """Say which matrices a method has averaged because no curvature of them was measured.

    Vectors go without saying: where their layer has curvature, biases are in it, and norms have none.
    """
    left = [name for name, tensor in state.items() if tensor.ndim > 1 and name not in solved]
    if left:
        log.warning("%s: nothing is measured of %s: averaged", method, ", ".join(left))


@dataclass(frozen=True)
class Collected:
    """Updates, their weights p_i = n_i / sum n, and the weighted mean of their parameters."""

    updates: tuple[ClientUpdate, ...]
    weights: tuple[float, ...]
    mean: dict[str, Tensor]

    @classmethod
    def of(cls, updates: Iterable[ClientUpdate]) -> Collected:
        """Read a stream of updates to its end."""
        read = tuple(updates)
        total = WeightedSum()
        for update in read:
            total.add(update.state, update.weight)
        weights = tuple(update.weight / total.weight for update in read)
        return cls(read, weights, total.mean())

    @property
    def states(self) -> list[State]:
        """Parameters, client by client."""
        return [update.state for update in self.updates]

    def measured(self, statistic: str) -> dict[str, list[Tensor]]:
        """What all clients measured of `statistic`: by name, client by client.

        What only some measured, or in different shapes, is left out with a warning.
        """
        values = [update.statistic(statistic) for update in self.updates]
        found: dict[str, list[Tensor]] = {}
        for name in dict.fromkeys(name for value in values for name in value):
            tensors = [value[name] for value in values if name in value]
            if len(tensors) == len(values) and len({tensor.shape for tensor in tensors}) == 1:
                found[name] = tensors
            else:
                log.warning("statistic %r: %r is not the same for all clients and is not used", statistic, name)
        return found
