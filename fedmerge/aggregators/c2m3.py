"""C2M3: many models brought to one order of neurons at once, consistent around every cycle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedmerge.aggregators.aligning import Permuting
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.fairness import bounded
from fedmerge.matching.universe import match_universe
from fedmerge.matching.weight_costs import match_many
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import register
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["C2M3"]


@register("c2m3", paper="arXiv:2405.17897")
@dataclass(frozen=True)
class C2M3(Permuting):
    """All clients matched to a common universe of neurons by Frank-Wolfe over all layers at once; then the average.

    Crisostomi et al. 2024. Client i gets permutations P_i into the universe, so the map from j to i is
    ``P_i^T P_j`` and going around a cycle changes nothing. Pairs weigh by their clients' examples. It starts at the
    result of weight matching, where the authors start at the identity, and needs fewer steps.

    Parameters
    ----------
    steps
        Of Frank-Wolfe, at most; 0 is weight matching to the mean.
    tolerance
        Relative gain of the objective below which it stops, at least 0.
    """

    steps: int = 50
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "steps", 0, float("inf"), open_high=True)
        check_range(self, "tolerance", 0.0, 1.0)

    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """Weight matching, then Frank-Wolfe from there."""
        states = bounded([context.trained(u.state, "C2M3") for u in updates])
        weights = [u.weight for u in updates]
        start = match_many(spec, states, weights, generator=context.torch_generator("c2m3"))
        return match_universe(spec, states, weights, start, steps=self.steps, tolerance=self.tolerance)
