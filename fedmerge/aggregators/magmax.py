"""MagMax: the largest change of any client in every coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.aggregators.task_vector_fold import CoordinateFold, Sums
from fedmerge.registry import register

__all__ = ["MagMax"]


@register("magmax", paper="arXiv:2407.06322")
@dataclass(frozen=True)
class MagMax(CoordinateFold):
    """In every coordinate the change of the client that changed it most.

    Marczak et al. 2024, with ``tau_i = theta_i - theta_0``: ``theta+ = theta_0 + scale * tau``, tau_j the tau_ij of
    largest size. Of a change and its opposite the positive one counts, so that the order of clients does not matter;
    the authors' code takes the later. Examples play no part. The merged task vector is longer than any client's, and
    one hostile client has every coordinate: small scales, clipping.

    Parameters
    ----------
    scale
        lambda; 0.5 in most of the authors' scripts.

    Examples
    --------
    >>> import torch
    >>> from fedmerge import ClientUpdate, MergeContext
    >>> sent = [ClientUpdate(i, {"w": torch.tensor(value)}) for i, value in enumerate(([1.0, -3.0], [2.0, 1.0]))]
    >>> MagMax(scale=1.0).merge(sent, MergeContext(base={"w": torch.zeros(2)}), {})[0]["w"]
    tensor([ 2., -3.])
    """

    separable = "tensor"
    scale: float = 0.5

    def include(self, sums: Sequence[Tensor], piece: Tensor, weight: float) -> None:
        """Take the change where it is the largest so far."""
        largest = sums[0]
        larger = (piece.abs() > largest.abs()) | ((piece.abs() == largest.abs()) & (piece > largest))
        largest.copy_(torch.where(larger, piece, largest))

    def unite(self, mine: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """The larger of two."""
        self.include(mine, others[0], 1.0)

    def combine(self, sums: Sequence[Tensor], total: Sums) -> Tensor:
        """As it is."""
        return sums[0]
