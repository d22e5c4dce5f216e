"""Uncertainty-based gradient matching: task vectors weighted by curvature, that of the base included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedmerge.aggregators.aggregator import Fold
from fedmerge.curvature.collected import DiagonalSum
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State, accumulator_dtype
from fedmerge.statistics import FisherDiag, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["GradientMatching"]


@register("gradient_matching", paper="arXiv:2310.12808")
@dataclass(frozen=True)
class GradientMatching(Fold[DiagonalSum]):
    """Updates weighted by the clients' curvature and by what the base has already learnt.

    Daheim et al. 2024, eq. 12, diagonal: ``theta = theta_0 + sum_t a_t (H_0 + delta + H_t) tau_t / Hbar`` with
    ``tau_t = theta_t - theta_0`` and ``Hbar = H_0 + delta + sum_t a_t H_t``. Here H_t is client t's Fisher per
    example and a_t = scale * p_t. In a federation the base was made in the rounds before, so H_0 is kept on the
    server: ``H_0 <- keep * H_0 + sum_t p_t H_t`` after each round, 0 in the first. There it is Fisher merging;
    equal curvature gives FedAvg, and a much larger H_0 does too.

    Parameters
    ----------
    scale
        Factor on the weights p_t, positive: the scale of the merged task vector.
    delta
        Prior curvature, in units of each tensor's mean of ``sum_t a_t H_t``, at least 0.
    keep
        How much of H_0 outlives a round, in [0, 1]; 0 forgets it.
    """

    separable = "tensor"
    scale: float = 1.0
    delta: float = 1e-6
    keep: float = 1.0

    requires_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "scale", 1e-12, float("inf"), open_high=True)
        check_range(self, "delta", 0.0, float("inf"), open_high=True)
        check_range(self, "keep", 0.0, 1.0)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The diagonal Fisher."""
        return (FisherDiag(),)

    def zero(self, context: MergeContext) -> DiagonalSum:
        """No client yet."""
        return DiagonalSum()

    def add(self, total: DiagonalSum, update: ClientUpdate, context: MergeContext) -> DiagonalSum:
        """Add one client's task vector, and it times the client's Fisher."""
        base = context.required_base("gradient_matching")
        moved = {name: tensor.to(accumulator_dtype(tensor.dtype)) - base[name] for name, tensor in update.state.items()}
        total.add(moved, update.statistic("fisher_diag"), update.weight)
        return total

    def join(self, total: DiagonalSum, other: DiagonalSum) -> DiagonalSum:
        """Add the sums."""
        total.join(other)
        return total

    def finish(self, total: DiagonalSum, context: MergeContext, memory: State) -> tuple[State, State]:
        """Divide by the curvature of all, and remember it."""
        base, weight = context.required_base("gradient_matching"), total.states.weight
        common = total.common()
        moves = total.states.mean()  # sum_t p_t tau_t
        merged = {name: base[name] + self.scale * move for name, move in moves.items()}
        known = {name: h.to(moves[name].dtype) for name, h in memory.items() if name in moves and name not in common}
        for name in common:
            clients = total.information[name] / weight  # sum_t p_t H_t
            pulled = total.weighted[name] / weight  # sum_t p_t H_t tau_t
            before = memory[name].double() if name in memory else torch.zeros_like(clients)
            prior = before + self.delta * self.scale * (clients.mean() if clients.numel() else 0.0)
            curvature = prior + self.scale * clients
            move = self.scale * (prior * moves[name].double() + pulled) / torch.where(curvature > 0, curvature, 1.0)
            merged[name] = torch.where(curvature > 0, base[name].double() + move, merged[name].double())
            known[name] = (self.keep * before + clients).to(moves[name].dtype)
        return merged, known
