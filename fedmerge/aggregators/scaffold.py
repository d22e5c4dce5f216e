"""SCAFFOLD: averaging of clients whose gradients are corrected by control variates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fedmerge.aggregators.aggregator import Fold
from fedmerge.aggregators.fednova import step_norm
from fedmerge.aggregators.population import check_population, population_of
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum, accumulator_dtype
from fedmerge.statistics import LocalSteps, Statistic
from fedmerge.training.rules.control_variates import ControlVariates
from fedmerge.training.rules.local_rule import LocalRule
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["Scaffold"]


@dataclass
class _Total:
    """``sum_i w_i (y_i - x)``, ``sum_i w_i (x - y_i) / (K_i eta_i)``, and how many clients they are of."""

    moved: WeightedSum = field(default_factory=WeightedSum)
    gradients: WeightedSum = field(default_factory=WeightedSum)
    clients: int = 0


@register("scaffold", paper="arXiv:1910.06378")
@dataclass(frozen=True)
class Scaffold(Fold[_Total]):
    """Average of clients that corrected each gradient by how theirs differ from all clients'.

    Karimireddy et al. 2020, algorithm 1 with option II. Clients step along ``g_i(y) - c_i + c``, see
    :class:`~fedmerge.training.rules.ControlVariates`; then ``x+ = x + server_lr / |S| sum_i (y_i - x)`` and
    ``c+ = c + 1 / N sum_i (c_i+ - c_i)`` over the clients S of the round, of N in all. Since ``c_i+ - c_i`` is
    ``(x - y_i) / (K eta) - c``, clients send no more than their model and steps; c goes out beside the model, and c_i
    never leaves its client. Every client counts the same, as in the paper. A client whose update is lost or dropped is
    told so with the next order, and takes back what its c_i moved, for c has not: c stays the mean of all c_i.

    Parameters
    ----------
    server_lr
        Step of the server on the mean update (eta_g).
    weighted
        Whether clients count by their examples: in the mean, and in c by ``n_i / mean n`` of the round.
    population
        N; None takes the clients that are known, of which a deployment may lose sight of some.
    """

    server_lr: float = 1.0
    weighted: bool = False
    population: int | None = None

    requires_base: ClassVar[bool] = True
    counts_clients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "server_lr", 0.0, math.inf, open_high=True)
        check_population(self)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Local steps, with the learning rate that control variates divide by."""
        return (LocalSteps(rated=True),)

    @property
    def local_rule(self) -> LocalRule:
        """The clients' control variates."""
        return ControlVariates()

    def sent_with_model(self, memory: State) -> State:
        """c."""
        return memory

    def zero(self, context: MergeContext) -> _Total:
        """No client yet."""
        return _Total()

    def add(self, total: _Total, update: ClientUpdate, context: MergeContext) -> _Total:
        """Add one client."""
        weight, share = self._counted(update)
        moved = _moved(update.state, context)
        total.moved.add(moved, weight)
        total.gradients.add(moved, share)
        total.clients += 1
        return total

    def add_stacked(self, total: _Total, updates: StackedUpdates, context: MergeContext) -> _Total:
        """Add many clients."""
        weights, shares = zip(*map(self._counted, updates), strict=True)
        moved = _moved(updates.states, context)
        total.moved.add_stacked(moved, weights)
        total.gradients.add_stacked(moved, shares)
        total.clients += len(updates)
        return total

    def join(self, total: _Total, other: _Total) -> _Total:
        """Add the sums."""
        total.moved.join(other.moved)
        total.gradients.join(other.gradients)
        total.clients += other.clients
        return total

    def _counted(self, update: ClientUpdate) -> tuple[float, float]:
        """A client's weight, and its share ``-w_i / (K_i eta_i)`` in the sum of mean gradients."""
        steps = {name: float(value) for name, value in update.statistic("local_steps").items()}
        weight = update.weight if self.weighted else 1.0
        return weight, -weight / (steps["learning_rate"] * step_norm(steps))

    def finish(self, total: _Total, context: MergeContext, memory: State) -> tuple[State, State]:
        """Step x along the mean update, and c along the mean change of the control variates."""
        base, everyone = context.required_base("scaffold"), population_of(self, context, total.clients)
        scale, taken = self.server_lr / total.moved.weight, total.clients / everyone
        variates: dict[str, Tensor] = {}
        for name, gradients in total.gradients.tensors.items():
            variates[name] = gradients * (taken / total.moved.weight)
            if name in memory:
                variates[name] += memory[name] * (1 - taken)
        merged = {name: base[name] + tensor.mul_(scale) for name, tensor in total.moved.tensors.items()}
        return merged, variates


def _moved(state: State, context: MergeContext) -> dict[str, Tensor]:
    """How far parameters have moved, taken before the sum."""
    base = context.required_base("scaffold")
    return {name: tensor.to(accumulator_dtype(tensor.dtype)) - base[name] for name, tensor in state.items()}
