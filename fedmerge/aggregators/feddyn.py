"""FedDyn: averaging of clients whose losses are regularised so that they agree where the federation's loss ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fedmerge.aggregators.aggregator import Fold
from fedmerge.aggregators.population import check_population, population_of
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum, accumulator_dtype
from fedmerge.training.rules.dynamic import DynamicRegularizer
from fedmerge.training.rules.local_rule import LocalRule
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["FedDyn"]


@dataclass
class _Total:
    """``sum_i (theta_i - theta_0)``, and how many clients it is of."""

    moved: WeightedSum = field(default_factory=WeightedSum)
    clients: int = 0


@register("feddyn", paper="arXiv:2111.04263")
@dataclass(frozen=True)
class FedDyn(Fold[_Total]):
    """Average of clients that trained with a dynamic regulariser, less what all clients have been held back by.

    Acar et al. 2021, algorithm 1. Clients train as :class:`~fedmerge.training.rules.DynamicRegularizer` says; then
    ``h+ = h - alpha / m sum_i (theta_i - theta_0)`` over the clients P of the round, of m in all, and
    ``theta+ = 1 / |P| sum_i theta_i - h+ / alpha``. Where clients minimise their regularised loss to the end, a fixed
    point is a stationary point of the mean of all clients' losses. Every client counts the same, as in the paper.
    Clients send their model alone, and what they keep never leaves them.

    Parameters
    ----------
    alpha
        Strength of the regulariser, above zero; the paper takes 0.1, 0.01 or 0.001.
    population
        m; None takes the clients that are known, of which a deployment may lose sight of some.
    """

    alpha: float = 0.1
    population: int | None = None

    requires_base: ClassVar[bool] = True
    counts_clients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, math.inf, open_high=True)
        if self.alpha == 0:
            raise InvalidOption("FedDyn: alpha must be above 0, for the server divides by it; without it take fedavg")
        check_population(self)

    @property
    def local_rule(self) -> LocalRule:
        """The clients' regulariser."""
        return DynamicRegularizer(self.alpha)

    def zero(self, context: MergeContext) -> _Total:
        """No client yet."""
        return _Total()

    def add(self, total: _Total, update: ClientUpdate, context: MergeContext) -> _Total:
        """Add one client."""
        total.moved.add(_moved(update.state, context), 1.0)
        total.clients += 1
        return total

    def add_stacked(self, total: _Total, updates: StackedUpdates, context: MergeContext) -> _Total:
        """Add many clients."""
        total.moved.add_stacked(_moved(updates.states, context), [1.0] * len(updates))
        total.clients += len(updates)
        return total

    def join(self, total: _Total, other: _Total) -> _Total:
        """Add the sums."""
        total.moved.join(other.moved)
        total.clients += other.clients
        return total

    def finish(self, total: _Total, context: MergeContext, memory: State) -> tuple[State, State]:
        """Step h, then the mean less ``h / alpha``."""
        base, everyone = context.required_base("feddyn"), population_of(self, context, total.clients)
        merged: dict[str, Tensor] = {}
        held: dict[str, Tensor] = {}
        for name, moved in total.moved.tensors.items():
            held[name] = moved * (-self.alpha / everyone)
            if name in memory:
                held[name] += memory[name]
            merged[name] = base[name] + moved / total.clients - held[name] / self.alpha
        return merged, held


def _moved(state: State, context: MergeContext) -> dict[str, Tensor]:
    """How far parameters have moved, taken before the sum."""
    base = context.required_base("feddyn")
    return {name: tensor.to(accumulator_dtype(tensor.dtype)) - base[name] for name, tensor in state.items()}
