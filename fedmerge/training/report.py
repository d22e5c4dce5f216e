"""What one client's local training did, for whoever has to normalise or record it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedmerge.state import State

__all__ = ["TrainingReport", "norm_of_rates", "norm_of_steps"]


def norm_of_steps(steps: int, momentum: float, decay: float) -> float:
    """``||a||_1`` of so many steps at one learning rate; `decay` is the learning rate times proximal mu.

    Examples
    --------
    >>> norm_of_steps(3, 0.0, 0.0)
    3.0
    """
    rho = momentum
    if decay == 0 and rho == 0:
        return float(steps)
    if rho == 0:
        return -math.expm1(steps * math.log1p(-decay)) / decay
    if decay == 0 and 1 - rho > 1e-4:  # nearer to 1 the closed form cancels
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    position, velocity, norm = 0.0, 0.0, 0.0
    for step in range(steps):
        velocity = rho * velocity - decay * position + (1.0 if step == 0 else 0.0)
        position += velocity
        norm += abs(position)
    return norm


def norm_of_rates(
    rates: Sequence[float], momentum: float, proximal_mu: float, *, dampening: float = 0.0, nesterov: bool = False
) -> float:
    """``eta ||a||_1`` of steps at learning rates of their own: how far the gradients of all steps move the end.

    SGD is ``v <- rho v + (1 - dampening) d``, with ``d = g + mu u`` and u the way from the start, then ``u <- u - eta
    v``, or ``u - eta (d + rho v)`` under Nesterov; torch's first v is d undamped. Its adjoint, run from the last step
    to the first, gives every gradient's weight in one pass.

    Examples
    --------
    >>> norm_of_rates([0.1, 0.2], 0.0, 0.0)
    0.30000000000000004
    >>> round(norm_of_rates([1.0] * 4, 0.5, 0.0), 12) == norm_of_steps(4, 0.5, 0.0)
    True
    """
    of_place, of_speed, norm = 1.0, 0.0, 0.0
    for step in range(len(rates) - 1, -1, -1):
        rate, taken = rates[step], 1.0 if step == 0 else 1.0 - dampening
        of_new_speed = of_speed - rate * of_place * (momentum if nesterov else 1.0)
        of_direction = taken * of_new_speed - (rate * of_place if nesterov else 0.0)
        norm += abs(of_direction)
        of_place, of_speed = of_place + proximal_mu * of_direction, momentum * of_new_speed
    return norm


@dataclass(frozen=True)
class TrainingReport:
    """Facts about one client's local training.

    Parameters
    ----------
    steps
        Optimiser steps (tau_i) that led to the model sent: those after the best, under early stopping, do not count.
    loss
        Mean training loss over the examples seen in them, without what a method adds.
    learning_rate, momentum, proximal_mu
        The constants of local SGD; momentum and proximal_mu are 0 for other optimisers.
    rate_share
        By how much a schedule within the round, or Nesterov's momentum, has changed how far the steps reach.
    velocity
        SGD's momentum after the last step, by the names of parameters, where a method has clients keep it.
    """

    steps: int
    loss: float
    learning_rate: float = 0.0
    momentum: float = 0.0
    proximal_mu: float = 0.0
    rate_share: float = 1.0
    velocity: State = field(default_factory=dict, repr=False, compare=False)

    @property
    def reach(self) -> float:
        """``eta ||a||_1``: how far an equal gradient of one in every step would have moved a parameter.

        Examples
        --------
        >>> TrainingReport(4, 0.0, learning_rate=0.5).reach
        2.0
        """
        norm = norm_of_steps(self.steps, self.momentum, self.learning_rate * self.proximal_mu)
        return self.learning_rate * norm * self.rate_share
