"""Searches that follow slopes: one model is judged at a time, and its slopes say where the next one lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedmerge.searching.search import PointSearch, Problem, Trial
from fedmerge.statistics import Statistic

__all__ = ["Descent"]


@dataclass(frozen=True)
class Descent:
    """AdamW on coefficients.

    Parameters
    ----------
    evaluations
        Steps, each of which takes one gradient.
    learning_rate
        Of the first step, in units of the coefficients.
    weight_decay
        Decoupled, as in AdamW.
    cosine
        Whether the learning rate falls to 0 along half a cosine, or stays as it is.
    low, high
        Between which coefficients are kept after each step; anything where not given.
    """

    evaluations: int
    learning_rate: float
    weight_decay: float = 0.0
    cosine: bool = False
    low: float | None = None
    high: float | None = None

    def search(self, problem: Problem, slopes: Statistic) -> PointSearch:
        """Yield the start and the point after each step; `slopes` measures the objective and its slopes."""
        x = problem.start.double().clone()
        optimizer = torch.optim.AdamW([x], lr=self.learning_rate, weight_decay=self.weight_decay)
        judged = yield Trial(x[None].clone(), slopes)
        for step in range(self.evaluations):
            if judged.slopes is None or not bool(judged.slopes.isfinite().all()):  # beyond is nothing to follow
                return
            optimizer.param_groups[0]["lr"] = self.learning_rate * self._share(step)
            x.grad = judged.slopes.to(x)
            optimizer.step()
            if self.low is not None or self.high is not None:
                x.clamp_(self.low, self.high)
            judged = yield Trial(x[None].clone(), slopes)

    def _share(self, step: int) -> float:
        """Of the learning rate, in one of the steps."""
        return (1 + math.cos(math.pi * step / self.evaluations)) / 2 if self.cosine else 1.0
