"""Fisher merging: averaging parameter by parameter, weighted by how sure each client is of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmerge.aggregators.aggregator import Fold, Separable
from fedmerge.curvature.collected import DiagonalSum
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import FisherDiag, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Fisher"]


@register("fisher", paper="arXiv:2111.09832")
@dataclass(frozen=True)
class Fisher(Fold[DiagonalSum]):
    """Average of parameters, each weighted by the client's Fisher information of it.

    Matena and Raffel 2022, eq. 2: ``theta_j = sum_i p_i F_ij theta_ij / sum_i p_i F_ij`` with the diagonal
    Fisher F_i, weighted by examples. Where no client has information, and for parameters without any
    measured, it is the average. Equal Fishers give FedAvg, and every coordinate stays within the clients'.

    Parameters
    ----------
    damping
        Information added to all alike, in units of the tensor's mean, at least 0: more draws towards the
        average. The authors' floor of 1e-6 is absolute, and so depends on the scale of the loss.
    normalize
        Divide each client's Fisher by its norm to this power, in [0, 1]. 1 as in the authors' code, where
        models are of different tasks; 0 keeps that an unsure client counts for more.
    """

    damping: float = 1e-6
    normalize: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "damping", 0.0, float("inf"), open_high=True)
        check_range(self, "normalize", 0.0, 1.0)

    @property
    def separable(self) -> Separable:
        """One scale for all of a client's entries, where they are scaled, is a look at the whole model."""
        return "never" if self.normalize else "tensor"

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The diagonal Fisher."""
        return (FisherDiag(),)

    def zero(self, context: MergeContext) -> DiagonalSum:
        """No client yet."""
        return DiagonalSum()

    def add(self, total: DiagonalSum, update: ClientUpdate, context: MergeContext) -> DiagonalSum:
        """Add one client's parameters, times its Fisher and its examples."""
        information = update.statistic("fisher_diag")
        norm = math.sqrt(sum(float(f.double().square().sum()) for f in information.values()))
        total.add(update.state, information, update.weight, norm**-self.normalize if norm > 0 else 1.0)
        return total

    def join(self, total: DiagonalSum, other: DiagonalSum) -> DiagonalSum:
        """Add the sums."""
        total.join(other)
        return total

    def finish(self, total: DiagonalSum, context: MergeContext, memory: State) -> tuple[State, State]:
        """Divide."""
        return total.minimum(self.damping), {}
