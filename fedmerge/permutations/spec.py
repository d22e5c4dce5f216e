"""Which neurons of a model may be re-ordered without changing what it computes, and how to re-order them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.state import State, editable

__all__ = ["Group", "PermutationSpec", "Site", "reordered"]


@dataclass(frozen=True, eq=False)
class Site:
    """Where the neurons of a group stand on one axis of one tensor.

    Parameters
    ----------
    parameter
        Name of the tensor in the ``state_dict``.
    axis
        One of its axes.
    positions
        [n, k], neuron i owns positions ``positions[i]`` of the axis: k is 1 for the rows of a linear layer, H*W for
        its columns behind a flatten, 4 for the gates of an LSTM.
    role
        ``"in"`` where the tensor takes the neurons in, as the columns of a linear layer do; else ``"out"``, also
        where it does both, as an embedding that is the output's weight too. It matters only where neurons are mixed,
        not where they are re-ordered.
    groups
        Axis 1 of a grouped convolution's weight holds other neurons for each group of rows: then positions count
        them all, those of the first group first; else 1.
    """

    parameter: str
    axis: int
    positions: Tensor
    role: Literal["in", "out"] = "out"
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Group:
    """Neurons that may be exchanged with each other.

    Parameters
    ----------
    name
        Of the first tensor that they are rows of.
    size
        How many they are.
    sites
        All places where they stand.
    inner
        Where the neurons are blocks (heads of attention, groups of a norm): for each, the indices of the groups
        within it, in an order that is the same for all blocks.
    """

    name: str
    size: int
    sites: tuple[Site, ...]
    inner: tuple[tuple[int, ...], ...] = ()


def reordered(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """A tensor whose axis is re-ordered: place i gets what stood at ``index[i]``.

    An index longer than the axis is about a grouped convolution, whose rows are moved by themselves: of each group of
    rows, it re-orders the columns.

    Examples
    --------
    >>> weight = torch.arange(8).reshape(4, 2)
    >>> reordered(weight, 1, torch.tensor([0, 1, 3, 2]))
    tensor([[0, 1],
            [2, 3],
            [5, 4],
            [7, 6]])
    """
    index = index.to(tensor.device)
    size = tensor.shape[axis]
    if len(index) == size:
        return tensor.index_select(axis, index)
    groups = len(index) // size
    rows = tensor.reshape(groups, -1, *tensor.shape[1:])
    columns = index.reshape(groups, size) % size
    return torch.cat([part.index_select(axis, own) for part, own in zip(rows, columns, strict=True)])


@dataclass(frozen=True, eq=False)
class PermutationSpec:
    """The permutation symmetries of an architecture.

    A permutation ``p`` of a group puts neuron ``p[i]`` in place i. A list of permutations, one for each group, acts
    on groups within blocks first and on the blocks then.

    Parameters
    ----------
    groups
        From input to output; groups within blocks stand before the blocks.
    shapes
        Of the tensors that the spec is about.
    pinned
        Why an axis, ``(parameter, axis)``, or part of it stays as it is.
    aliases
        Further names of shared tensors.
    unknown
        Operators without a rule that touched neurons, which are pinned for it.

    Examples
    --------
    Written by hand, for two linear layers:

    >>> hidden = torch.arange(3)[:, None]
    >>> spec = PermutationSpec((Group("a", 3, (Site("a.weight", 0, hidden), Site("b.weight", 1, hidden, "in"))),))
    >>> state = {"a.weight": torch.tensor([[1.0], [2.0], [3.0]]), "b.weight": torch.tensor([[4.0, 5.0, 6.0]])}
    >>> spec.apply(state, [torch.tensor([2, 0, 1])])["b.weight"]
    tensor([[6., 4., 5.]])
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pinned: Mapping[tuple[str, int], str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def identity(self) -> list[Tensor]:
        """The permutations that leave everything in place."""
        return [torch.arange(group.size) for group in self.groups]

    def random(self, generator: torch.Generator | None = None) -> list[Tensor]:
        """A uniformly random permutation of each group."""
        return [torch.randperm(group.size, generator=generator) for group in self.groups]

    def apply(self, state: State, perms: Sequence[Tensor]) -> dict[str, Tensor]:
        """The state with its neurons re-ordered; it may be part of one, and tensors without neurons are passed on.

        Raises
        ------
        InvalidOption
            The permutations do not fit the groups, or none of the spec's tensors is in the state.
        """
        moved = editable(state)
        gathers = self._gathers(perms)
        if gathers and not any(name in moved for name, _ in gathers):
            raise InvalidOption("the spec is about none of these tensors: trace the model that they are of")
        for (name, axis), index in gathers.items():
            if name in moved:
                moved[name] = reordered(moved[name], axis, index)
        for alias, name in self.aliases.items():
            if alias in moved:
                moved[alias] = moved[name]
        return moved

    def inverse(self, perms: Sequence[Tensor]) -> list[Tensor]:
        """The permutations that undo `perms`."""
        inverted = [torch.argsort(p) for p in perms]
        for group, perm in zip(self.groups, perms, strict=True):
            if group.inner:  # what happened within a block has to be undone where the block has gone
                for place, source in enumerate(perm.tolist()):
                    for here, there in zip(group.inner[place], group.inner[source], strict=True):
                        inverted[here] = torch.argsort(perms[there])
        return inverted

    def compose(self, first: Sequence[Tensor], then: Sequence[Tensor]) -> list[Tensor]:
        """The permutations that do `first` and `then`, one after the other."""
        both = [p[q] for p, q in zip(first, then, strict=True)]
        for group, perm in zip(self.groups, first, strict=True):
            for place, source in enumerate(perm.tolist() if group.inner else []):
                for here, there in zip(group.inner[place], group.inner[source], strict=True):
                    both[there] = first[there][then[here]]
        return both

    @cached_property
    def touching(self) -> Mapping[tuple[str, int], tuple[tuple[int, Site], ...]]:
        """By ``(parameter, axis)``, the groups that stand there, with their sites.

        Columns of grouped convolutions come last, as they are re-ordered where their rows have gone.
        """
        sites: dict[tuple[str, int], tuple[tuple[int, Site], ...]] = {}
        for i, group in enumerate(self.groups):
            for site in group.sites:
                key = (site.parameter, site.axis)
                sites[key] = (*sites.get(key, ()), (i, site))
        return dict(sorted(sites.items(), key=lambda item: item[1][0][1].groups > 1))

    def gather(self, key: tuple[str, int], perms: Sequence[Tensor]) -> Tensor:
        """Which old position comes to each position of an axis."""
        length = self._length(key)
        index = torch.arange(length)
        for i, site in self.touching[key]:
            step = torch.arange(length)
            step[site.positions.ravel()] = site.positions[perms[i]].ravel()
            index = index[step]
        return index

    def _gathers(self, perms: Sequence[Tensor]) -> dict[tuple[str, int], Tensor]:
        if len(perms) != len(self.groups):
            raise InvalidOption(f"{len(perms)} permutations for {len(self.groups)} groups: give one for each")
        for group, perm in zip(self.groups, perms, strict=True):
            if perm.shape != (group.size,):
                raise InvalidOption(f"group {group.name!r} has {group.size} neurons, its permutation {len(perm)}")
        return {key: self.gather(key, perms) for key in self.touching}

    def _length(self, key: tuple[str, int]) -> int:
        groups = self.touching[key][0][1].groups
        if key[0] in self.shapes:
            return self.shapes[key[0]][key[1]] * groups
        return max(int(site.positions.max()) for _, site in self.touching[key]) + 1

    def describe(self) -> str:
        """Which neurons are free and where they stand, and which are pinned and why, as text."""
        lines = []
        for i, group in enumerate(self.groups):
            inside = f", blocks of groups {list(group.inner[0])}, ..." if group.inner else ""
            lines.append(f"group {i} {group.name!r}: {group.size} neurons{inside}")
            for site in group.sites:
                each = site.positions.shape[1]
                many = "" if each == 1 else f", {each} positions each"
                lines.append(f"    {site.parameter} axis {site.axis}{many}")
        for (name, axis), reason in self.pinned.items():
            lines.append(f"pinned {name} axis {axis}: {reason}")
        lines += [f"no rule for {operator}: all that it touches is pinned" for operator in self.unknown]
        return "\n".join(lines)
