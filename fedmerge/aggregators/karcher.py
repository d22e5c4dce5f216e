"""Karcher mean of directions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fedmerge.aggregators.spherical import Spherical, mean_direction
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register

__all__ = ["Karcher"]


@register("karcher", paper="doi:10.1002/cpa.3160300502")
@dataclass(frozen=True)
class Karcher(Spherical):
    """The direction with the least sum of squared angles to the clients', as long as they are on average.

    Karcher 1977, on the unit sphere, weighted by examples: ``u = argmin_u sum_i p_i angle(u, v_i)^2``, and ``v+ = u
    sum_i p_i ||v_i||``, for each tensor by itself. The mean of the v_i is shorter than they are where they disagree;
    this is not. Of two clients of equal lengths and weights it is ``slerp``.

    Parameters
    ----------
    of
        v_i: ``"weights"`` are the models themselves, between which angles are small, so that the result is near the
        mean; ``"updates"`` are theta_i - theta_0.
    scope
        What is a vector: each ``"tensor"``, or the whole ``"model"``.
    iterations
        At most so many steps, at least 1; ``multislerp`` is the first of them.
    tolerance
        Stop before a step that is shorter, in radians.

    Examples
    --------
    >>> import torch
    >>> from fedmerge import ClientUpdate, MergeContext
    >>> sent = [ClientUpdate(i, {"w": torch.tensor(value)}) for i, value in enumerate(([1.0, 0.0], [0.0, 3.0]))]
    >>> Karcher().merge(sent, MergeContext(), {})[0]["w"]
    tensor([1.4142, 1.4142])
    """

    iterations: int = 10
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "iterations", 1, math.inf, open_high=True)
        check_range(self, "tolerance", 0.0, math.inf, open_high=True)

    def factors(self, products: Tensor, shares: Tensor) -> Tensor:
        """Steps until they are short."""
        return mean_direction(products, shares, steps=self.iterations, tolerance=self.tolerance)
