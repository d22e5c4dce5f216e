"""Spherical interpolation between any number of models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmerge.aggregators.spherical import Spherical, mean_direction
from fedmerge.registry import register

__all__ = ["MultiSlerp"]


@register("multislerp", paper="arXiv:2403.13257")
@dataclass(frozen=True)
class MultiSlerp(Spherical):
    """Mean of the clients' directions in the tangent space at their average, as long as they are on average.

    As in mergekit (Goddard et al. 2024), for each tensor: m is the direction of ``sum_i p_i u_i`` with
    ``u_i = v_i / ||v_i||``, and ``v+ = exp_m(sum_i p_i log_m(u_i)) sum_i p_i ||v_i||``. It is the first step of
    ``karcher``, and of two clients of equal lengths and weights it is ``slerp``.

    Parameters
    ----------
    of
        v_i: ``"weights"`` are the models themselves, between which angles are small, so that the result is near the
        mean; ``"updates"`` are theta_i - theta_0, as WARP merges them (arXiv:2406.16768).
    scope
        What is a vector: each ``"tensor"``, or the whole ``"model"``.

    Examples
    --------
    >>> import torch
    >>> from fedmerge import ClientUpdate, MergeContext
    >>> sent = [ClientUpdate(i, {"w": torch.tensor(value)}) for i, value in enumerate(([1.0, 0.0], [0.0, 3.0]))]
    >>> MultiSlerp().merge(sent, MergeContext(), {})[0]["w"]
    tensor([1.4142, 1.4142])
    """

    def factors(self, products: Tensor, shares: Tensor) -> Tensor:
        """One step."""
        return mean_direction(products, shares, steps=1)
