"""Models whose layers grow by matching: into global coordinates, and to a mean of those who have a neuron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.permutations.carrying import Plan, carry_line, transport
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.state import State, accumulator_dtype

__all__ = ["class_weighted", "filled", "membership", "outputs"]


def membership(assigned: Tensor, size: int) -> Plan:
    """The plan that puts neuron l at place ``assigned[l]`` of `size`, zeros at the places of others."""
    matrix = torch.zeros(size, len(assigned), dtype=torch.float64)
    matrix[assigned, torch.arange(len(assigned))] = 1
    return Plan(matrix, matrix)


def filled(
    specs: Sequence[PermutationSpec],
    states: Sequence[State],
    weights: Sequence[float],
    plans: Sequence[Mapping[int, Plan]],
) -> list[dict[str, Tensor]]:
    """Every client in global coordinates; neurons that it lacks have the weighted mean of the others' there.

    A plain weighted mean of the results is then, neuron by neuron, the mean of those who have it. What a neuron
    takes from one that its client lacks is 0.
    """
    carried = [transport(spec, state, plan) for spec, state, plan in zip(specs, states, plans, strict=True)]
    for name in carried[0]:
        axis = _out_axis(specs[0], name)
        if axis is None or not carried[0][name].is_floating_point():
            continue
        has = [_has(spec, state[name], name, axis, p) for spec, state, p in zip(specs, states, plans, strict=True)]
        if all(bool((h == 1).all()) for h in has):
            continue
        dtype = accumulator_dtype(carried[0][name].dtype)
        total = sum(w * c[name].to(dtype) for w, c in zip(weights, carried, strict=True))
        share = sum(w * h for w, h in zip(weights, has, strict=True))
        mean = torch.as_tensor(total) / torch.as_tensor(share).to(carried[0][name].device)
        for state, h in zip(carried, has, strict=True):
            state[name] = torch.where(h.to(mean.device) > 0, state[name].to(dtype), mean).to(state[name].dtype)
    return carried


def _out_axis(spec: PermutationSpec, name: str) -> int | None:
    """The axis along which neurons come out of a tensor."""
    for (other, axis), standing in spec.touching.items():
        if other == name and any(site.role == "out" for _, site in standing):
            return axis
    return None


def _has(spec: PermutationSpec, tensor: Tensor, name: str, axis: int, plans: Mapping[int, Plan]) -> Tensor:
    """1 where a client has the neuron, else 0, to be broadcast along the axis."""
    standing = [(plans[i], site) for i, site in spec.touching[name, axis] if i in plans]
    ones = torch.ones(tensor.shape[axis], dtype=torch.float64)
    mask = carry_line(ones, standing) if standing else ones
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return mask.reshape(shape)


def outputs(spec: PermutationSpec, state: State, classes: int) -> list[str]:
    """Tensors with a row for each class: the weights that take neurons in and let none out, and their biases."""
    sites = []
    for (name, axis), standing in spec.touching.items():
        takes = all(site.role == "in" for _, site in standing)
        if axis == 1 and takes and (name, 0) not in spec.touching and name in state and state[name].shape[0] == classes:
            sites.append(name)
            bias = name.removesuffix("weight") + "bias"
            if name.endswith("weight") and bias in state and state[bias].shape == (classes,):
                sites.append(bias)
    return sites


def class_weighted(
    states: Sequence[dict[str, Tensor]], names: Sequence[str], weights: Sequence[float], counts: Tensor
) -> None:
    """Scale rows of these tensors, in place, so that a plain weighted mean weighs each class by who has seen it.

    Row c of client j counts with ``n_jc / sum_k n_kc`` (Wang et al. 2020); a class that nobody has seen is averaged.

    Parameters
    ----------
    counts
        [clients, classes].
    """
    shares = torch.tensor(weights, dtype=torch.float64)[:, None] / sum(weights)
    seen = counts.double().cpu()
    wanted = torch.where(seen.sum(0) > 0, seen / seen.sum(0).clamp_min(1), shares)
    for name in names:
        for state, factor in zip(states, wanted / shares, strict=True):
            tensor = state[name]
            shape = [-1] + [1] * (tensor.ndim - 1)
            wide = tensor.to(accumulator_dtype(tensor.dtype))  # a class of one client in a thousand outgrows half
            state[name] = wide * factor.to(wide).reshape(shape)
