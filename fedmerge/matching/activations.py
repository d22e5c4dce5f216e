"""Matching by what neurons say: those are one that correlate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.matching.assignment import assign, assign_blocks
from fedmerge.matching.features import Unit, units
from fedmerge.matching.listening import consumers, moments
from fedmerge.permutations.spec import PermutationSpec

__all__ = ["match_activations"]


def match_activations(
    spec: PermutationSpec, modules: Sequence[nn.Module], inputs: Iterable[Tensor], anchor: int
) -> list[list[Tensor]]:
    """Permutations of each model under which its activations correlate most with the anchor's.

    Raises
    ------
    InvalidOption
        There are no inputs.
    """
    parts = units(spec)
    groups = [consumers(sites) for unit in parts for sites in (unit.sites, *unit.kind_sites)]
    pairs = [(anchor, j) for j in range(len(modules)) if j != anchor]
    found = moments([groups] * len(modules), modules, pairs, inputs)
    if not found and any(groups):
        raise InvalidOption("matching by activations needs inputs on the server: pass data=.")
    perms = [spec.identity() for _ in modules]
    for _, j in pairs:
        number = 0
        for unit in parts:
            heard = [found.get((number + i, anchor, j)) for i in range(1 + len(unit.kinds))]
            number += 1 + len(unit.kinds)
            _assign(unit, [None if h is None else h.correlation() for h in heard], perms[j])
    return perms


def _assign(unit: Unit, heard: Sequence[Tensor | None], perms: list[Tensor]) -> None:
    """Assign one unit from correlations; what could not be heard stays as it is."""
    own = heard[0] if heard[0] is not None else torch.zeros(unit.size, unit.size, dtype=torch.float64)
    if not unit.kinds:
        if heard[0] is not None:
            perms[unit.index] = assign(own)
        return
    kinds = []
    for kind, similarity in zip(unit.kinds, heard[1:], strict=True):
        size = len(perms[kind[0]])
        known = torch.eye(unit.size * size, dtype=torch.float64) * 1e-6 if similarity is None else similarity
        kinds.append(known.reshape(unit.size, size, unit.size, size))
    outer, within = assign_blocks(own, kinds)
    perms[unit.index] = outer
    for kind, found in zip(unit.kinds, within, strict=True):
        for place in range(unit.size):
            perms[kind[int(outer[place])]] = found[place]
