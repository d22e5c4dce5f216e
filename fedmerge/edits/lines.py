"""Changes of early layers made smaller than those of late ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmerge.edits.edit import Edit, EditContext
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["Lines", "depths"]


@register("lines", paper="arXiv:2410.17146")
@dataclass(frozen=True)
class Lines(Edit):
    """Scale changes by depth: early layers keep more of what they were (LiNeS).

    Wang et al. 2024, equation 1: the change of layer l of L, counted from 0, is multiplied by
    ``alpha + beta l / (L - 1)``. Here ``alpha`` is `first`, ``alpha + beta`` is `last`. Early layers hold features
    that all clients share, late ones what is each client's own. Layers are told by names, in the model's order: a name
    up to its first number, or the module that the parameter belongs to where it has none.

    Parameters
    ----------
    first
        Factor on the first layer's change, at least 0.
    last
        Factor on the last layer's change, at least 0. A model of one layer is scaled by it.

    Examples
    --------
    >>> import torch
    >>> delta = {f"layers.{l}.weight": torch.ones(1) for l in range(3)}
    >>> [float(t) for t in Lines(first=0.5, last=1.0).edit(delta, EditContext()).values()]
    [0.5, 0.75, 1.0]
    """

    first: float = 0.5
    last: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "first", 0.0, math.inf, open_high=True)
        check_range(self, "last", 0.0, math.inf, open_high=True)

    def edit(self, delta: State, context: EditContext) -> State:
        """Each layer by its factor."""
        places = depths(delta)
        deepest = max(places.values(), default=0)
        slope = (self.last - self.first) / deepest if deepest else 0.0
        start = self.first if deepest else self.last
        return {name: tensor * (start + slope * places[name]) for name, tensor in delta.items()}


def depths(names: State) -> dict[str, int]:
    """Which layer each parameter belongs to, from 0, in the order of the names.

    Examples
    --------
    >>> depths({"stem.weight": 0, "blocks.0.attn.weight": 0, "blocks.0.norm.bias": 0, "blocks.1.attn.weight": 0})
    {'stem.weight': 0, 'blocks.0.attn.weight': 1, 'blocks.0.norm.bias': 1, 'blocks.1.attn.weight': 2}
    """
    order: dict[str, int] = {}
    return {name: order.setdefault(_layer(name), len(order)) for name in names}


def _layer(name: str) -> str:
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if numbered is None else parts[: numbered + 1])
