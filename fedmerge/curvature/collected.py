"""All clients of a round, for methods that need them at once: side by side, or the sum of their diagonal quadratics."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmerge.state import State, WeightedSum
from fedmerge.update import ClientUpdate

__all__ = ["Collected", "DiagonalSum", "report_averaged"]

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
        by_name: dict[str, list[Tensor]] = {}
        for name in dict.fromkeys(name for value in values for name in value):
            tensors = [value[name] for value in values if name in value]
            if len(tensors) == len(values) and len({tensor.shape for tensor in tensors}) == 1:
                by_name[name] = tensors
            else:
                log.warning("statistic %r: %r is not the same for all clients and is not used", statistic, name)
        return by_name


@dataclass
class DiagonalSum:
    """``sum_i w_i F_i o (theta - theta_i)^2``, with a mean to fall back on: three models of memory.

    Sums are in float64: information spans many orders of magnitude.
    """

    information: dict[str, Tensor] = field(default_factory=dict)
    weighted: dict[str, Tensor] = field(default_factory=dict)
    states: WeightedSum = field(default_factory=WeightedSum)
    _counts: dict[str, int] = field(default_factory=dict)
    _clients: int = 0

    def add(self, state: State, information: State, weight: float, scale: float = 1.0) -> None:
        """Add one client: its parameters, F_i of some of them, its weight, and a factor on its F_i alone."""
        self.states.add(state, weight)
        self._clients += 1
        for name, measured in information.items():
            share = measured.double() * (weight * scale)
            product = share * state[name]
            if name in self.information:
                self.information[name] += share
                self.weighted[name] += product
            else:
                self.information[name], self.weighted[name] = share, product
            self._counts[name] = self._counts.get(name, 0) + 1

    def join(self, other: DiagonalSum) -> None:
        """Add another sum; `other` must not be used again."""
        self.states.join(other.states)
        self._clients += other._clients
        for name, information in other.information.items():
            if name in self.information:
                self.information[name] += information
                self.weighted[name] += other.weighted[name]
            else:
                self.information[name], self.weighted[name] = information, other.weighted[name]
            self._counts[name] = self._counts.get(name, 0) + other._counts[name]

    def common(self) -> list[str]:
        """Names that every client had information on; others are left out with a warning."""
        partly = [name for name, count in self._counts.items() if count < self._clients]
        if partly:
            log.warning("information on %s is not from all clients: averaged instead", ", ".join(sorted(partly)))
        return [name for name in self.information if name not in partly]

    def minimum(self, damping: float) -> dict[str, Tensor]:
        """The minimiser, drawn to the mean by `damping` times each tensor's mean information; uses the sums up."""
        merged = self.states.mean()
        for name in self.common():
            information = self.information[name]
            if not information.numel():
                continue
            ridge = damping * float(information.mean())
            total = information + ridge
            mean = merged[name].double()
            least = (self.weighted[name] + ridge * mean) / torch.where(total > 0, total, 1.0)
            merged[name] = torch.where(total > 0, least, mean)
        return merged
