"""The sum of clients' diagonal quadratics, and where it is smallest."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmerge.state import State, WeightedSum

__all__ = ["DiagonalSum"]

log = logging.getLogger("fedmerge")


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
            found = (self.weighted[name] + ridge * mean) / torch.where(total > 0, total, 1.0)
            merged[name] = torch.where(total > 0, found, mean)
        return merged
