"""Norm clipping, by a fixed bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fedmerge.aggregators.aggregator import Fold
from fedmerge.aggregators.pieces import squared_norm
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum, accumulator_dtype
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["NormClipping", "clipped"]


@register("norm_clipping", paper="arXiv:1911.07963")
@dataclass(frozen=True)
class NormClipping(Fold[WeightedSum]):
    """Average of the clients' updates, none longer than a bound.

    Sun et al. 2019, section 4: ``theta+ = base + sum_i p_i delta_i / max(1, ||delta_i|| / bound)`` with
    ``delta_i = theta_i - base`` and ``p_i = n_i / sum_j n_j``. It stops clients that shout, not those that lie at
    the others' volume.

    Parameters
    ----------
    bound
        M, the largest Euclidean norm of an update over all its tensors, positive, in units of parameters. Where
        none is known, ``median_norm_clipping`` takes the clients' own.

    Examples
    --------
    >>> import torch
    >>> base = {"w": torch.zeros(1)}
    >>> sent = [ClientUpdate(0, {"w": torch.tensor([0.5])}), ClientUpdate(1, {"w": torch.tensor([-1e6])})]
    >>> NormClipping(bound=1.0).merge(sent, MergeContext(base=base), {})[0]["w"]
    tensor([-0.2500])
    """

    requires_base: ClassVar[bool] = True

    bound: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "bound", 1e-30, math.inf, open_high=True)

    def zero(self, context: MergeContext) -> WeightedSum:
        """No update."""
        return WeightedSum()

    def add(self, total: WeightedSum, update: ClientUpdate, context: MergeContext) -> WeightedSum:
        """Add one clipped update."""
        base = context.required_base("norm_clipping")
        total.add(clipped(update.state, base, self.bound), update.weight)
        return total

    def join(self, total: WeightedSum, other: WeightedSum) -> WeightedSum:
        """Add the sums."""
        total.join(other)
        return total

    def finish(self, total: WeightedSum, context: MergeContext, memory: State) -> tuple[State, State]:
        """Step by the mean update."""
        base = context.required_base("norm_clipping")
        return {name: base[name] + step for name, step in total.mean().items()}, {}


def clipped(state: State, base: State, bound: float, norm: float | None = None) -> State:
    """``state - base`` scaled to a norm of at most `bound`; `norm` is its norm, where it is known."""
    norm = math.sqrt(squared_norm(state, base)) if norm is None else norm
    factor = min(1.0, bound / norm) if norm else 1.0
    return {name: (t.to(accumulator_dtype(t.dtype)) - base[name]) * factor for name, t in state.items()}
