"""Products with weights: a contraction ties the input's axis to the weight's, the weight's other axis comes out."""

from __future__ import annotations

import numpy as np

from fedmerge.permutations.labels import Labels, Vector
from fedmerge.permutations.rules.contraction import contraction
from fedmerge.permutations.rules.rule import Call, Outcome, rule
from fedmerge.permutations.values import Value, factor_at, pin_all, settle, take_vector

__all__ = ["along", "contracted", "product"]


def along(vector: Vector, axis: int, ndim: int) -> Vector:
    """A vector of labels as a grid with `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = len(vector)
    return vector.reshape(shape)


def contracted(labels: Labels, x: Value, weight: Value, weight_axis: int) -> list[Vector]:
    """Tie the last axis of `x` to an axis of a weight; the grids of `x` that remain."""
    inner, others = take_vector(labels, x, -1, "it goes into a product together with other axes")
    tied, _ = take_vector(labels, weight, weight_axis, "a weight that was reshaped")
    labels.tie(inner, tied)
    labels.consume(tied)
    return others


def product(call: Call, x: Value, weight: Value, weight_axis: int, bias: Value | None) -> Value:
    """The last axis of `x` summed against one axis of a matrix, the other comes out."""
    labels, ndim = call.labels, len(x.shape)
    rows, _ = take_vector(labels, weight, 1 - weight_axis, "a weight that was reshaped")
    if bias is not None:
        labels.tie(rows, take_vector(labels, bias, 0, "")[0])
    inner = factor_at(x, -1)
    if inner is not None and inner.size > inner.shape[-1] and len(weight.factors) == 2:  # the same map for all heads
        batch = "abcdefghijklmnopqrstuvw"[: ndim - 1]
        return contraction(labels, [x, weight], [batch + "y", "zy" if weight_axis else "yz"], batch + "z", call.shape)
    others = contracted(labels, x, weight, weight_axis)
    return settle(labels, call.shape, [*others, along(rows, -1, ndim)])


@rule("linear")
def linear(call: Call) -> Outcome:
    """``x W^T + b``."""
    return product(call, call["input"], call["weight"], 1, call["bias"])


@rule("addmm")
def addmm(call: Call) -> Outcome:
    """``b + x W`` with W of shape [in, out]."""
    x, weight, bias = call["mat1"], call["mat2"], call["self"]
    others = contracted(call.labels, x, weight, 0)
    columns, _ = take_vector(call.labels, weight, 1, "a weight that was reshaped")
    call.labels.tie(columns, take_vector(call.labels, bias, -1, "")[0])
    return settle(call.labels, call.shape, [*others, along(columns, -1, len(call.shape))])


@rule("embedding")
def embedding(call: Call) -> Outcome:
    """Rows of a table: its columns are neurons, its vocabulary is not."""
    labels, weight, indices = call.labels, call["weight"], call["indices"]
    labels.pin(take_vector(labels, weight, 0, "")[0], "a vocabulary has its order")
    pin_all(labels, [indices], "it chooses rows of a table")
    columns, _ = take_vector(labels, weight, 1, "a table that was reshaped")
    labels.produce(columns)
    return settle(labels, call.shape, [along(columns, -1, len(call.shape))])


@rule("bilinear")
def bilinear(call: Call) -> Outcome:
    """``x1 A x2 + b``: both inputs are tied to the axes of A."""
    labels, weight = call.labels, call["weight"]
    for x, axis in ((call["input1"], 1), (call["input2"], 2)):
        for grid in contracted(labels, x, weight, axis):
            labels.pin(grid, "it goes through a bilinear map")
    rows, _ = take_vector(labels, weight, 0, "")
    if call["bias"] is not None:
        labels.tie(rows, take_vector(labels, call["bias"], 0, "")[0])
    return settle(labels, call.shape, [np.asarray(along(rows, -1, len(call.shape)))])
