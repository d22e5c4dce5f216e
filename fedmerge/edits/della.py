"""Changes dropped at random, small ones more often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.edits.dare import draw, restored
from fedmerge.edits.delta import blocks
from fedmerge.edits.edit import Edit, EditContext
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["Della", "keep_probabilities"]


@register("della", paper="arXiv:2406.11617")
@dataclass(frozen=True)
class Della(Edit):
    """Drop random changes of each client, small ones more often than large ones (DELLA's MagPrune).

    Deep et al. 2024, section 3: within each row of n numbers, the one of rank r by magnitude (1 for the smallest)
    stays with probability ``q_r = (density - epsilon) + 2 epsilon (r - 1) / (n - 1)``, and what stays is divided by its
    own ``q_r``, so that its mean over draws is what it was. At ``epsilon = 0`` this is DARE. A vector is one row; a row
    of one number stays with probability `density`.

    Parameters
    ----------
    density
        Mean share of the numbers that stays, in (0, 1].
    epsilon
        Half the range of the probabilities; ``density - epsilon`` has to be above 0, ``density + epsilon`` at most 1.
    rescale
        ``"probability"`` divides each number by its own, as the paper does; ``"l1"`` scales each tensor so that its
        L1 norm is what it was, as mergekit does; ``"none"`` leaves what stays as it was.

    Examples
    --------
    >>> keep_probabilities(torch.tensor([0.3, -0.1, 0.2]), 0.5, 0.1)
    tensor([0.6000, 0.4000, 0.5000])
    """

    density: float = 0.7
    epsilon: float = 0.07
    rescale: Literal["probability", "l1", "none"] = "probability"

    def __post_init__(self) -> None:
        check_range(self, "density", 0.0, 1.0, open_low=True)
        check_range(self, "epsilon", 0.0, 0.5)
        check_word(self, "rescale", ("probability", "l1", "none"))
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if low <= 0 or high > 1 + 1e-9:
            raise InvalidOption(
                f"Della: numbers would stay with probabilities from {low:g} to {high:g}, which have to lie within "
                "(0, 1]: make epsilon smaller"
            )

    def edit(self, delta: State, context: EditContext) -> State:
        """The draws of one client."""
        generator = context.generator()
        edited = {}
        for name, tensor in delta.items():
            keep = keep_probabilities(tensor, self.density, self.epsilon)
            kept = tensor * draw(tensor, keep, generator)
            if self.rescale == "probability":
                kept /= keep
            edited[name] = restored(kept, tensor) if self.rescale == "l1" else kept
        return edited


def keep_probabilities(tensor: Tensor, density: float, epsilon: float) -> Tensor:
    """With which probability each number stays, by its rank within its row; equal numbers rank by position."""
    if tensor.ndim == 0 or tensor.shape[-1] <= 1:
        return torch.full_like(tensor, density)
    rows = tensor.reshape(-1, tensor.shape[-1])
    places = torch.arange(rows.shape[1], device=tensor.device)
    keep = torch.empty_like(rows)
    for some, kept in zip(blocks(rows), blocks(keep), strict=True):
        order = some.abs().argsort(dim=-1, stable=True)
        ranks = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
        kept.copy_(ranks).div_(rows.shape[1] - 1).mul_(2 * epsilon).add_(density - epsilon)
    return keep.view(tensor.shape)
