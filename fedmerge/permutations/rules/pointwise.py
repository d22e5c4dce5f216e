"""Element by element: labels pass through, and where two tensors meet they are tied axis by axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedmerge.permutations.labels import Labels, Vector
from fedmerge.permutations.rules.base import Call, Outcome, rule
from fedmerge.permutations.values import Value, settle

__all__ = ["met"]


def met(labels: Labels, values: Sequence[Value], shape: tuple[int, ...]) -> list[Vector]:
    """Tie tensors that are broadcast against each other; the grids of the result."""
    values = [v for v in values if not v.uniform]
    grids: list[Vector] = []
    for value in values:
        more = len(shape) - len(value.shape)
        for grid in value.factors:
            _insert(labels, grids, grid.reshape((1,) * more + grid.shape))
    for value in values:
        sizes = (1,) * (len(shape) - len(value.shape)) + value.shape
        for grid in grids:
            held = [f.reshape((1,) * (len(shape) - f.ndim) + f.shape) for f in value.factors]
            for axis, size in enumerate(grid.shape):
                if size > 1 and sizes[axis] > 1 and not any(f.shape[axis] > 1 for f in held):
                    labels.pin(grid, "it meets something that is no neuron")
    return grids


def _insert(labels: Labels, grids: list[Vector], new: Vector) -> None:
    for i, old in enumerate(grids):
        common = [a for a in range(old.ndim) if old.shape[a] > 1 and new.shape[a] > 1]
        if not common:
            continue
        axes = [{a for a in range(g.ndim) if g.shape[a] > 1} for g in (old, new)]
        if not (axes[0] <= axes[1] or axes[1] <= axes[0]):
            labels.pin(old, "axes that mix neurons overlap")
            labels.pin(new, "axes that mix neurons overlap")
            return
        labels.tie(old, new)
        grids[i] = np.broadcast_to(new if axes[0] < axes[1] else old, np.broadcast_shapes(old.shape, new.shape))
        return
    grids.append(new)


@rule(
    "dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout",
    "contiguous", "clone", "detach", "detach_", "to", "_to_copy", "type_as", "alias", "lift_fresh_copy",
    "_weight_norm", "rrelu", "where", "masked_fill", "masked_fill_", "hardswish", "hardswish_", "hardsigmoid",
    "hardsigmoid_", "hardtanh", "hardtanh_", "relu6", "relu6_", "silu", "silu_", "mish", "mish_", "selu", "selu_",
    "celu", "celu_", "elu", "elu_", "leaky_relu", "leaky_relu_", "threshold", "threshold_", "relu", "relu_",
)  # fmt: skip
def pointwise(call: Call) -> Outcome:
    """Everything that treats each entry by itself; weight norm too, whose sums run over whole axes."""
    if call.operator == "type_as":
        value: Value = call["self"]
        return replace(value, shape=call.shape, name=None)
    values = call.tensors
    uniform = bool(values) and all(v.uniform for v in values)
    return replace(settle(call.labels, call.shape, met(call.labels, values, call.shape)), uniform=uniform)


@rule("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill_")
def uniform(call: Call) -> Outcome:
    """One number everywhere."""
    return Value(call.shape, uniform=True)


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Outcome:
    """A slope for each channel, which is axis 1."""
    x, slope = call["self"], call["weight"]
    if slope.shape != (1,):
        tail = (1,) * max(len(x.shape) - 2, 0)
        slope = Value((slope.shape[0], *tail), tuple(g.reshape(-1, *tail) for g in slope.factors))
    return settle(call.labels, call.shape, met(call.labels, [x, slope], call.shape))


@rule("glu")
def glu(call: Call) -> Outcome:
    """``a * sigmoid(b)`` with the halves a and b of one axis."""
    x, axis = call["self"], call["dim"] % len(call.shape)
    halves = []
    for start in (0, call.shape[axis]):
        cut = slice(start, start + call.shape[axis])
        grids = [g[(slice(None),) * axis + (cut,)] if g.shape[axis] > 1 else g for g in x.factors]
        halves.append(Value(call.shape, tuple(grids)))
    return settle(call.labels, call.shape, met(call.labels, halves, call.shape))
