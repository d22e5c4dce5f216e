"""Only the largest changes of each client."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from fedmerge.edits.delta import parts
from fedmerge.edits.edit import Edit, EditContext
from fedmerge.edits.largest import cuts
from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["Trim", "keep_largest"]


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
    >>> import torch
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
    >>> import torch
    >>> keep_largest({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, 0.5)
    {'a': tensor([0.]), 'b': tensor([2.])}
    """
    if density >= 1 or not delta:
        return delta
    groups = [list(delta)] if scope == "global" else [[name] for name in delta]
    kept: dict[str, Tensor] = {}
    for names in groups:
        # Looked at again in each pass: a tensor may be computed only then, and never stands beside all others.
        count = round(density * sum(delta[name].numel() for name in names))
        limits = cuts({name: partial(_pieces, delta, name) for name in names}, count)
        kept |= {name: limits[name].keep(delta[name]) for name in names}
    return kept


def _pieces(delta: State, name: str) -> list[Tensor]:
    row = delta[name].reshape(-1)
    return [row[part] for part in parts(len(row))]
