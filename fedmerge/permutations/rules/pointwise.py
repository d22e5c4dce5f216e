"""Element by element: labels pass through, and where two tensors meet they are tied axis by axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedmerge.permutations.labels import Labels, Vector
from fedmerge.permutations.rules.rule import Call, Outcome, rule
from fedmerge.permutations.values import Value, settle

__all__ = ["joined", "met"]


def met(labels: Labels, values: Sequence[Value], shape: tuple[int, ...]) -> list[Vector]:
    """Tie tensors that are broadcast against each other; the grids of the result."""
    values = [v for v in values if not v.uniform]
    grids: list[Vector] = []
    for value in values:
        more = len(shape) - len(value.shape)
        for grid in value.factors:
            _insert(labels, grids, grid.reshape((1,) * more + grid.shape))
    for value in values:
        more = len(shape) - len(value.shape)
        held = [f.reshape((1,) * more + f.shape) for f in value.factors]
        for grid in grids:
            unlike = tuple(
                a for a, size in enumerate(grid.shape)
                if size > 1 and a >= more and value.varies(a - more) and all(f.shape[a] == 1 for f in held)
            )  # fmt: skip
            if unlike:
                labels.ordered(grid, unlike, "it meets something that is no neuron")
    return grids


def _insert(labels: Labels, grids: list[Vector], new: Vector) -> None:
    """Add a grid to others that have no axis in common: those that share axes with it become one with it."""
    shared = [old for old in grids if any(a > 1 and b > 1 for a, b in zip(old.shape, new.shape, strict=True))]
    shape = np.broadcast_shapes(new.shape, *(g.shape for g in shared))
    full = next((g for g in (*shared, new) if g.shape == shape), None)
    joint = labels.fresh(int(np.prod(shape))).reshape(shape) if full is None else full
    for grid in (*shared, new):
        if grid.shape == shape:
            labels.tie(grid, joint)
        else:  # what is smaller is a whole for all that it is spread over
            labels.lie_within(joint, grid)
    kept = [g for g in grids if all(g is not old for old in shared)]
    grids[:] = [*kept, joint]


def joined(labels: Labels, grids: Sequence[Vector]) -> Vector:
    """One grid for the axes of all: every entry lies in the places that it has in each."""
    shape = np.broadcast_shapes(*(g.shape for g in grids))
    joint = labels.fresh(int(np.prod(shape))).reshape(shape)
    for grid in grids:
        labels.lie_within(joint, grid)
    return joint


def _even(values: Sequence[Value], shape: tuple[int, ...]) -> frozenset[int]:
    """Axes along which what comes from these values holds copies."""
    axes = set(range(len(shape)))
    for value in values:
        more = len(shape) - len(value.shape)
        for a in range(len(value.shape)):
            if value.varies(a) or any(f.shape[a] > 1 for f in value.factors):
                axes.discard(a + more)
    return frozenset(a for a in axes if shape[a] > 1)


@rule(
    "contiguous", "clone", "detach", "detach_", "to", "_to_copy", "alias", "lift_fresh_copy",
    "_weight_norm", "where", "masked_fill", "masked_fill_", "hardswish", "hardswish_", "hardsigmoid",
    "hardsigmoid_", "hardtanh", "hardtanh_", "relu6", "relu6_", "silu", "silu_", "mish", "mish_", "selu", "selu_",
    "celu", "celu_", "elu", "elu_", "leaky_relu", "leaky_relu_", "threshold", "threshold_", "relu", "relu_",
)  # fmt: skip
def pointwise(call: Call) -> Outcome:
    """Everything that treats each entry by itself; weight norm too, whose sums run over whole axes."""
    values = call.tensors
    uniform = bool(values) and all(v.uniform for v in values)
    even = _even(values, call.shape)
    return replace(settle(call.labels, call.shape, met(call.labels, values, call.shape)), uniform=uniform, even=even)


@rule("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill_",
      "zero", "zero_")  # fmt: skip
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
