"""Server steps: what the server does with a merged model before it becomes the next global model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedmerge.aggregators.base import check_range
from fedmerge.complex_pairs import as_pairs, from_pairs
from fedmerge.registry import register
from fedmerge.state import State, accumulator_dtype, prefixed, with_prefix

__all__ = ["ServerAdam", "ServerMomentum", "ServerStep"]


class ServerStep(ABC):
    """A step from the old global model towards a merged one, with memory between rounds.

    Subclasses are frozen dataclasses; any of them may follow any aggregator: ``fednova+server_momentum``.
    """

    kind: ClassVar[str] = "server step"

    @abstractmethod
    def step(self, base: State, merged: State, memory: State) -> tuple[State, State]:
        """The new global parameters and the memory for the next round."""


@register("server_momentum", paper="arXiv:1909.06335")
@dataclass(frozen=True)
class ServerMomentum(ServerStep):
    """Momentum on the server (FedAvgM).

    Hsu et al. 2019: with ``delta = merged - base``, ``buf <- momentum * buf + delta`` and
    ``theta+ = base + learning_rate * buf``. Without momentum and at learning rate 1 it changes nothing.

    Parameters
    ----------
    momentum
        Share of the last step that is kept, in [0, 1).
    learning_rate
        Factor on the step.
    """

    momentum: float = 0.9
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "momentum", 0.0, 1.0, open_high=True)
        check_range(self, "learning_rate", 0.0, math.inf, open_high=True)

    def step(self, base: State, merged: State, memory: State) -> tuple[State, State]:
        """Move along the velocity; the memory is the velocity."""
        velocity = {}
        for name, start in base.items():
            delta = merged[name].to(accumulator_dtype(start.dtype)) - start
            velocity[name] = delta.add_(memory[name], alpha=self.momentum) if name in memory else delta
        return {n: start + self.learning_rate * velocity[n] for n, start in base.items()}, velocity


@register("server_adam", paper="arXiv:2003.00295")
@dataclass(frozen=True)
class ServerAdam(ServerStep):
    """Adam on the server (FedAdam).

    Reddi et al. 2021, algorithm 2: with ``delta = merged - base``, ``m <- beta1 m + (1 - beta1) delta``,
    ``v <- beta2 v + (1 - beta2) delta^2`` from ``m = 0``, ``v = tau^2``, and
    ``theta+ = base + learning_rate * m / (sqrt(v) + tau)``; no bias correction, as in the paper. Real and imaginary
    parts have moments of their own, as in torch.

    Parameters
    ----------
    learning_rate
        Server learning rate eta, in units of parameters per normalised step.
    beta1, beta2
        Decay of the first and second moment, in [0, 1).
    tau
        Degree of adaptivity: the smaller, the more every parameter moves alike.
    """

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        check_range(self, "learning_rate", 0.0, math.inf, open_high=True)
        check_range(self, "beta1", 0.0, 1.0, open_high=True)
        check_range(self, "beta2", 0.0, 1.0, open_high=True)
        check_range(self, "tau", 1e-12, math.inf, open_high=True)

    def step(self, base: State, merged: State, memory: State) -> tuple[State, State]:
        """Take the adaptive step; the memory holds both moments."""
        first, second = prefixed("m", memory), prefixed("v", memory)
        state, m, v = {}, {}, {}
        given, base, merged = base, as_pairs(base), as_pairs(merged)
        for name, start in base.items():
            delta = merged[name].to(accumulator_dtype(start.dtype)) - start
            m[name] = (1 - self.beta1) * delta + self.beta1 * first.get(name, torch.zeros_like(delta))
            v[name] = (1 - self.beta2) * delta.square() + self.beta2 * second.get(
                name, torch.full_like(delta, self.tau**2)
            )
            state[name] = start + self.learning_rate * m[name] / (v[name].sqrt() + self.tau)
        return from_pairs(state, given), {**with_prefix("m", m), **with_prefix("v", v)}
