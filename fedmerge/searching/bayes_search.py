"""Bayesian optimisation of a few coefficients, candidate by candidate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedmerge.searching.extra import imported
from fedmerge.searching.search import Judged, PointSearch, Problem, Trial

__all__ = ["BayesSearch"]


@dataclass(frozen=True)
class BayesSearch:
    """Samplers of ``optuna`` over a box.

    Parameters
    ----------
    evaluations
        Candidates in all.
    low, high
        The box, the same for every number.
    sampler
        ``"gp"``: a Gaussian process and expected improvement; ``"tpe"``: Parzen estimators, quicker and coarser.
    """

    evaluations: int
    low: float
    high: float
    sampler: Literal["gp", "tpe"] = "gp"

    def search(
        self, problem: Problem, genome: Tensor, decoded: Callable[[Tensor], Tensor] = lambda genomes: genomes
    ) -> PointSearch:
        """Yield the start, then one candidate at a time.

        Parameters
        ----------
        problem
            Its start is what `genome` stands for.
        genome
            [m], within the box.
        decoded
            Coefficients [n, k] of genomes [n, m].
        """
        optuna = imported("optuna", "a search by Bayesian optimisation")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study, axes = self._study(optuna, problem.seed), [f"x{i:04d}" for i in range(len(genome))]
        box = {axis: optuna.distributions.FloatDistribution(self.low, self.high) for axis in axes}
        tried = genome.double()
        for _ in range(self.evaluations + 1):
            judged: Judged = yield Trial(decoded(tried[None]))
            value = min(float(judged.values.nan_to_num(nan=math.inf)[0]), 1e30)
            values = dict(zip(axes, tried.clamp(self.low, self.high).tolist(), strict=True))
            study.add_trial(optuna.trial.create_trial(params=values, distributions=box, value=value))
            if not axes:
                return
            asked = study.ask(box)
            tried = torch.tensor([asked.params[axis] for axis in axes], dtype=torch.float64)
            study.tell(asked, state=optuna.trial.TrialState.FAIL)  # its value is added above, as the first one's is

    def _study(self, optuna: Any, seed: int) -> Any:
        number = seed % 2**32
        sampler = (
            optuna.samplers.GPSampler(seed=number, n_startup_trials=min(5, 1 + self.evaluations // 3))
            if self.sampler == "gp"
            else optuna.samplers.TPESampler(seed=number, n_startup_trials=min(10, 1 + self.evaluations // 3))
        )
        return optuna.create_study(sampler=sampler)
