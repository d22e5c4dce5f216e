"""Operators that write one tensor into another, as they are where nothing is changed in place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedmerge.permutations.rules.linear import along
from fedmerge.permutations.rules.pointwise import met
from fedmerge.permutations.rules.rule import Call, Outcome, rule, tensors_in
from fedmerge.permutations.values import Value, factor_at, pin_all, settle

__all__: list[str] = []


@rule("copy")
def copied(call: Call) -> Outcome:
    """One tensor written over all of another."""
    value: Value = call["src"]
    more = len(call.shape) - len(value.shape)
    return settle(call.labels, call.shape, [grid.reshape((1,) * more + grid.shape) for grid in value.factors])


@rule("slice_scatter", "select_scatter")
def written(call: Call) -> Outcome:
    """One tensor with part of it overwritten by another: as if its parts were joined along the axis."""
    labels, value, source = call.labels, call["self"], call["src"]
    axis = call["dim"] % len(call.shape)
    places = np.zeros(call.shape[axis], dtype=bool)
    if call.operator == "select_scatter":
        places[call["index"]] = True
        shape = (*call.shape[:axis], 1, *call.shape[axis + 1 :])
        source = replace(source, shape=shape, factors=tuple(np.expand_dims(g, axis) for g in source.factors))
    else:
        places[slice(call["start"], call["end"], call["step"])] = True
    if places.all():
        whole: Value = replace(source, shape=call.shape, name=None)
        return whole
    inside, outside = factor_at(source, axis), factor_at(value, axis)
    if any(own is not None and own.size > own.shape[axis] for own in (inside, outside)):
        pin_all(labels, [value, source], "part of it is overwritten along one of several axes")
        return settle(labels, call.shape, [])
    rest = [Value((*v.shape[:axis], 1, *v.shape[axis + 1 :]), tuple(g for g in v.factors if g is not own), v.uniform)
            for v, own in ((value, outside), (source, inside))]  # fmt: skip
    grids = met(labels, rest, tuple(1 if a == axis else s for a, s in enumerate(call.shape)))
    if inside is None and outside is None:
        return settle(labels, call.shape, grids)
    vector = np.zeros(call.shape[axis], dtype=np.int64) if outside is None else outside.ravel().copy()
    if not source.uniform:  # one number for all of them leaves them as alike as they were
        labels.pin(vector[places], "it is overwritten")
        vector[places] = 0 if inside is None else inside.ravel()
    return settle(labels, call.shape, [along(vector, axis, len(call.shape)), *grids])


@rule("broadcast_tensors")
def broadcast(call: Call) -> Outcome:
    """Tensors brought to one shape, each by itself."""
    return tuple(
        Value(shape, tuple(g.reshape((1,) * (len(shape) - g.ndim) + g.shape) for g in v.factors), v.uniform)
        for v, shape in zip(tensors_in(call["tensors"]), call.shapes, strict=True)
    )
