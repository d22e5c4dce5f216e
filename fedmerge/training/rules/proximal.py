"""The proximal term of FedProx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.training.correction import Correction
from fedmerge.training.rules.local_rule import LocalRule

__all__ = ["Proximal"]


@register("proximal", paper="arXiv:1812.06127")
@dataclass(frozen=True)
class Proximal(LocalRule):
    """Hold clients near the model that they were sent: ``gradient + mu (theta - theta_0)``.

    It travels as ``proximal-mu``, under which Flower's FedProx sends it and stock ClientApps know it.

    Parameters
    ----------
    mu
        Strength, zero or more.

    Examples
    --------
    >>> Proximal(0.1).told()
    {'proximal-mu': 0.1}
    """

    mu: float = 0.01

    name: ClassVar[str] = "proximal"

    def correction(self, sent: State, kept: State) -> Correction:
        """The pull towards the model sent."""
        return Correction(pull=self.mu)

    def told(self) -> Mapping[str, str | float]:
        """The setting of local training that is the same."""
        return {"proximal-mu": self.mu}
