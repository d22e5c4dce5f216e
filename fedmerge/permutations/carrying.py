"""Neurons mixed, dropped or added: states carried from one set of widths to another by matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.errors import ModelError
from fedmerge.permutations.spec import PermutationSpec, Site
from fedmerge.state import State, accumulator_dtype, editable

__all__ = ["Plan", "Plans", "carry", "carry_line", "transport", "unfolded"]


@dataclass(frozen=True, eq=False)
class Plan:
    """How n_old neurons of a group become n_new.

    Parameters
    ----------
    produce
        [n_new, n_old], new neurons as mixtures of old ones: rows that sum to 1 make means. It acts wherever
        neurons come out of a tensor.
    consume
        [n_new, n_old], how an old neuron's outgoing weights are spread over new ones: columns that sum to 1
        lose nothing. It acts wherever a tensor takes neurons in.
    """

    produce: Tensor
    consume: Tensor


Plans = Mapping[int, Plan]


def transport(spec: PermutationSpec, state: State, plans: Plans) -> dict[str, Tensor]:
    """Carry a state over, at most one matrix for each position of an axis.

    Parameters
    ----------
    spec
        The symmetries of the state's own architecture and widths.
    state
        Tensors; what has no neurons of planned groups is passed on.
    plans
        By index of a group of `spec`; groups without a plan stay as they are.

    Raises
    ------
    ModelError
        A group whose width would change stands on an axis in an order that cannot be continued.

    Examples
    --------
    >>> from fedmerge.permutations import trace
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> spec = trace(model, torch.zeros(2, 4))
    >>> twice = torch.eye(3).repeat(2, 1)
    >>> wide = transport(spec, model.state_dict(), {0: Plan(twice, twice / 2)})
    >>> wide["0.weight"].shape, wide["2.weight"].shape
    (torch.Size([6, 4]), torch.Size([2, 6]))
    """
    carried = editable(state)
    for (name, axis), standing in spec.touching.items():
        planned = [(plans[i], site) for i, site in standing if i in plans]
        if planned and name in carried:
            carried[name] = carry(carried[name], axis, planned)
    for alias, name in spec.aliases.items():
        if alias in carried:
            carried[alias] = carried[name]
    return carried


def carry(tensor: Tensor, axis: int, planned: list[tuple[Plan, Site]]) -> Tensor:
    """One tensor along one axis, on which the groups of these plans stand."""
    moved = unfolded(tensor, planned[0][1])
    positions, length = _new_positions(len(moved), [(site, len(plan.produce)) for plan, site in planned])
    old_free = torch.ones(len(moved), dtype=torch.bool)
    new_free = torch.ones(length, dtype=torch.bool)
    for (_, site), new in zip(planned, positions, strict=True):
        old_free[site.positions] = False
        new_free[new] = False
    carried = moved.new_empty((length, *moved.shape[1:]))
    carried[new_free.to(moved.device)] = moved[old_free.to(moved.device)]
    for (plan, site), new in zip(planned, positions, strict=True):
        matrix = plan.consume if site.role == "in" else plan.produce
        dtype = accumulator_dtype(moved.dtype)
        old = moved[site.positions.ravel().to(moved.device)].to(dtype).reshape(len(site.positions), -1)
        mixed = matrix.to(old) @ old
        carried[new.ravel().to(moved.device)] = mixed.reshape(new.numel(), *moved.shape[1:]).to(moved.dtype)
    groups = planned[0][1].groups
    if groups == 1:
        return carried.movedim(0, axis)
    if length != len(moved):
        raise ModelError(f"the width of {planned[0][1].parameter!r}, a grouped convolution, cannot change")
    return carried.reshape(groups, -1, *carried.shape[1:]).transpose(1, 2).flatten(0, 1)


def carry_line(line: Tensor, planned: list[tuple[Plan, Site]]) -> Tensor:
    """One number for each position of an axis, carried as a tensor is along that axis.

    Examples
    --------
    >>> site = Site("conv.weight", 1, torch.arange(2)[:, None])
    >>> carry_line(torch.tensor([1.0, 2.0]), [(Plan(torch.eye(2).flip(0), torch.eye(2).flip(0)), site)])
    tensor([2., 1.])
    """
    return carry(line, 0, [(plan, replace(site, axis=0, groups=1)) for plan, site in planned])


def unfolded(tensor: Tensor, site: Site) -> Tensor:
    """A tensor with the axis of a site first, over all groups of a grouped convolution.

    Examples
    --------
    >>> unfolded(torch.zeros(8, 3, 5, 5), Site("conv.weight", 1, torch.arange(6)[:, None], "in", 2)).shape
    torch.Size([6, 4, 5, 5])
    """
    if site.groups == 1:
        return tensor.movedim(site.axis, 0)
    return tensor.reshape(site.groups, -1, *tensor.shape[1:]).transpose(1, 2).flatten(0, 1)


def _new_positions(length: int, standing: list[tuple[Site, int]]) -> tuple[list[Tensor], int]:
    """Where groups of new sizes stand on an axis of this length, in the order in which they stood."""
    runs = []  # (first position, old length, which site, which slots)
    for number, (site, size) in enumerate(standing):
        n, k = site.positions.shape
        if size == n:
            continue
        first = site.positions[0]
        if torch.equal(site.positions, first[0] + torch.arange(n * k).reshape(n, k)):
            runs.append((int(first[0]), n * k, number, slice(None)))
        elif torch.equal(site.positions, first[None] + torch.arange(n)[:, None]):
            runs += [(int(first[s]), n, number, slice(s, s + 1)) for s in range(k)]
        else:
            raise ModelError(f"the width of {site.parameter!r} along axis {site.axis} cannot change: its neurons mix")
    shift = torch.zeros(length + 1, dtype=torch.long)
    for start, old, number, slots in runs:
        site, size = standing[number]
        shift[start + old :] += size * site.positions[:, slots].shape[1] - old
    positions = []
    for number, (site, size) in enumerate(standing):
        n, k = site.positions.shape
        if size == n:
            positions.append(site.positions + shift[site.positions])
            continue
        new = torch.empty(size, k, dtype=torch.long)
        for start, _, owner, slots in runs:
            if owner == number:
                slots_count = new[:, slots].shape[1]
                base = start + int(shift[start])
                new[:, slots] = base + torch.arange(size * slots_count).reshape(size, slots_count)
        positions.append(new)
    return positions, length + int(shift[length])
