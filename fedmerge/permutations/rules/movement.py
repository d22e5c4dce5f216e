"""Operators that only move entries: they are run on the labels themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedmerge.permutations.labels import Vector
from fedmerge.permutations.rules.base import Call, Outcome, rule, tensors_in
from fedmerge.permutations.rules.pointwise import met
from fedmerge.permutations.values import Value, factor_at, pin_all, settle

__all__: list[str] = []


@rule(
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "numpy_T", "movedim", "moveaxis", "swapaxes", "expand", "expand_as", "select", "slice", "narrow", "chunk",
    "split", "split_with_sizes", "unbind", "tensor_split", "flip", "roll", "repeat", "tile", "repeat_interleave",
    "diagonal", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "view_as", "unsafe_chunk",
    "unsafe_split", "mT", "matrix_H", "adjoint", "squeeze_", "unsqueeze_", "transpose_", "t_", "atleast_2d",
)  # fmt: skip
def moved(call: Call) -> Outcome:
    """One tensor whose entries are put elsewhere, repeated or left out."""
    name = next(name for name, argument in call.arguments.items() if isinstance(argument, Value))
    value: Value = call[name]
    pin_all(call.labels, call.tensors[1:], "it tells where entries go")
    results: list[list[Vector]] = [[] for _ in call.shapes]
    for grid in value.factors:
        full = torch.from_numpy(np.broadcast_to(grid, value.shape).copy())
        others = {k: torch.empty(v.shape) if isinstance(v, Value) else v for k, v in call.arguments.items()}
        out = call.target(**{**others, name: full}) if name != "self" else _run(call, full, others)
        for kept, tensor in zip(results, [out] if isinstance(out, torch.Tensor) else out, strict=True):
            kept.append(tensor.numpy())
    values = tuple(settle(call.labels, shape, kept) for shape, kept in zip(call.shapes, results, strict=True))
    values = tuple(Value(v.shape, v.factors, value.uniform) for v in values)
    return values[0] if call.single else values


def _run(call: Call, full: torch.Tensor, others: dict[str, object]) -> Any:
    return call.target(full, **{k: v for k, v in others.items() if k != "self"})


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Outcome:
    """Labels joined along the axis; along the others, tensors meet."""
    values = [v for v in tensors_in(call["tensors"]) if v.shape != (0,)]
    axis = call["dim"] % len(call.shape)
    joined = [factor_at(v, axis) for v in values]
    rest = [Value((*v.shape[:axis], 1, *v.shape[axis + 1 :]), tuple(g for g in v.factors if g is not j), v.uniform)
            for v, j in zip(values, joined, strict=True)]  # fmt: skip
    meeting = tuple(1 if a == axis else s for a, s in enumerate(call.shape))
    if all(j is None for j in joined):
        return settle(call.labels, call.shape, met(call.labels, rest, meeting))
    grids = [np.zeros((1,) * len(call.shape), dtype=np.int64) if j is None else j for j in joined]
    sizes = np.broadcast_shapes(*((*g.shape[:axis], 1, *g.shape[axis + 1 :]) for g in grids))
    parts = [np.broadcast_to(g, (*sizes[:axis], v.shape[axis], *sizes[axis + 1 :]))
             for g, v in zip(grids, values, strict=True)]  # fmt: skip
    return settle(call.labels, call.shape, [np.concatenate(parts, axis), *met(call.labels, rest, meeting)])


@rule("stack")
def stack(call: Call) -> Outcome:
    """Tensors side by side along a new axis."""
    values = list(tensors_in(call["tensors"]))
    axis = call["dim"] % len(call.shape)
    count = max((len(v.factors) for v in values), default=0)
    if any(len(v.factors) != count for v in values):
        pin_all(call.labels, values, "it is stacked onto something that is no neuron")
        return settle(call.labels, call.shape, [])
    grids = []
    for i in range(count):
        parts = [np.expand_dims(v.factors[i], axis) for v in values]
        if len({p.shape for p in parts}) > 1:
            pin_all(call.labels, values, "it is stacked onto neurons of other axes")
            return settle(call.labels, call.shape, [])
        grids.append(np.concatenate(parts, axis))
    return settle(call.labels, call.shape, grids)


@rule("index")
def index(call: Call) -> Outcome:
    """``x[i, :, j]``: axes without neurons are as good as each other, whatever the indices are."""
    value, indices = call["self"], list(call["indices"])
    pin_all(call.labels, [v for v in indices if v is not None], "it chooses entries")
    indexed = [a for a, found in enumerate(indices) if found is not None]
    where = tuple(slice(None) if v is None else np.zeros(v.shape, dtype=int) for v in indices)
    kept = []
    for grid in value.factors:
        if any(grid.shape[a] > 1 for a in indexed):
            call.labels.pin(grid, "single entries of it are chosen")
        else:
            kept.append(np.broadcast_to(grid, value.shape)[where])
    return settle(call.labels, call.shape, kept)


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
      "zero_pad2d", "_pad_circular")  # fmt: skip
def pad(call: Call) -> Outcome:
    """More entries at the ends of the last axes, which must not be neurons."""
    value = call.tensors[0]
    grown = [a for a, (old, new) in enumerate(zip(value.shape, call.shape, strict=True)) if old != new]
    kept = []
    for grid in value.factors:
        if any(grid.shape[a] > 1 for a in grown):
            call.labels.pin(grid, "it is padded")
        else:
            kept.append(grid)
    return settle(call.labels, call.shape, kept)
