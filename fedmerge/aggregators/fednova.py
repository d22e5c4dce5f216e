"""FedNova: normalised averaging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fedmerge.aggregators.aggregator import Fold
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.server_steps import ServerMomentum
from fedmerge.state import State, WeightedSum, accumulator_dtype
from fedmerge.statistics import LocalSteps, Statistic
from fedmerge.statistics.local_steps import check_proximal
from fedmerge.training.report import norm_of_steps
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["FedNova", "step_norm"]


@dataclass
class _Total:
    """``sum_i (n_i / a_i) (theta_i - theta_0)``, ``sum_i n_i`` and ``sum_i n_i tau_i``."""

    normalised: WeightedSum = field(default_factory=WeightedSum)
    examples: float = 0.0
    effective: float = 0.0


@register("fednova", paper="arXiv:2007.07481")
@dataclass(frozen=True)
class FedNova(Fold[_Total]):
    """Average of the clients' updates, each divided by how far its local steps could carry it.

    Wang et al. 2020, eq. 6: ``theta+ = theta_0 - tau_eff * sum_i p_i (theta_0 - theta_i) / a_i``, where
    ``a_i = ||a_i||_1`` is the norm of client i's local step coefficients, see :func:`step_norm`. With equal
    ``a_i`` it is FedAvg. Buffers of batch norm are averaged as they are: only steps are normalised.

    Parameters
    ----------
    tau_eff
        Effective number of steps: ``"mean_norm"`` is ``sum_i p_i a_i`` (one client gives its own model),
        ``"mean_steps"`` is ``sum_i p_i tau_i`` (what the authors' code takes when there is a proximal term),
        a number is taken as it is.
    server_momentum
        Momentum of the server on the normalised update, in [0, 1); ``gmf`` in the authors' code.
    """

    separable = "tensor"
    tau_eff: float | Literal["mean_norm", "mean_steps"] = "mean_norm"
    server_momentum: float = 0.0

    requires_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "server_momentum", 0.0, 1.0, open_high=True)
        if isinstance(self.tau_eff, str):
            if self.tau_eff not in ("mean_norm", "mean_steps"):
                raise InvalidOption(
                    f'FedNova: tau_eff: want "mean_norm", "mean_steps" or a number, got {self.tau_eff!r}'
                )
        else:
            check_range(self, "tau_eff", 0.0, math.inf, open_high=True)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Local steps, with the constants of the local optimiser."""
        return (LocalSteps(),)

    def zero(self, context: MergeContext) -> _Total:
        """No client yet."""
        return _Total()

    def add(self, total: _Total, update: ClientUpdate, context: MergeContext) -> _Total:
        """Add one client's normalised update."""
        total.normalised.add(_moved(update.state, context), self._count(total, update))
        return total

    def add_stacked(self, total: _Total, updates: StackedUpdates, context: MergeContext) -> _Total:
        """Add many clients' normalised updates."""
        shares = [self._count(total, update) for update in updates]
        total.normalised.add_stacked(_moved(updates.states, context), shares)
        return total

    def join(self, total: _Total, other: _Total) -> _Total:
        """Add the sums."""
        total.normalised.join(other.normalised)
        total.examples += other.examples
        total.effective += other.effective
        return total

    def _count(self, total: _Total, update: ClientUpdate) -> float:
        """Count one client's examples and steps; ``n_i / a_i``."""
        steps = {name: float(value) for name, value in update.statistic("local_steps").items()}
        norm = step_norm(steps)
        total.examples += update.weight
        total.effective += update.weight * (steps["local_steps"] if self.tau_eff == "mean_steps" else norm)
        return update.weight / norm

    def finish(self, total: _Total, context: MergeContext, memory: State) -> tuple[State, State]:
        """Scale the normalised sum by tau_eff, and step."""
        base = context.required_base("fednova")
        tau_eff = total.effective / total.examples if isinstance(self.tau_eff, str) else self.tau_eff
        scale = tau_eff / total.examples
        merged = {name: base[name] + tensor.mul_(scale) for name, tensor in total.normalised.tensors.items()}
        if self.server_momentum == 0.0:
            return merged, {}
        return ServerMomentum(self.server_momentum).step(base, merged, memory)


def _moved(state: State, context: MergeContext) -> dict[str, Tensor]:
    """How far parameters have moved, taken before the sum: the parameters themselves would swamp small updates."""
    base = context.required_base("fednova")
    return {name: tensor.to(accumulator_dtype(tensor.dtype)) - base[name] for name, tensor in state.items()}


def step_norm(steps: Mapping[str, float]) -> float:
    """``||a||_1`` of one client: how much one unit of gradient in every local step moves it, over eta.

    Local SGD with momentum rho and proximal mu is a linear recursion in the gradients:
    ``v <- rho v + g + mu u``, ``u <- u + eta v`` (signs aside), so ``a_k`` is what an impulse at step k has
    become at step tau, and the norm is the sum of the impulse response. Closed forms (paper, section 4.2)
    where one of rho and mu is zero: plain ``tau``; momentum ``[tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho)``;
    proximal ``(1 - (1 - eta mu)^tau) / (eta mu)``.

    Parameters
    ----------
    steps
        ``local_steps``, ``momentum``, ``learning_rate`` and ``proximal_mu``, as
        :class:`~fedmerge.statistics.LocalSteps` measures them, and the ``rate_share`` of a schedule within the round.

    Raises
    ------
    InvalidOption
        A proximal term without a learning rate, or one that the steps overshoot (``eta mu >= 1``).

    Examples
    --------
    >>> step_norm({"local_steps": 3, "momentum": 0.0, "learning_rate": 0.1, "proximal_mu": 0.0})
    3.0
    """
    check_proximal(steps)
    decay = steps["learning_rate"] * steps["proximal_mu"]
    return norm_of_steps(int(steps["local_steps"]), steps["momentum"], decay) * steps.get("rate_share", 1.0)
