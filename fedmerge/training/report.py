"""What one client's local training did, for whoever has to normalise or record it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TrainingReport"]


@dataclass(frozen=True)
class TrainingReport:
    """Facts about one client's local training.

    Parameters
    ----------
    steps
        Optimiser steps taken (tau_i).
    loss
        Mean training loss over the examples seen, without the proximal term.
    learning_rate, momentum, proximal_mu
        The constants of local SGD; momentum and proximal_mu are 0 for other optimisers.
    """

    steps: int
    loss: float
    learning_rate: float
    momentum: float = 0.0
    proximal_mu: float = 0.0
