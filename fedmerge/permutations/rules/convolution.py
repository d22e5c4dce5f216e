"""Convolutions and what else acts on space."""

from __future__ import annotations

from fedmerge.permutations.rules.base import Call, Outcome, rule
from fedmerge.permutations.rules.linear import along
from fedmerge.permutations.values import settle, take_vector

__all__: list[str] = []


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Outcome:
    """Channels in and out; depthwise ties both, other groups exchange output channels within a group only."""
    labels, x, weight, bias = call.labels, call["input"], call["weight"], call["bias"]
    transposed = "transpose" in call.operator or bool(call.arguments.get("transposed"))
    space = len(weight.shape) - 2
    channel = len(x.shape) - space - 1
    inner, others = take_vector(labels, x, channel, "channels mixed with space go into a convolution")
    for grid in others:
        if any(size > 1 for size in grid.shape[channel:]):
            labels.pin(grid, "a convolution runs along it")
    others = [g for g in others if all(size == 1 for size in g.shape[channel:])]
    rows, _ = take_vector(labels, weight, 1 if transposed else 0, "a weight that was reshaped")
    columns, _ = take_vector(labels, weight, 0 if transposed else 1, "a weight that was reshaped")
    groups = call["groups"]
    depthwise = groups > 1 and groups == len(inner) == call.shape[channel]
    if groups == 1:
        labels.tie(inner, columns)
        labels.consume(columns)
    elif depthwise:
        rows = columns if transposed else rows  # [groups, 1, ...] holds its channels on axis 0 either way
        labels.tie(inner, rows)
    else:
        labels.pin(inner, "it goes into a grouped convolution")
        labels.pin(columns, "it is an input of a grouped convolution")
        if transposed:
            labels.pin(rows, "it is an output of a transposed grouped convolution")
        else:
            for group in rows.reshape(groups, -1):
                labels.tag(group)
    out = rows
    if transposed and groups > 1 and not depthwise:
        out = rows[:0]
    if bias is not None:
        own, _ = take_vector(labels, bias, 0, "")
        labels.tie(out, own) if len(out) else labels.pin(own, "it is an output of a transposed grouped convolution")
    factors = [along(out, channel, len(call.shape))] if len(out) else []
    return settle(labels, call.shape, [*others, *factors])


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "lp_pool2d",
    "max_pool2d_with_indices", "max_pool1d_with_indices", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
)  # fmt: skip
def pooling(call: Call) -> Outcome:
    """What stays within a channel: axes that keep their neurons, others without."""
    x = call.tensors[0]
    space = next((int(d) for d in "123" if f"{d}d" in call.operator), 1)
    kept = []
    for grid in x.factors:
        if any(size > 1 for size in grid.shape[-space:]):
            call.labels.pin(grid, "pooling runs along it")
        else:
            kept.append(grid)
    values = tuple(settle(call.labels, shape, kept) for shape in call.shapes)
    return values[0] if call.single else values
