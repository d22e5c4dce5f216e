"""Spherical linear interpolation between two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedmerge.aggregators.spherical import Spherical, great_circle, mean_direction
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register

__all__ = ["Slerp"]


@register("slerp", paper="doi:10.1145/325334.325242")
@dataclass(frozen=True)
class Slerp(Spherical):
    """A point on the arc between two clients instead of on the line, for each tensor by itself.

    Shoemake 1985: ``v+ = sin((1 - t) w) / sin w v_0 + sin(t w) / sin w v_1``, w the angle between v_0 and v_1. For
    equal lengths it keeps them, where the mean is shorter. Vectors on one line, and those of length 0, are interpolated
    linearly; mergekit does so from a cosine of 0.9995 on.

    Parameters
    ----------
    of
        v_i: ``"weights"`` are the models themselves, between which angles are small; ``"updates"`` are theta_i -
        theta_0.
    scope
        What is a vector: each ``"tensor"``, or the whole ``"model"``.
    t
        How far from the first client to the second, in [0, 1], of which there may not be more; where not given, the
        second's share of the examples.
    more
        More than two clients go by ``"multislerp"``, or ``"refuse"`` makes them an error.

    Examples
    --------
    >>> import torch
    >>> from fedmerge import ClientUpdate, MergeContext
    >>> sent = [ClientUpdate(i, {"w": torch.tensor(value)}) for i, value in enumerate(([2.0, 0.0], [0.0, 2.0]))]
    >>> Slerp(t=0.5).merge(sent, MergeContext(), {})[0]["w"]
    tensor([1.4142, 1.4142])
    """

    t: float | None = None
    more: Literal["multislerp", "refuse"] = "multislerp"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self, "more", ("multislerp", "refuse"))
        if self.t is not None:
            check_range(self, "t", 0.0, 1.0)

    def factors(self, products: Tensor, shares: Tensor) -> Tensor:
        """Those of the arc.

        Raises
        ------
        InvalidOption
            There are more than two clients, which are refused or have no place t between them.
        """
        if len(shares) == 1:
            return shares
        if len(shares) == 2:
            return great_circle(products, float(shares[1]) if self.t is None else self.t)
        if self.more == "refuse" or self.t is not None:
            option = "more=refuse" if self.t is None else f"t={self.t}"
            raise InvalidOption(
                f"slerp interpolates between two models, got {len(shares)}: leave out {option}, or take multislerp or "
                "karcher"
            )
        return mean_direction(products, shares, steps=1)
