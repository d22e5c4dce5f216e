"""GAMF: networks merged by graph matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedmerge.aggregators.aligning import Permuting
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.fairness import bounded
from fedmerge.matching.graph import match_graphs
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import register
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["GAMF"]


@register("gamf", paper="PMLR 162, Liu et al. 2022")
@dataclass(frozen=True)
class GAMF(Permuting):
    """Neurons as nodes and weights as edges of a graph, matched over all layers at once; then the average.

    Liu et al. 2022: affinities of edges are maximised under one permutation of each layer by graduated assignment,
    all clients going to a common graph. Affinities are computed layer by layer, never as the dense matrix of all
    pairs of edges; the soft matrices are rounded to permutations, which the authors' two-model solver leaves out.
    Heads of attention and groups of a norm are re-ordered as a whole and within.

    Parameters
    ----------
    hottest, coldest
        First and last temperature of Sinkhorn in standard deviations of the affinities, positive.
    steps
        Temperatures between, at least 1.
    iterations
        Of Sinkhorn at each temperature, at least 1.
    """

    hottest: float = 0.3
    coldest: float = 0.05
    steps: int = 6
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "coldest", 1e-12, float("inf"), open_high=True)
        check_range(self, "hottest", self.coldest, float("inf"), open_high=True)
        check_range(self, "steps", 1, float("inf"), open_high=True)
        check_range(self, "iterations", 1, float("inf"), open_high=True)

    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """Graduated assignment to a common graph."""
        states = bounded([context.trained(u.state, "GAMF") for u in updates])
        temperatures = np.geomspace(self.hottest, self.coldest, self.steps).tolist()
        weights = [u.weight for u in updates]
        return match_graphs(spec, states, weights, temperatures=temperatures, iterations=self.iterations)
