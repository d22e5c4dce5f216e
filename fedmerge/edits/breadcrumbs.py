"""Neither the largest changes of each client nor the smallest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.edits.delta import blocks
from fedmerge.edits.edit import Edit, EditContext
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["Breadcrumbs"]


@register("breadcrumbs", paper="arXiv:2312.06795")
@dataclass(frozen=True)
class Breadcrumbs(Edit):
    """Undo each client's largest changes, which are outliers, and its smallest ones, which are noise.

    Davari and Belilovsky 2024, section 3: of the n numbers in a row, the ``int(gamma n)`` of largest magnitude become
    0; of the others the ``int(density n)`` largest stay, and the rest becomes 0. It works as a mild filter of outliers.

    Parameters
    ----------
    density
        Share of the numbers that stays (the paper's beta), in (0, 1].
    gamma
        Share of the numbers that is dropped from above, in [0, 1); with `density` at most 1.
    scope
        ``"row"`` compares along the last dimension, as the authors' code does; ``"tensor"`` within each tensor, as
        mergekit does. A vector is one row, and a single number always stays.

    Examples
    --------
    >>> delta = {"w": torch.tensor([9.0, 1.0, 4.0, -3.0, 2.0])}
    >>> Breadcrumbs(density=0.4, gamma=0.2).edit(delta, EditContext())["w"].tolist()
    [0.0, 0.0, 4.0, -3.0, 0.0]
    """

    density: float = 0.2
    gamma: float = 0.1
    scope: Literal["row", "tensor"] = "row"

    def __post_init__(self) -> None:
        check_range(self, "density", 0.0, 1.0, open_low=True)
        check_range(self, "gamma", 0.0, 1.0, open_high=True)
        check_word(self, "scope", ("row", "tensor"))
        if self.density + self.gamma > 1 + 1e-9:
            raise InvalidOption(
                f"Breadcrumbs: a share of {self.gamma:g} dropped from above leaves no {self.density:g} to keep: "
                "density and gamma may be 1 together at most"
            )

    @property
    def tensor_by_tensor(self) -> bool:
        """Always."""
        return True

    def edit(self, delta: State, context: EditContext) -> State:
        """What lies between."""
        return {name: self._between(tensor) for name, tensor in delta.items()}

    def _between(self, tensor: Tensor) -> Tensor:
        if tensor.numel() <= 1:
            return tensor
        in_rows = self.scope == "row" and tensor.ndim > 1
        rows = tensor.reshape(-1, tensor.shape[-1]) if in_rows else tensor.reshape(1, -1)
        numbers = rows.shape[-1]
        if numbers <= 1:
            return tensor
        above, kept = int(self.gamma * numbers + 1e-9), int(self.density * numbers + 1e-9)
        between = torch.zeros_like(rows)
        for some, kept_of in zip(blocks(rows), blocks(between), strict=True):
            # Stable, so that of equal magnitudes those that come first stay, on every machine.
            order = some.abs().argsort(dim=-1, descending=True, stable=True)[:, above : above + kept]
            kept_of.scatter_(1, order, some.gather(1, order))
        return between.reshape(tensor.shape)
