"""The dynamic regulariser of FedDyn, on the client's side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.training.correction import Correction
from fedmerge.training.report import TrainingReport
from fedmerge.training.rules.local_rule import LocalRule

__all__ = ["DynamicRegularizer"]


@register("dynamic", paper="arXiv:2111.04263")
@dataclass(frozen=True)
class DynamicRegularizer(LocalRule):
    """Pull towards the model sent, less the gradient where the client ended last.

    ``gradient - h_i + alpha (theta - theta_0)``. Acar et al. 2021, algorithm 1: clients minimise
    ``L_i(theta) - <h_i, theta> + alpha / 2 ||theta - theta_0||^2``, and then keep
    ``h_i+ = h_i - alpha (theta - theta_0)``, which is the gradient of ``L_i`` there. It starts at zero.

    Parameters
    ----------
    alpha
        Strength, above zero.
    """

    alpha: float = 0.1

    name: ClassVar[str] = "dynamic"
    keeps: ClassVar[bool] = True

    def correction(self, sent: State, kept: State) -> Correction:
        """The pull, and ``-h_i``."""
        return Correction(self.alpha, {name: -own for name, own in kept.items()})

    def keep(self, moved: State, sent: State, kept: State, report: TrainingReport) -> dict[str, Tensor]:
        """``h_i+``."""
        return {n: kept[n] + self.alpha * tensor if n in kept else self.alpha * tensor for n, tensor in moved.items()}
