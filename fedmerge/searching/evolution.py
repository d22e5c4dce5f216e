"""Searches by evolution: generations of candidates, all of one generation judged in one exchange."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.searching.extra import imported
from fedmerge.searching.search import Judged, PointSearch, Problem, Trial

__all__ = ["Evolution"]

Penalty = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evolution:
    """CMA-ES (Hansen 2016, arXiv:1604.00772), by the library ``cma``.

    Parameters
    ----------
    evaluations
        Candidates in all; the last generation may be cut short.
    sigma
        Initial standard deviation, in units of the genome.
    population
        Candidates of a generation; ``4 + floor(3 ln m)`` where not given.
    low, high
        Bounds of every number of the genome; none where not given.
    """

    evaluations: int
    sigma: float
    population: int | None = None
    low: float | None = None
    high: float | None = None

    def search(
        self,
        problem: Problem,
        genome: Tensor,
        decoded: Callable[[Tensor], Tensor] = lambda genomes: genomes,
        penalty: Penalty | None = None,
    ) -> PointSearch:
        """Yield the start, then generations.

        Parameters
        ----------
        problem
            Its start is what `genome` stands for.
        genome
            [m], the first mean.
        decoded
            Coefficients [n, k] of genomes [n, m].
        penalty
            [n], of genomes, added to losses.
        """

        def trial(genomes: Tensor) -> Trial:
            return Trial(decoded(genomes), None, None if penalty is None else penalty(genomes))

        yield trial(genome[None])
        strategy = self._strategy(genome, problem.seed)
        left = self.evaluations
        while left > 0 and not strategy.stop():
            asked = strategy.ask()
            genomes = torch.from_numpy(np.stack(asked))[:, : len(genome)]
            sent = trial(genomes[:left])
            judged: Judged = yield sent
            left -= len(genomes)
            if len(judged.values) < len(genomes):
                return
            values = judged.values if sent.penalties is None else judged.values + sent.penalties
            strategy.tell(asked, values.nan_to_num(nan=math.inf, posinf=1e30).clamp(max=1e30).tolist())

    def _strategy(self, genome: Tensor, seed: int) -> Any:
        """The library's optimiser, with random numbers of its own: it would seed NumPy's global ones otherwise."""
        random = np.random.default_rng(seed)
        start = genome.double().numpy()
        if len(start) == 1:  # the library wants two numbers at least; the other is never looked at
            start = np.concatenate([start, [0.0]])
        options: dict[str, Any] = {
            "seed": np.nan,
            "randn": lambda *shape: random.standard_normal(shape),
            "verbose": -9,
            "bounds": [self.low, self.high],
        }
        if self.population is not None:
            options["popsize"] = self.population
        return imported("cma", "a search by CMA-ES").CMAEvolutionStrategy(start, self.sigma, options)
