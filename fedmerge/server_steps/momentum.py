"""Momentum on the server."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.server_steps.server_step import ServerStep
from fedmerge.state import State, accumulator_dtype

__all__ = ["ServerMomentum"]


@register("server_momentum", paper="arXiv:1909.06335", alone="fedavgm")
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
