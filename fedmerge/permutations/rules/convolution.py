"""Convolutions and what else acts on space."""

from __future__ import annotations

import numpy as np

from fedmerge.permutations.labels import Labels, Vector
from fedmerge.permutations.rules.linear import along
from fedmerge.permutations.rules.rule import Call, Outcome, rule
from fedmerge.permutations.values import Value, settle, take_vector

__all__: list[str] = []


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Outcome:
    """Channels in and out; depthwise ties both, other groups exchange output channels within a group only."""
    labels, x, weight, bias = call.labels, call["input"], call["weight"], call["bias"]
    transposed = "transpose" in call.operator or bool(call.arguments.get("transposed"))
    channel = len(x.shape) - (len(weight.shape) - 2) - 1
    inner, others = take_vector(labels, x, channel, "", whole=True)
    for grid in others:
        if any(size > 1 for size in grid.shape[channel:]):
            labels.pin(grid, "a convolution runs along it")
    others = [g for g in others if all(size == 1 for size in g.shape[channel:])]
    rows, columns = (take_vector(labels, weight, axis, "a weight that was reshaped")[0] for axis in (0, 1))
    for grid in weight.factors:
        if any(size > 1 for size in grid.shape[2:]):
            labels.pin(grid, "a kernel has its order")
    groups = call["groups"]
    if groups == 1:
        into, out = (rows, columns) if transposed else (columns, rows)
        labels.tie(inner, into)
        labels.consume(into)
    elif groups == len(inner) == call.shape[channel]:
        out = rows  # [groups, 1, ...] holds its channels on axis 0 either way
        labels.tie(inner, rows)
    else:
        out = _in_groups(labels, inner, weight, groups, transposed)
    if bias is not None:
        labels.tie(out, take_vector(labels, bias, 0, "")[0])
    return settle(labels, call.shape, [*others, along(out, channel, len(call.shape))])


def _in_groups(labels: Labels, inner: Vector, weight: Value, groups: int, transposed: bool) -> Vector:
    """Groups are exchanged as wholes, with what goes in and what comes out; channels of a group within it."""
    rows, _ = take_vector(labels, weight, 0, "a weight that was reshaped")
    if weight.name is None:  # its columns are other neurons in each group, which only a parameter can tell apart
        labels.pin(inner, "it goes into a grouped convolution whose weight is computed")
        labels.pin(rows, "it is a row of a grouped convolution whose weight is computed")
        return np.zeros(weight.shape[1] * groups if transposed else len(rows), dtype=np.int64)
    columns = labels.grouped_site(weight.name, 1, weight.shape[1], groups)
    into, out = (rows, columns) if transposed else (columns, rows)
    labels.tie(inner, into)
    labels.consume(into)
    labels.tie(*(labels.blocks(side.reshape(groups, -1)) for side in (into, out)))
    return out


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "lp_pool2d",
    "max_pool2d_with_indices", "max_pool1d_with_indices", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
)  # fmt: skip
def pooling(call: Call) -> Outcome:
    """What stays within a channel, which is a neuron with all its places."""
    x = call.tensors[0]
    space = next((int(d) for d in "123" if f"{d}d" in call.operator), 1)
    kept = []
    for grid in x.factors:
        axes = range(len(x.shape) - space, len(x.shape))
        kept.append(grid)
        if any(grid.shape[a] > 1 for a in axes):
            if all(size == 1 for size in grid.shape[:-space]):
                call.labels.pin(grid, "pooling runs along it")
            for a in axes:  # what is pooled stays in its order, the channel as a whole may move
                call.labels.tie(kept[-1], kept[-1].take([0], a))
                kept[-1] = kept[-1].take([0], a)
    values = tuple(settle(call.labels, shape, kept) for shape in call.shapes)
    return values[0] if call.single else values
