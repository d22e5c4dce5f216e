"""Norms: scale, shift and running statistics go with the axis; what is normalised together stays together."""

from __future__ import annotations

import numpy as np

from fedmerge.permutations.rules.pointwise import met
from fedmerge.permutations.rules.rule import Call, Outcome, rule
from fedmerge.permutations.values import Value, blocks_of, settle, take_vector

__all__: list[str] = []


def _per_channel(call: Call, x: Value, parameters: list[Value | None]) -> Value:
    channels, others = take_vector(call.labels, x, 1, "", whole=True)
    for parameter in parameters:
        if parameter is None:
            continue
        if parameter.name is not None:  # running statistics too, which are buffers and hold no labels elsewhere
            own = call.labels.site(parameter.name, 0, parameter.shape[0])
        else:
            own, _ = take_vector(call.labels, parameter, 0, "")
        call.labels.tie(channels, own)
    grid = channels.reshape([-1 if a == 1 else 1 for a in range(len(x.shape))])
    return settle(call.labels, call.shape, [*others, grid])


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm")
def batch_norm(call: Call) -> Outcome:
    """Each channel by itself."""
    names = ("weight", "bias", "running_mean", "running_var")
    result = _per_channel(call, call["input"], [call.arguments.get(name) for name in names])
    if call.single:
        return result
    return (result, *(Value(shape) for shape in call.shapes[1:]))


@rule("group_norm")
def group_norm(call: Call) -> Outcome:
    """Channels within a group, and groups as wholes."""
    x, groups = call["input"], call["num_groups"]
    channels, _ = take_vector(call.labels, x, 1, "", whole=True)
    if groups == 1:
        call.labels.tag(channels)
    elif groups < len(channels):
        call.labels.blocks(channels.reshape(groups, -1))
    return _per_channel(call, x, [call["weight"], call["bias"]])


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Outcome:
    """All neurons of an axis together."""
    x = call["input"]
    last = tuple(range(len(x.shape) - len(call["normalized_shape"]), len(x.shape)))
    for grid in x.factors:
        axes = [a for a in range(grid.ndim) if grid.shape[a] > 1]
        within = [a for a in axes if a in last]
        if within == axes and axes:
            call.labels.tag(grid)
        elif within:
            blocks_of(call.labels, grid, *within)
    parameters = [v for v in (call["weight"], call.arguments.get("bias")) if v is not None]
    return settle(call.labels, call.shape, [np.asarray(g) for g in met(call.labels, [x, *parameters], call.shape)])
