"""What a neuron looks like in the weights: everything that goes into it and comes out of it, site by site."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fedmerge.permutations.spec import PermutationSpec, Site
from fedmerge.permutations.transport import Plans, carry
from fedmerge.state import State, accumulator_dtype

__all__ = ["Unit", "WeightSimilarity", "incoming", "rows", "units"]


_NOTHING = 1e-12


class Unit:
    """Groups that are assigned together: one alone, or blocks with the groups within them."""

    def __init__(self, spec: PermutationSpec, index: int) -> None:
        group = spec.groups[index]
        self.index = index
        self.size = group.size
        self.kinds: list[tuple[int, ...]] = list(zip(*group.inner, strict=True)) if group.inner else []
        self.members = [index, *(g for kind in self.kinds for g in kind)]
        self.kind_sites = [list(_stacked(spec, kind)) for kind in self.kinds]
        inside = {(s.parameter, s.axis) for kind in self.kinds for s in spec.groups[kind[0]].sites}
        self.sites = [s for s in group.sites if (s.parameter, s.axis) not in inside]
        names = [s.parameter for s in group.sites]
        self.twice = len(names) != len(set(names))
        """Whether it stands on two axes of one tensor, as recurrent units do: then pairs interact."""

    def placed(self, spec: PermutationSpec, outer: Tensor, within: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Permutations of all groups from what :func:`~fedmerge.matching.assignment.assign_blocks` found."""
        perms = spec.identity()
        perms[self.index] = outer
        for kind, found in zip(self.kinds, within, strict=True):
            for place, source in enumerate(outer.tolist()):
                perms[kind[source]] = found[place]
        return perms


def _stacked(spec: PermutationSpec, kind: Sequence[int]) -> Iterator[Site]:
    """The sites of one kind of members, those of all blocks in one."""
    for parts in zip(*(spec.groups[g].sites for g in kind), strict=True):
        yield Site(parts[0].parameter, parts[0].axis, torch.cat([p.positions for p in parts]), parts[0].role)


def units(spec: PermutationSpec) -> list[Unit]:
    """All groups of a spec, in order, groups within blocks being part of their blocks."""
    within = {g for group in spec.groups for block in group.inner for g in block}
    return [Unit(spec, i) for i in range(len(spec.groups)) if i not in within]


def rows(tensor: Tensor, site: Site, others: Mapping[int, Tensor]) -> Tensor:
    """Features [n, k * rest] of a site's neurons, the tensor's other axes re-ordered by `others`."""
    return _without_nothing(_rows(tensor, site, others))


def _rows(tensor: Tensor, site: Site, others: Mapping[int, Tensor]) -> Tensor:
    for axis, index in others.items():
        if axis != site.axis:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    moved = tensor.movedim(site.axis, 0)
    n, k = site.positions.shape
    if k == 1 and n == len(moved) and torch.equal(site.positions[:, 0], torch.arange(n)):
        found = moved.reshape(n, -1)  # all of them in order: nothing to copy
    else:
        found = moved[site.positions.ravel().to(moved.device)].reshape(n, -1)
    return found.to(accumulator_dtype(found.dtype))


def _without_nothing(tensor: Tensor) -> Tensor:
    """Weights of inputs that are always 0 decay to nothing; squares of nothing are denormal, and slow."""
    small = tensor.abs() < _NOTHING
    return torch.where(small, 0.0, tensor) if bool(tensor[small].any()) else tensor


def incoming(spec: PermutationSpec, state: State, sites: Sequence[Site], done: Collection[int], plans: Plans) -> Tensor:
    """[n, f]: all that makes these neurons, of tensors whose inputs are settled already.

    Parameters
    ----------
    sites
        Of one group.
    done
        Groups that are settled; tensors that take in others are left out.
    plans
        How settled groups are carried over to new widths, by index.
    """
    parts = []
    for site in sites:
        name = site.parameter  # a tensor with the group itself at its other end is left out as well
        others = [
            (axis, standing)
            for (other, axis), standing in spec.touching.items()
            if other == name and axis != site.axis and name in state
        ]
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
        self._kept: dict[tuple[str, int, int], tuple[tuple[int, ...], Tensor]] = {}

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

    def of(self, sites: Sequence[Site], size: int) -> Tensor:
        """[n, n] sums over sites, neurons of the second model in the order that they came in."""
        found = torch.zeros(size, size, dtype=torch.float64)
        for site in sites:
            if site.parameter in self.a:
                found = found.to(self.a[site.parameter].device)
                found += self._site(site)
        return found

    def _site(self, site: Site) -> Tensor:
        name = site.parameter
        others = {axis: self._index[name, axis] for axis in self._axes[name] if axis != site.axis}
        version = tuple(self._version[name, axis] for axis in others)
        key = (name, site.axis, int(site.positions[0, 0]))
        known = self._kept.get(key)
        if known is None or known[0] != version:
            known = (version, (_rows(self.a[name], site, {}) @ _rows(self.b[name], site, others).T).double())
            self._kept[key] = known
        return known[1]

    def objective(self, names: Sequence[str] | None = None) -> float:
        """``sum <a, P(b)>`` over tensors that have neurons."""
        found = 0.0
        for name in names if names is not None else self._axes:
            if name in self.a and name not in self.spec.aliases:
                tensor = self.b[name]
                for axis in self._axes[name]:
                    tensor = tensor.index_select(axis, self._index[name, axis].to(tensor.device))
                found += float((self.a[name].double() * tensor.double()).sum())
        return found
