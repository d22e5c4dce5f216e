"""How many optimiser steps a client took, and with which constants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Any, ClassVar

import torch
from torch import nn

from fedmerge.errors import InvalidOption
from fedmerge.registry import register
from fedmerge.state import LARGEST, State
from fedmerge.statistics.statistic_type import Batches, Shapes, Statistic
from fedmerge.training.report import TrainingReport

__all__ = ["LocalSteps", "check_proximal"]

_MOST_STEPS = 10_000_000  # more is a mistake, or an attack on whoever adds the steps up
_SPREAD = 30.0
_MOST_SHARE = 100.0
_NO_NUMBERS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)
_CONSTANTS = ("momentum", "learning_rate", "proximal_mu")


@register("local_steps")
@dataclass(frozen=True)
class LocalSteps(Statistic):
    """Local steps tau_i with momentum rho, learning rate eta and proximal mu: float64 scalars.

    The value has the keys ``local_steps``, ``momentum``, ``learning_rate`` and ``proximal_mu``; the last
    three are 0 where they are not given. A client whose learning rate changes within the round adds ``rate_share``, by
    how much that changes how far its steps reach.

    Parameters
    ----------
    rated
        Whether the learning rate is needed, so that an answer without one is no answer.

    Examples
    --------
    >>> LocalSteps().parse({"local_steps": 12, "momentum": 0.9})["momentum"].item()
    0.9
    """

    rated: bool = False

    name: ClassVar[str] = "local_steps"
    among_metrics: ClassVar[bool] = True
    looks_inside: ClassVar[bool] = False
    agreed: ClassVar[bool] = False

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Read the steps off the training report; no pass over the data."""
        if report is None:
            raise InvalidOption(
                "local_steps belong to a training run and cannot be measured on a finished model: "
                'pass them by hand, as {"local_steps": 120, "momentum": 0.9}, which a client puts among its metrics.'
            )
        constants = {name: getattr(report, name) for name in (*_CONSTANTS, "rate_share")}
        return self.parse({"local_steps": report.steps, **constants})

    def parse(self, value: Mapping[str, Any]) -> State:
        """Read steps and constants; `value` may hold other keys too, as a client's metrics do.

        Raises
        ------
        InvalidOption
            No ``local_steps``, fewer than one step, or a constant outside its range.
        """
        numbers = {"local_steps": math.nan, **dict.fromkeys(_CONSTANTS, 0.0), "rate_share": 1.0}
        for name, default in list(numbers.items()):
            try:
                number = value.get(name, default)
                if isinstance(number, bool | complex) or getattr(number, "dtype", None) in _NO_NUMBERS:
                    raise TypeError("flags and complex numbers count nothing")
                numbers[name] = float(number)
            except (RuntimeError, TypeError, ValueError) as error:
                raise InvalidOption(f"local_steps: {name} must be a number, got {value[name]!r}") from error
        if not 1 <= numbers["local_steps"] <= _MOST_STEPS:
            raise InvalidOption(
                f"local_steps must be at least 1 and at most {_MOST_STEPS}, got {value.get('local_steps')!r}"
            )
        if not 0 <= numbers["momentum"] < 1:
            raise InvalidOption(f"local_steps: momentum must lie in [0, 1), got {numbers['momentum']}")
        for name in ("learning_rate", "proximal_mu"):
            if not 0 <= numbers[name] <= LARGEST:  # NaN is not either
                raise InvalidOption(f"local_steps: {name} must lie in [0, {LARGEST:g}], got {numbers[name]}")
        if not 1 / _MOST_SHARE <= numbers["rate_share"] <= _MOST_SHARE:
            raise InvalidOption(
                f"local_steps: rate_share must lie between {1 / _MOST_SHARE:g} and {_MOST_SHARE:g}, got "
                f"{numbers['rate_share']}: a schedule within the round may not change the learning rate by more"
            )
        if numbers["rate_share"] == 1.0:
            del numbers["rate_share"]
        if self.rated and numbers["learning_rate"] == 0:
            raise InvalidOption(
                "local_steps: the method divides by the learning rate, which is not told: put learning_rate beside it"
            )
        check_proximal(numbers)
        return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Nothing: steps may come among other metrics."""

    def voted(self, shapes: Shapes) -> Shapes:
        """Nothing: a value always has the same names."""
        return {}

    def outlying(self, claims: Mapping[int, tuple[State, float]]) -> Mapping[int, str]:
        """Clients whose steps would scale the move of all: 30 times as many as is usual, by client and by example.

        Counted by what momentum makes of them, ``min(tau / (1 - rho), tau (tau + 1) / 2)``, which bounds their norm. Of
        the usual, which is the median client's, a client with many examples takes more steps, one with few more for
        each: nobody honest exceeds both by so much. Where the method divides by it, also those whose learning rate is
        30 times smaller than is usual.
        """
        reach = {client: _reach(steps) for client, (steps, _) in claims.items()}
        rates = {client: reach[client] / weight for client, (_, weight) in claims.items() if weight > 0}
        if not rates:
            return {}
        usual, rate = median_low(reach.values()), median_low(rates.values())
        slow = {
            client: f"statistic 'local_steps': its steps reach {reach[client]:g}, those of most clients {usual:g}"
            for client in rates
            if reach[client] > _SPREAD * usual and rates[client] > _SPREAD * rate
        }
        return {**self._too_slow(claims), **slow}

    def _too_slow(self, claims: Mapping[int, tuple[State, float]]) -> Mapping[int, str]:
        """Clients whose learning rate would blow up what is divided by it."""
        speeds = {client: float(steps["learning_rate"]) for client, (steps, _) in claims.items()} if self.rated else {}
        usual = median_low(speeds.values()) if speeds else 0.0
        return {
            client: f"statistic 'local_steps': its learning rate is {speed:g}, that of most clients {usual:g}"
            for client, speed in speeds.items()
            if speed * _SPREAD < usual
        }

    def check(self, value: State, state: State) -> None:
        """In their ranges."""
        self.parse(value)


def _reach(steps: State) -> float:
    tau, rho = float(steps["local_steps"]), float(steps["momentum"])
    return min(tau / (1 - rho), tau * (tau + 1) / 2) * float(steps.get("rate_share", 1.0))


def check_proximal(steps: Mapping[str, float]) -> None:
    """Check that a proximal term has a learning rate beside it and is not overshot by a step.

    Raises
    ------
    InvalidOption
        It has none, or ``eta mu >= 1``.
    """
    decay = steps["learning_rate"] * steps["proximal_mu"]
    if steps["proximal_mu"] > 0 and steps["learning_rate"] == 0:
        raise InvalidOption("local_steps: a proximal term (proximal_mu) needs the learning_rate beside it")
    if decay >= 1:
        raise InvalidOption(
            f"local_steps: learning_rate * proximal_mu = {decay:g} must stay below 1, or steps overshoot; lower either"
        )
