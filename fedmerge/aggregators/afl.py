"""Analytic federated learning: one exact ridge regression for a head."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register

__all__ = ["Afl"]


@register("afl", paper="arXiv:2405.16240")
@dataclass(frozen=True)
class Afl(FedAvg):
    """An exact ridge regression as head, the same for every division of the data; what lies below is averaged.

    He et al. 2025, with frozen layers below the head, which is what makes a single round enough. Where clients train
    these layers too, the regression is on the features of their average. See
    :class:`~fedmerge.refine.analytic_head.AnalyticHead`. Clients can be asked or it is refused.

    Parameters
    ----------
    ridge, scale
        See there.

    Examples
    --------
    >>> Afl().refined_by
    'analytic_head(ridge=0.001,scale=1.0)'
    """

    ridge: float = 1e-3
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "ridge", 1e-12, float("inf"), open_high=True)
        check_range(self, "scale", 1e-12, float("inf"), open_high=True)

    @property
    def refined_by(self) -> str:
        """The regression."""
        return f"analytic_head(ridge={self.ridge!r},scale={self.scale!r})"
