"""Blocks, and what crosses other groups, matched by what makes them, without mixing."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from fedmerge.errors import ModelError
from fedmerge.matching.assignment import Shared, assign_blocks
from fedmerge.matching.features import incoming
from fedmerge.matching.optimal_transport import distances
from fedmerge.matching.units import Unit
from fedmerge.permutations.carrying import Plans, carry
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.state import State, accumulator_dtype

__all__ = ["match_blocks"]

_Side = tuple[PermutationSpec, State, Unit]


def match_blocks(target: _Side, source: _Side, done: Collection[int], plans: Plans) -> list[Tensor]:
    """Permutations of one unit of the source that bring it nearest to the target's, all other groups staying.

    Nearness is minus the sum of squared distances between what goes into neurons, of tensors whose inputs are settled.

    Parameters
    ----------
    target, source
        Spec, parameters and unit of each.
    done
        Groups that are settled.
    plans
        How settled groups of the source are carried to the target's, where they are not in place.

    Raises
    ------
    ModelError
        The two have other numbers or sizes of blocks.
    """
    (spec_a, a, unit_a), (spec_b, b, unit_b) = target, source
    gains = []
    parts = [(unit_a.sites, unit_b.sites), *zip(unit_a.kind_sites, unit_b.kind_sites, strict=True)]
    sizes = [unit_b.size, *(unit_b.size * spec_b.groups[kind[0]].size for kind in unit_b.kinds)]
    for (sites_a, sites_b), size in zip(parts, sizes, strict=True):
        if any(one.positions.shape != other.positions.shape for one, other in zip(sites_a, sites_b, strict=True)):
            raise ModelError(
                f"the blocks of {spec_b.groups[unit_b.index].name!r} (heads, or groups of a norm) differ "
                "between clients in number or size: they cannot be merged"
            )
        ours = incoming(spec_a, a, sites_a, done, {}, unit_a.crossed)
        theirs = incoming(spec_b, {n: b[n] for n in a}, sites_b, done, plans, unit_b.crossed)
        known = ours.numel() and theirs.numel()
        gains.append(-distances(ours, theirs).square() if known else ours.new_zeros(size, size, dtype=torch.float64))
    kinds = [
        gain.reshape(unit_b.size, len(gain) // unit_b.size, unit_b.size, -1)
        for gain in gains[1:]
    ]  # fmt: skip
    shared = list(_shared(target, source, done, plans))
    return unit_b.placed(spec_b, *assign_blocks(gains[0], kinds, shared))


def _shared(target: _Side, source: _Side, done: Collection[int], plans: Plans) -> Iterator[Shared]:
    """What makes members of two kinds at once."""
    (_, a, unit_a), (spec, b, unit_b) = target, source
    for ours, theirs in zip(unit_a.crossings, unit_b.crossings, strict=True):
        name = theirs.parameter
        if name not in a or not unit_b.made_of(spec, theirs, done):
            continue
        tensor = b[name]
        for (other, axis), standing in spec.touching.items():
            planned = [(plans[i], site) for i, site in standing if i in plans and other == name]
            if planned and axis != theirs.axis:
                tensor = carry(tensor, axis, planned)
        dtype = accumulator_dtype(tensor.dtype)
        yield Shared(theirs.kinds, ours.features(a[name].to(dtype)), theirs.features(tensor.to(dtype)), True)
