"""What one client's local training did, for whoever has to normalise or record it."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.training.step_norm import norm_of_steps

__all__ = ["TrainingReport"]


@dataclass(frozen=True)
class TrainingReport:
    """Facts about one client's local training.

    Parameters
    ----------
    steps
        Optimiser steps (tau_i) that led to the model sent: those after the best, under early stopping, do not count.
    loss
        Mean training loss over the examples seen in them, without what a method adds.
    learning_rate, momentum, proximal_mu
        The constants of local SGD; momentum and proximal_mu are 0 for other optimisers.
    rate_share
        By how much a schedule within the round, or Nesterov's momentum, has changed how far the steps reach.
    """

    steps: int
    loss: float
    learning_rate: float = 0.0
    momentum: float = 0.0
    proximal_mu: float = 0.0
    rate_share: float = 1.0

    @property
    def reach(self) -> float:
        """``eta ||a||_1``: how far an equal gradient of one in every step would have moved a parameter.

        Examples
        --------
        >>> TrainingReport(4, 0.0, learning_rate=0.5).reach
        2.0
        """
        norm = norm_of_steps(self.steps, self.momentum, self.learning_rate * self.proximal_mu)
        return self.learning_rate * norm * self.rate_share
