"""FedProx: averaging of clients that are held near the model they were sent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.training.rules.local_rule import LocalRule
from fedmerge.training.rules.proximal import Proximal

__all__ = ["FedProx"]


@register("fedprox", paper="arXiv:1812.06127")
@dataclass(frozen=True)
class FedProx(FedAvg):
    """Average of clients that trained with a proximal term, weighted by their examples.

    Li et al. 2020, algorithm 2: client i minimises ``F_i(theta) + mu / 2 ||theta - theta_0||^2`` from the model
    theta_0 that it was sent. The server averages, so all of the method lies in the clients' training: mu goes out with
    every model as ``proximal-mu``, as Flower's FedProx sends it. ClientApps of ours train with it; one of your own has
    to read it.

    Parameters
    ----------
    proximal_mu
        mu, zero or more; at 0 it is FedAvg.

    Examples
    --------
    >>> FedProx(proximal_mu=0.1).local_rule.told()
    {'proximal-mu': 0.1}
    """

    proximal_mu: float = 0.01

    def __post_init__(self) -> None:
        check_range(self, "proximal_mu", 0.0, math.inf, open_high=True)

    @property
    def local_rule(self) -> LocalRule:
        """The proximal term."""
        return Proximal(self.proximal_mu)
