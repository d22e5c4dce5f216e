"""By what the layers of a model multiply their low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from fedmerge.adapters.low_rank_pairs import Pair, find_pairs
from fedmerge.errors import AdapterError, InvalidOption
from fedmerge.state import module_state

__all__ = ["pair_scaling", "scaling_of", "scalings"]


def pair_scaling(rank: int, alpha: float, rank_stabilized: bool = False) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` of rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732).

    Raises
    ------
    InvalidOption
        The rank is below 1, or alpha not above 0.

    Examples
    --------
    >>> pair_scaling(4, 8), pair_scaling(4, 8, rank_stabilized=True)
    (2.0, 4.0)
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InvalidOption(f"the rank of an adapter must be a whole number of at least 1, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise InvalidOption(f"the alpha of an adapter must be a number above 0, got {alpha!r}")
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def scaling_of(model: nn.Module, pair: Pair) -> float | None:
    """What the layer of a pair multiplies ``B A`` by, read off its attribute ``scaling``; None where it has none.

    peft's layers and those of :func:`~fedmerge.adapters.lora` have a mapping there, by names of adapters.
    """
    try:
        layer = model.get_submodule(pair.layer)
    except AttributeError:
        return None
    scaling = getattr(layer, "scaling", None)
    if isinstance(scaling, Mapping):
        # Names as peft saves them do not say which adapter, and then there is one.
        scaling = scaling.get(pair.adapter) if pair.adapter else next(iter(scaling.values()), None)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        return None
    return float(scaling)


def scalings(model: nn.Module, pairs: Sequence[str] = ()) -> dict[str, float]:
    """The scaling of every pair of a model whose layer tells it, by the name of its A.

    Parameters
    ----------
    model
        The model.
    pairs
        Patterns of one's own names, see :func:`~fedmerge.adapters.find_pairs`.

    Raises
    ------
    AdapterError
        A layer tells a scaling that is not a number above 0.
    """
    found = {}
    for pair in find_pairs(module_state(model)[0], pairs):
        scaling = scaling_of(model, pair)
        if scaling is None:
            continue
        if not 0 < scaling < math.inf:
            raise AdapterError(
                f"layer {pair.layer!r} multiplies its low-rank update by {scaling}: want a number above 0"
            )
        found[pair.a] = scaling
    return found
