"""What is assigned together: a group alone, or blocks with the groups within them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmerge.errors import BadUpdate, CannotMatch
from fedmerge.permutations.spec import PermutationSpec, Site

if TYPE_CHECKING:
    from fedmerge.update import ClientUpdate

__all__ = ["Crossing", "Unit", "check_forms", "units"]


@dataclass(frozen=True, eq=False)
class Crossing:
    """Entries of a tensor that belong to members of two kinds at once, so that each kind's match needs the other's.

    Parameters
    ----------
    parameter
        Name of the tensor.
    axis
        Both kinds stand on this axis, as heads of one key and its dimensions do; None for the weight of a grouped
        convolution, where one kind are rows and the other are columns.
    kinds
        Their numbers.
    places
        [blocks, members of the first kind, members of the second, k] indices along the axis, or of entries
        ``row * columns + column``.
    """

    parameter: str
    axis: int | None
    kinds: tuple[int, int]
    places: Tensor

    def features(self, tensor: Tensor) -> Tensor:
        """[blocks, members, members, f] of a tensor."""
        entries = tensor.flatten(0, 1) if self.axis is None else tensor.movedim(self.axis, 0)
        taken = entries[self.places.ravel().to(tensor.device)]
        return taken.reshape(*self.places.shape[:3], -1)


class Unit:
    """Groups that are assigned together: one alone, or blocks with the groups within them."""

    def __init__(self, spec: PermutationSpec, index: int) -> None:
        group = spec.groups[index]
        self.index = index
        self.size = group.size
        self.kinds: list[tuple[int, ...]] = list(zip(*group.inner, strict=True)) if group.inner else []
        self.members = [index, *(g for kind in self.kinds for g in kind)]
        stacked = [list(_stacked(spec, kind)) for kind in self.kinds]
        self.sites = list(_left(group.sites, [s for sites in stacked for s in sites]))
        self.crossings = list(_crossings(spec, self.size, stacked))
        self.kind_sites = [list(_uncrossed(sites, k, self.crossings)) for k, sites in enumerate(stacked)]
        names = [s.parameter for s in group.sites]
        self.twice = len(names) != len(set(names))
        """Whether it stands on two axes of one tensor, as recurrent units do: then pairs interact."""
        self.crossed = _crossed(spec, self.members, [*self.sites, *(s for sites in self.kind_sites for s in sites)])
        """Where groups of other units move the same positions, by parameter and axis: these groups."""

    @property
    def simple(self) -> bool:
        """Whether its neurons may be mixed: no blocks, and no other groups at the same positions."""
        return not self.kinds and not self.crossed and all(site.groups == 1 for site in self.sites)

    def placed(self, spec: PermutationSpec, outer: Tensor, within: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Permutations of all groups from what :func:`~fedmerge.matching.assignment.assign_blocks` found."""
        perms = spec.identity()
        perms[self.index] = outer
        for kind, position in zip(self.kinds, within, strict=True):
            for place, source in enumerate(outer.tolist()):
                perms[kind[source]] = position[place]
        return perms

    def made_of(self, spec: PermutationSpec, crossing: Crossing, done: Collection[int]) -> bool:
        """Whether a crossing is among what makes this unit: of tensors whose inputs, if not its own, are settled."""
        members = set(self.members)
        for (name, axis), standing in spec.touching.items():
            if name != crossing.parameter:
                continue
            own = [site for i, site in standing if i in members]
            if axis == crossing.axis and any(site.role == "in" for site in own):
                return False
            if not own and any(i not in done for i, _ in standing):
                return False
        return True


def _stacked(spec: PermutationSpec, kind: Sequence[int]) -> Iterator[Site]:
    """The sites of one kind of members, those of all blocks in one."""
    for parts in zip(*(spec.groups[g].sites for g in kind), strict=True):
        yield replace(parts[0], positions=torch.cat([p.positions for p in parts]))


def _left(sites: Sequence[Site], taken: Sequence[Site]) -> Iterator[Site]:
    """Of these sites, the positions at which none of the taken ones stand."""
    for site in sites:
        gone = [t.positions.ravel() for t in taken if (t.parameter, t.axis) == (site.parameter, site.axis)]
        if not gone:
            yield site
            continue
        kept = ~torch.isin(site.positions, torch.cat(gone))
        if kept.any():
            yield replace(site, positions=site.positions[kept].reshape(len(site.positions), -1))


def _crossings(spec: PermutationSpec, blocks: int, stacked: Sequence[Sequence[Site]]) -> Iterator[Crossing]:
    """What two kinds of members have in common, on one axis or in the weight of a grouped convolution."""
    standing = [(k, site) for k, sites in enumerate(stacked) for site in sites]
    for a, crossing in standing:
        for b, other in standing:
            if a == b or crossing.parameter != other.parameter:
                continue
            if a < b and crossing.axis == other.axis:
                places, axis = _shared(crossing.positions, other.positions, blocks), crossing.axis
            elif crossing.groups > 1 and other.axis == 0:
                places, axis = _entries(spec.shapes[crossing.parameter], crossing, other, blocks), None
            else:
                continue
            if places is not None:
                yield Crossing(crossing.parameter, axis, (a, b), places)


def _shared(first: Tensor, other: Tensor, blocks: int) -> Tensor | None:
    """[blocks, n, m, k] positions that rows of both have in common; None where there are none."""
    row = torch.full((int(max(first.max(), other.max())) + 1,), -1)
    row[other.ravel()] = torch.arange(len(other)).repeat_interleave(other.shape[1])
    owner = row[first]
    if not bool((owner >= 0).any()):
        return None
    kept = []
    for positions, rows in zip(first, owner, strict=True):
        order = torch.argsort(rows, stable=True)
        kept.append(positions[order[rows[order] >= 0]])
    return torch.stack(kept).reshape(blocks, len(first) // blocks, len(other) // blocks, -1)


def _entries(shape: Sequence[int], columns: Site, rows: Site, blocks: int) -> Tensor | None:
    """[blocks, n, m, k] entries of a grouped convolution's weight; None where rows have other columns."""
    each, height = shape[1], shape[0] // columns.groups
    column = columns.positions.reshape(blocks, -1, 1, columns.positions.shape[1], 1)
    row = rows.positions.reshape(blocks, 1, -1, 1, rows.positions.shape[1])
    together = column // each == row // height
    if not bool(together.any()):
        return None
    entries = (row * each + column % each)[together]
    return entries.reshape(blocks, column.shape[1], row.shape[2], -1)


def _uncrossed(sites: Sequence[Site], kind: int, crossings: Sequence[Crossing]) -> Iterator[Site]:
    """Of the sites of a kind, what is in no crossing."""
    own = [c for c in crossings if kind in c.kinds]
    for site in sites:
        shared = [c.places.ravel() for c in own if c.parameter == site.parameter and c.axis == site.axis]
        entries = [c for c in own if c.parameter == site.parameter and c.axis is None]
        if shared:
            kept = ~torch.isin(site.positions, torch.cat(shared))
            if kept.any():
                yield replace(site, positions=site.positions[kept].reshape(len(site.positions), -1))
        elif not entries or (site.groups == 1 and site.axis != 0):
            yield site


def _crossed(spec: PermutationSpec, members: Sequence[int], sites: Sequence[Site]) -> dict[tuple[str, int], list[int]]:
    places: dict[tuple[str, int], list[int]] = {}
    for site in sites:
        key = (site.parameter, site.axis)
        for i, other in spec.touching[key]:
            if i not in members and bool(torch.isin(other.positions, site.positions).any()):
                places.setdefault(key, []).append(i)
    return places


def check_forms(specs: Sequence[PermutationSpec], updates: Sequence[ClientUpdate]) -> None:
    """Make sure that clients' models differ by the widths of layers only, and not in blocks.

    Raises
    ------
    CannotMatch
        Some differ in more from what most have.
    """
    forms = [_form(spec) for spec in specs]
    usual = Counter(forms).most_common(1)[0][0]
    unlike = [
        BadUpdate(
            update.client,
            "its model differs from most by more than the widths of layers, or has other blocks (heads of attention, "
            "or groups of a norm)",
            "Clients must have as many blocks of the same sizes.",
        )
        for form, update in zip(forms, updates, strict=True)
        if form != usual
    ]
    if unlike:
        raise CannotMatch(unlike)


def _form(spec: PermutationSpec) -> tuple[object, ...]:
    """What is equal in models that differ in widths that can be matched."""
    places = tuple(tuple((s.parameter, s.axis) for s in group.sites) for group in spec.groups)
    blocks = []
    for unit in units(spec):
        sites = [*unit.sites, *(s for kind in unit.kind_sites for s in kind)]
        fixed = not unit.simple
        blocks.append((unit.index, tuple(tuple(s.positions.shape) for s in sites) if fixed else fixed))
    return places, tuple(blocks)


def units(spec: PermutationSpec) -> list[Unit]:
    """All groups of a spec, in order, groups within blocks being part of their blocks."""
    within = {g for group in spec.groups for block in group.inner for g in block}
    return [Unit(spec, i) for i in range(len(spec.groups)) if i not in within]
