"""What is known of a tensor in a traced graph: which of its axes hold neurons, and which ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmerge.permutations.labels import Labels, Vector

__all__ = ["Value", "blocks_of", "constant", "factor_at", "pin_all", "settle", "take_vector"]


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Parameters
    ----------
    shape
        Its sizes.
    factors
        Grids of labels with as many axes as the tensor; an axis that holds no neurons has size 1. Most
        activations have one grid along one axis, a weight has one grid per axis, heads and their dimensions
        together are one grid over two axes. No axis is labelled by two grids.
    uniform
        Whether all entries are one number, which any permutation leaves alone.
    name
        Of the parameter or buffer that it is.
    even
        Axes along which it holds copies, as what was expanded does: nothing there tells one place from another.
    """

    shape: tuple[int, ...]
    factors: tuple[Vector, ...] = ()
    uniform: bool = False
    name: str | None = None
    even: frozenset[int] = frozenset()

    def varies(self, axis: int) -> bool:
        """Whether places along an axis may hold different values."""
        return self.shape[axis] > 1 and axis not in self.even and not self.uniform


def constant(shape: Sequence[int]) -> Value:
    """A tensor without neurons."""
    return Value(tuple(int(s) for s in shape))


def settle(labels: Labels, shape: Sequence[int], factors: Sequence[Vector]) -> Value:
    """A value with grids brought to normal form: axes along which nothing changes have size 1."""
    kept = []
    for factor in factors:
        grid = factor
        for axis in range(grid.ndim):
            head = grid.take([0], axis)
            if grid.shape[axis] > 1 and (grid == head).all():
                grid = head
        if grid.size > 1:
            kept.append(grid)
        else:
            labels.pin(grid[grid != 0], "it stands alone")
    return Value(tuple(int(s) for s in shape), tuple(kept))


def factor_at(value: Value, axis: int) -> Vector | None:
    """The grid that labels this axis, if one does."""
    axis %= len(value.shape)
    return next((grid for grid in value.factors if grid.shape[axis] > 1), None)


def take_vector(
    labels: Labels, value: Value, axis: int, reason: str, *, whole: bool = False
) -> tuple[Vector, list[Vector]]:
    """Labels along an axis (zeros where there are none), and the grids of the other axes.

    A grid over this and further axes has no vector: it is pinned, or else, with `whole`, each place of this axis
    moves with all that it has along the others.
    """
    axis %= len(value.shape)
    factor = factor_at(value, axis)
    others = [grid for grid in value.factors if grid is not factor]
    if factor is not None and factor.size == factor.shape[axis]:
        return factor.ravel(), others
    if factor is not None and whole:
        rows = np.moveaxis(factor, axis, 0).reshape(value.shape[axis], -1)
        labels.tie(rows, rows[:, :1])
        return rows[:, 0], others
    if factor is not None:
        labels.pin(factor, reason)
    return np.zeros(value.shape[axis], dtype=np.int64), others


def blocks_of(labels: Labels, grid: Vector, *member_axes: int) -> Vector | None:
    """Labels of the blocks whose members lie along some axes of a grid; None where it has no others."""
    axes = [a % grid.ndim for a in member_axes]
    kept = [1 if a in axes else size for a, size in enumerate(grid.shape)]
    if np.prod(kept) == 1:
        return None
    moved = np.moveaxis(grid, axes, range(-len(axes), 0))
    return labels.blocks(moved.reshape(int(np.prod(kept)), -1)).reshape(kept)


def pin_all(labels: Labels, values: Sequence[Value], reason: str) -> None:
    """Pin everything in these values."""
    for value in values:
        for grid in value.factors:
            labels.pin(grid, reason)
