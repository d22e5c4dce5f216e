"""Only the largest changes of each client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.edits.edit import Edit, EditContext
from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["Trim", "keep_largest", "largest_mask"]


@register("trim", paper="arXiv:2306.01708")
@dataclass(frozen=True)
class Trim(Edit):
    """Keep each client's largest changes, and undo the others (the first step of TIES).

    Yadav et al. 2023, section 4, "trim": of the ``d`` numbers in ``delta_i``, the ``round(density d)`` of largest
    magnitude stay as they are, the others become 0. Where magnitudes are equal, those that come first stay, so that
    exactly so many do.

    Parameters
    ----------
    density
        Share of the numbers that stays, in (0, 1].
    scope
        ``"global"`` compares all numbers of a model, as the paper does; ``"tensor"`` compares within each tensor, as
        mergekit and peft do.

    Examples
    --------
    >>> delta = {"w": torch.tensor([3.0, -1.0, 2.0, 0.5])}
    >>> Trim(density=0.5).edit(delta, EditContext())["w"].tolist()
    [3.0, 0.0, 2.0, 0.0]
    """

    density: float = 0.2
    scope: Literal["global", "tensor"] = "global"

    def __post_init__(self) -> None:
        check_range(self, "density", 0.0, 1.0, open_low=True)
        check_word(self, "scope", ("global", "tensor"))

    @property
    def tensor_by_tensor(self) -> bool:
        """Where shares are taken of each."""
        return self.scope == "tensor"

    def edit(self, delta: State, context: EditContext) -> State:
        """The largest changes."""
        return keep_largest(delta, self.density, self.scope)


def keep_largest(delta: State, density: float, scope: Literal["global", "tensor"] = "global") -> State:
    """The ``round(density d)`` numbers of largest magnitude, others 0; of a model's numbers, or of each tensor's.

    Examples
    --------
    >>> keep_largest({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, 0.5)
    {'a': tensor([0.]), 'b': tensor([2.])}
    """
    if density >= 1 or not delta:
        return delta
    if scope == "tensor":
        return {name: _kept(t, largest_mask(t.abs().flatten(), density)) for name, t in delta.items()}
    sizes = torch.cat([t.abs().flatten() for t in delta.values()])
    masks = torch.split(largest_mask(sizes, density), [t.numel() for t in delta.values()])
    return {name: _kept(t, mask) for (name, t), mask in zip(delta.items(), masks, strict=True)}


def _kept(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.masked_fill(~mask.view(tensor.shape), 0.0)


def largest_mask(sizes: Tensor, density: float) -> Tensor:
    """Where the ``round(density n)`` largest of `sizes` [n] stand; of equal ones, those that come first."""
    count = round(density * sizes.numel())
    if count <= 0:
        return torch.zeros_like(sizes, dtype=torch.bool)
    if count >= sizes.numel():
        return torch.ones_like(sizes, dtype=torch.bool)
    # A threshold alone keeps all that are equal to it: zeros of parameters that nobody moved are many.
    threshold = torch.kthvalue(sizes, sizes.numel() - count + 1).values
    mask = sizes > threshold
    equal = (sizes == threshold).nonzero().flatten()[: count - int(mask.sum())]
    mask[equal] = True
    return mask
