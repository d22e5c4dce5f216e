"""Sums of products, of which linear layers and attention are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedmerge.permutations.labels import Labels
from fedmerge.permutations.rules.pointwise import met
from fedmerge.permutations.rules.reduction import reduced
from fedmerge.permutations.values import Value, settle

__all__ = ["contraction"]


def contraction(
    labels: Labels, values: Sequence[Value], letters: Sequence[str], out: str, shape: Sequence[int]
) -> Value:
    """A product summed over some axes, as ``einsum`` writes it: tensors meet entry by entry, then sums are taken.

    Parameters
    ----------
    letters
        A name for each axis of each value; none twice in one.
    out
        Those of the result, in order.
    """
    names = out + "".join(dict.fromkeys(x for own in letters for x in own if x not in out))
    placed = [_placed(value, own, names) for value, own in zip(values, letters, strict=True)]
    sizes = np.broadcast_shapes(*(v.shape for v in placed))
    summed = tuple(range(len(out), len(names)))
    for value in placed:
        for grid in value.factors if value.name is not None and len(value.factors) > 1 else ():
            if any(grid.shape[a] > 1 for a in summed):
                labels.consume(grid.ravel())
    grids = reduced(labels, met(labels, placed, sizes), summed)
    return settle(labels, shape, [grid.reshape(grid.shape[: len(out)]) for grid in grids])


def _placed(value: Value, own: str, names: str) -> Value:
    """A value with its axes where `names` has them, further ones of size 1."""
    order = [own.index(x) for x in names if x in own]

    def place(sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(sizes[own.index(x)] if x in own else 1 for x in names)

    factors = tuple(np.transpose(g, order).reshape(place(g.shape)) for g in value.factors)
    even = frozenset(i for i, x in enumerate(names) if x in own and own.index(x) in value.even)
    return replace(value, shape=place(value.shape), factors=factors, even=even)
