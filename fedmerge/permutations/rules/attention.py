"""Products of activations: heads exchange as blocks, the dimensions of a head within it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedmerge.permutations.labels import Labels, Vector
from fedmerge.permutations.rules.base import Call, Outcome, rule
from fedmerge.permutations.rules.linear import along, contracted
from fedmerge.permutations.values import Value, blocks_of, factor_at, pin_all, settle, take_vector

__all__ = ["product"]


def product(labels: Labels, x: Value, y: Value, shape: tuple[int, ...]) -> Value:
    """``x @ y`` of two activations [..., n, k] and [..., k, m]."""
    ndim = len(shape)
    x, y = _aligned(x, ndim), _aligned(y, ndim)
    inner_x, inner_y = factor_at(x, -1), factor_at(y, -2)
    tied = _tied(labels, inner_x, inner_y)
    rest = [grid for v, inner in ((x, inner_x), (y, inner_y)) for grid in v.factors if grid is not inner]
    heads = [h for h in (blocks_of(labels, g, a) for g, a in tied) if h is not None]
    outer = []
    for grid in rest:
        member = next((axis for axis in (-2, -1) if grid.shape[axis] > 1), None)
        if member is None:
            heads.append(grid)  # labels of heads alone
            continue
        if grid.shape[-1] > 1 and grid.shape[-2] > 1:
            labels.pin(grid, "it labels rows and columns of a product")
            continue
        outer.append(grid)
        block = blocks_of(labels, grid, member)
        if block is not None:
            heads.append(block)
    for other in heads[1:]:
        if other.shape == heads[0].shape:
            labels.tie(heads[0], other)
        else:
            labels.pin(other, "heads of different numbers meet")
            labels.pin(heads[0], "heads of different numbers meet")
    if heads and not any(_labels_batch(grid) for grid in outer):
        outer.append(heads[0])
    return settle(labels, shape, outer)


def _aligned(value: Value, ndim: int) -> Value:
    more = ndim - len(value.shape)
    return replace(
        value,
        shape=(1,) * more + value.shape,
        factors=tuple(grid.reshape((1,) * more + grid.shape) for grid in value.factors),
    )


def _labels_batch(grid: Vector) -> bool:
    return any(size > 1 for size in grid.shape[:-2])


def _tied(labels: Labels, x: Vector | None, y: Vector | None) -> list[tuple[Vector, int]]:
    """Tie the contracted axes; what may be used as blocks, with the axis of the members."""
    grids = [(grid, axis) for grid, axis in ((x, -1), (y, -2)) if grid is not None]
    if x is None or y is None or x.shape[-2] > 1 or y.shape[-1] > 1:
        for grid, _ in grids:
            labels.pin(grid, "it is summed against something that is no neuron")
        return []
    across = np.swapaxes(y, -1, -2)
    if x.shape != across.shape:
        for grid, _ in grids:
            labels.pin(grid, "heads of different numbers meet")
        return []
    labels.tie(x, across)
    return grids


@rule("matmul", "bmm", "mm")
def matmul(call: Call) -> Outcome:
    """A product with a weight, or of two activations."""
    x, y = call.tensors
    if len(x.shape) < 2 or len(y.shape) < 2:
        pin_all(call.labels, [x, y], "a product with a vector")
        return settle(call.labels, call.shape, [])
    if len(y.shape) == 2 and len(y.factors) == 2:
        others = contracted(call.labels, x, y, 0)
        columns, _ = take_vector(call.labels, y, 1, "a weight that was reshaped")
        return settle(call.labels, call.shape, [*others, along(columns, -1, len(call.shape))])
    return product(call.labels, x, y, call.shape)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Outcome:
    """``softmax(q k^T) v``."""
    labels, q, k, v = call.labels, call["query"], call["key"], call["value"]
    if call["attn_mask"] is not None:
        pin_all(labels, [call["attn_mask"]], "it is a mask of attention")
    swapped = replace(
        k, shape=(*k.shape[:-2], k.shape[-1], k.shape[-2]), factors=tuple(np.swapaxes(g, -1, -2) for g in k.factors)
    )
    scores = product(labels, q, swapped, (*q.shape[:-1], k.shape[-2]))
    return product(labels, scores, v, call.shape)
