"""Sums, means, extremes and softmax: what is taken together may only be exchanged within it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedmerge.permutations.labels import Labels, Vector
from fedmerge.permutations.rules.rule import Call, Outcome, rule
from fedmerge.permutations.values import blocks_of, settle

__all__ = ["reduced"]


def _axes(dim: Any, ndim: int) -> tuple[int, ...]:
    if dim is None or dim == []:
        return tuple(range(ndim))
    return tuple(int(d) % ndim for d in (dim if isinstance(dim, list | tuple) else [dim]))


def reduced(labels: Labels, grids: Sequence[Vector], axes: tuple[int, ...]) -> list[Vector]:
    """Grids with the reduced axes at size 1: what is summed over is alike, what is left of it is a block."""
    kept = []
    for grid in grids:
        labelled = [a for a in range(grid.ndim) if grid.shape[a] > 1]
        gone = [a for a in labelled if a in axes]
        if not gone:
            kept.append(grid)
        elif gone == labelled:
            labels.tag(grid)
        else:
            block = blocks_of(labels, grid, *gone)
            if block is not None:
                kept.append(block)
    return kept


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "logsumexp", "prod", "norm",
      "linalg_vector_norm", "any", "all")  # fmt: skip
def reduction(call: Call) -> Outcome:
    """One number from many."""
    value = call.tensors[0]
    axes = _axes(call.arguments.get("dim"), len(value.shape))
    kept = reduced(call.labels, value.factors, axes)
    if not call.arguments.get("keepdim", False):
        left = [a for a in range(len(value.shape)) if a not in axes]
        kept = [grid.reshape([grid.shape[a] for a in left]) for grid in kept]
    values = tuple(settle(call.labels, shape, kept) for shape in call.shapes)
    return values[0] if call.single else values


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod")
def softmax(call: Call) -> Outcome:
    """Along an axis, entries in relation to each other."""
    value, axes = call["self"], _axes(call["dim"], len(call.shape))
    for grid in value.factors:
        if any(grid.shape[a] > 1 for a in axes):
            if call.operator.startswith("cum"):
                call.labels.pin(grid, "a cumulative sum has an order")
            elif grid.size == grid.shape[axes[0]]:
                call.labels.tag(grid)
            else:
                blocks_of(call.labels, grid, axes[0])
    return settle(call.labels, call.shape, value.factors)
