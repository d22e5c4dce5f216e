"""What a neuron looks like in the weights: everything that goes into it and comes out of it, site by site."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from fedmerge.matching.assignment import Shared
from fedmerge.matching.units import Unit, units
from fedmerge.permutations.carrying import Plans, carry, unfolded
from fedmerge.permutations.spec import PermutationSpec, Site, reordered
from fedmerge.state import State, accumulator_dtype

__all__ = ["Unit", "WeightSimilarity", "incoming", "rows", "units"]


_NOTHING = 1e-12


def rows(tensor: Tensor, site: Site, others: Mapping[int, Tensor]) -> Tensor:
    """Features [n, k * rest] of a site's neurons, the tensor's axes re-ordered by `others` first."""
    return _without_nothing(_rows(tensor, site, others))


def _rows(tensor: Tensor, site: Site, others: Mapping[int, Tensor]) -> Tensor:
    for axis, index in sorted(others.items()):
        tensor = reordered(tensor, axis, index)
    moved = unfolded(tensor, site)
    n, k = site.positions.shape
    if k == 1 and n == len(moved) and torch.equal(site.positions[:, 0], torch.arange(n)):
        flat = moved.reshape(n, -1)  # all of them in order: nothing to copy
    else:
        flat = moved[site.positions.ravel().to(moved.device)].reshape(n, -1)
    return flat.to(accumulator_dtype(flat.dtype))


def _without_nothing(tensor: Tensor) -> Tensor:
    """Weights of inputs that are always 0 decay to nothing; squares of nothing are denormal, and slow."""
    small = tensor.abs() < _NOTHING
    return torch.where(small, 0.0, tensor) if bool(tensor[small].any()) else tensor


def incoming(
    spec: PermutationSpec,
    state: State,
    sites: Sequence[Site],
    done: Collection[int],
    plans: Plans,
    crossed: Mapping[tuple[str, int], Sequence[int]] = MappingProxyType({}),
) -> Tensor:
    """[n, f]: all that makes these neurons, of tensors whose inputs are settled already.

    Parameters
    ----------
    sites
        Of one group.
    done
        Groups that are settled; tensors that take in others are left out.
    plans
        How settled groups are carried over to new widths, by index.
    crossed
        Groups of other units at the same positions, which have to be settled too.
    """
    parts = []
    for site in sites:
        name = site.parameter  # a tensor with the group itself at its other end is left out as well
        others = [
            (axis, standing)
            for (other, axis), standing in spec.touching.items()
            if other == name and axis != site.axis and name in state
        ]
        crossing = crossed.get((name, site.axis), ())
        if any(i not in done for i in crossing):
            continue
        if site.role == "in" or name not in state or any(i not in done for _, all_ in others for i, _ in all_):
            continue
        tensor = state[name]
        for axis, standing in others:
            planned = [(plans[i], s) for i, s in standing if i in plans]
            tensor = carry(tensor, axis, planned) if planned else tensor
        parts.append(rows(tensor, site, {}))
    return torch.cat(parts, 1) if parts else torch.zeros(len(sites[0].positions) if sites else 0, 0)


class WeightSimilarity:
    """Inner products of the neurons of two models, under permutations of the second that change step by step."""

    def __init__(self, spec: PermutationSpec, a: State, b: State, perms: list[Tensor]) -> None:
        self.spec, self.perms = spec, perms
        names = dict.fromkeys(name for name, _ in spec.touching)
        self.a, self.b = ({n: _without_nothing(s[n]) for n in names if n in a and n in s} for s in (a, b))
        self._axes: dict[str, list[int]] = {}
        for name, axis in spec.touching:
            self._axes.setdefault(name, []).append(axis)
        self._index = {key: spec.gather(key, perms) for key in spec.touching}
        self._version = dict.fromkeys(spec.touching, 0)
        self._kept: dict[tuple[int, str, int, int], tuple[tuple[int, ...], Tensor]] = {}

    @cached_property
    def units(self) -> list[Unit]:
        """What is assigned together."""
        return units(self.spec)

    def change(self, unit: Unit, perms: Mapping[int, Tensor]) -> None:
        """Put other permutations in place."""
        for i, perm in perms.items():
            self.perms[i] = perm
        for site in self.spec.groups[unit.index].sites:
            key = (site.parameter, site.axis)
            self._index[key] = self.spec.gather(key, self.perms)
            self._version[key] += 1

    def of(self, sites: Sequence[Site], size: int, unit: Unit) -> Tensor:
        """[n, n] sums over sites of a unit, neurons of the second model in the order that they came in."""
        similarity = torch.zeros(size, size, dtype=torch.float64)
        for site in sites:
            if site.parameter in self.a:
                similarity = similarity.to(self.a[site.parameter].device)
                similarity += self._site(unit, site)
        return similarity

    def _site(self, unit: Unit, site: Site) -> Tensor:
        name = site.parameter
        crossed = (name, site.axis) in unit.crossed
        others = {axis: self._index[name, axis] for axis in self._axes[name] if axis != site.axis}
        version = tuple(self._version[name, axis] for axis in self._axes[name] if axis != site.axis or crossed)
        key = (unit.index, name, site.axis, int(site.positions[0, 0]))
        known = self._kept.get(key)
        if known is None or known[0] != version:
            if crossed:
                others[site.axis] = self._without(unit, (name, site.axis))
            known = (version, (_rows(self.a[name], site, {}) @ _rows(self.b[name], site, others).T).double())
            self._kept[key] = known
        return known[1]

    def _without(self, unit: Unit, key: tuple[str, int]) -> Tensor:
        """How an axis is re-ordered by all units but this one."""
        members = set(unit.members)
        perms = [torch.arange(len(p)) if i in members else p for i, p in enumerate(self.perms)]
        return self.spec.gather(key, perms)

    def crossings(self, unit: Unit, done: Collection[int] | None = None) -> list[Shared]:
        """What the two models have in common where kinds of members cross; with `done`, of what makes the unit."""
        crossings = []
        for crossing in unit.crossings:
            name = crossing.parameter
            if name not in self.a or (done is not None and not unit.made_of(self.spec, crossing, done)):
                continue
            b = self.b[name]
            for axis in self._axes[name]:
                b = reordered(b, axis, self._without(unit, (name, axis)))
            ours, theirs = (crossing.features(t.to(accumulator_dtype(t.dtype))) for t in (self.a[name], b))
            crossings.append(Shared(crossing.kinds, ours, theirs))
        return crossings

    def objective(self, names: Sequence[str] | None = None) -> float:
        """``sum <a, P(b)>`` over tensors that have neurons."""
        objective = 0.0
        for name in names if names is not None else self._axes:
            if name in self.a and name not in self.spec.aliases:
                tensor = self.b[name]
                for axis in self._axes[name]:
                    tensor = reordered(tensor, axis, self._index[name, axis])
                objective += float((self.a[name].double() * tensor.double()).sum())
        return objective
