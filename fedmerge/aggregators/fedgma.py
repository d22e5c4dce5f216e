"""FedGMA: gradient masked averaging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.aggregators.task_vector_fold import CoordinateFold, Sums
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register

__all__ = ["FedGMA"]


@register("fedgma", paper="arXiv:2201.11986")
@dataclass(frozen=True)
class FedGMA(CoordinateFold):
    """Mean update, made smaller in coordinates where the clients do not agree on its sign.

    Tenison et al. 2023, with ``tau_i = theta_i - theta_0`` and ``p_i = n_i / sum_j n_j``: ``theta+ = theta_0 + scale *
    m o sum_i p_i tau_i``; the agreement ``A = |sum_i p_i sign(tau_i)|`` in [0, 1] of a coordinate is its factor m
    where it is below `threshold`, else m is 1. Clients vote by their examples, as they count in the mean.

    Parameters
    ----------
    scale
        The server's learning rate.
    threshold
        How much agreement is enough for the whole mean, in [0, 1]; 0 is FedAvg, and so is any where all agree. The
        paper tries 0.1 to 0.9.

    Examples
    --------
    >>> import torch
    >>> from fedmerge import ClientUpdate, MergeContext
    >>> sent = [ClientUpdate(i, {"w": torch.tensor([1.0, v])}) for i, v in enumerate((8.0, 8.0, -4.0))]
    >>> FedGMA(threshold=0.4).merge(sent, MergeContext(base={"w": torch.zeros(2)}), {})[0]["w"]
    tensor([1.0000, 1.3333])
    """

    separable = "tensor"
    threshold: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "threshold", 0.0, 1.0)

    @property
    def kept(self) -> int:
        """The sum, and that of the signs."""
        return 2

    def include(self, sums: Sequence[Tensor], piece: Tensor, weight: float) -> None:
        """Add ``n_i sign(tau_i)`` and ``n_i tau_i``."""
        sums[1] += piece.sign().mul_(weight)
        sums[0] += piece.mul_(weight)

    def combine(self, sums: Sequence[Tensor], total: Sums) -> Tensor:
        """The mean, times the agreement where that is low."""
        agreement = sums[1].abs() / total.weight
        # Weights that add up to 0.3 in one order give 0.29999998 in another, and a count must not fall between.
        enough = agreement >= self.threshold - 1e-6
        return sums[0] / total.weight * torch.where(enough, torch.ones_like(agreement), agreement)
