"""Matching by what neurons say: those are one that correlate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.matching.assignment import assign, assign_blocks
from fedmerge.matching.features import Unit, WeightSimilarity, units
from fedmerge.matching.listening import Moments, check_heard, consumers, moments
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.state import State

__all__ = ["Heard", "match_activations", "not_heard_singly", "permutations_by"]


@dataclass(frozen=True)
class Heard:
    """What the neurons of all units of a spec said on the same inputs.

    Parameters
    ----------
    units
        In the order of the spec.
    found
        By number, see :meth:`number`, and pair of models.
    """

    units: list[Unit]
    found: Mapping[tuple[int, int, int], Moments]

    @classmethod
    def of(
        cls,
        spec: PermutationSpec,
        modules: Sequence[nn.Module],
        pairs: Sequence[tuple[int, int]],
        inputs: Iterable[Tensor],
    ) -> Heard:
        """Let all modules hear the inputs once."""
        parts = units(spec)
        groups = [consumers(sites) for unit in parts for sites in (unit.sites, *unit.kind_sites)]
        return cls(parts, moments([groups] * len(modules), modules, pairs, inputs))

    def check(self, clients: Sequence[int]) -> None:
        """Make sure that all models can be heard.

        Raises
        ------
        CannotMatch
            What some say is not finite, or so large that its square is not; `clients` are whose models they are.
        """
        check_heard(self.found, clients)

    def __iter__(self) -> Iterator[tuple[Unit, int]]:
        """Units with the number of their own moments; those of their kinds follow it."""
        number = 0
        for unit in self.units:
            yield unit, number
            number += 1 + len(unit.kinds)


def match_activations(
    spec: PermutationSpec,
    modules: Sequence[nn.Module],
    states: Sequence[State],
    inputs: Iterable[Tensor],
    anchor: int,
    clients: Sequence[int] | None = None,
    similarity: Callable[[Moments], Tensor] = Moments.correlation,
) -> list[list[Tensor]]:
    """Permutations of each model under which its activations correlate most with the anchor's.

    Neurons that cannot be heard (queries and keys of attention), or that never change on these inputs, are matched
    by their weights, all others being settled.

    Parameters
    ----------
    states
        The modules' parameters.
    anchor
        Which model the others are matched to.
    clients
        Whose models they are; their numbers in the list where not given.
    similarity
        What is as large as possible for neurons that are matched.

    Raises
    ------
    CannotMatch
        What some say cannot be compared.
    InvalidOption
        There are no inputs.
    """
    pairs = [(anchor, j) for j in range(len(modules)) if j != anchor]
    heard = Heard.of(spec, modules, pairs, inputs)
    if not heard.found and any(consumers(group.sites) for group in spec.groups):
        raise InvalidOption(
            "matching by activations needs inputs on the server: pass data= (server_examples in a configuration)."
        )
    heard.check(list(range(len(modules))) if clients is None else clients)
    perms = [spec.identity() for _ in modules]
    for _, j in pairs:
        perms[j] = permutations_by(spec, heard, (anchor, j), states, similarity)
    return perms


def not_heard_singly(spec: PermutationSpec, perms: Sequence[Tensor], heard: Heard) -> list[Tensor]:
    """Of these permutations, those of blocks and within them, and of neurons that cannot be heard; all else stays."""
    known = {number for number, *_ in heard.found}
    kept = {i for unit, number in heard if not unit.simple or number not in known for i in unit.members}
    return [perm if i in kept else torch.arange(len(perm)) for i, perm in enumerate(perms)]


def permutations_by(
    spec: PermutationSpec,
    heard: Heard,
    pair: tuple[int, int],
    states: Sequence[State],
    similarity: Callable[[Moments], Tensor] = Moments.correlation,
) -> list[Tensor]:
    """Permutations of the second of two models under which it says what the first does."""
    weights = WeightSimilarity(spec, states[pair[0]], states[pair[1]], spec.identity())
    unheard = []
    for unit, number in heard:
        parts = [heard.found.get((number + i, *pair)) for i in range(1 + len(unit.kinds))]
        if not unit.simple or parts[0] is None:
            unheard.append((unit, parts))
            continue
        weights.change(unit, {unit.index: assign(similarity(parts[0]))})
        if bool(parts[0].silent(0).any()):
            unheard.append((unit, parts))
    for unit, parts in unheard:
        if unit.kinds:
            weights.change(unit, _blocks(unit, parts, weights, similarity))
        else:
            known = parts[0] if unit.simple else None  # where groups cross, what one says depends on the other
            weights.change(unit, {unit.index: _silent(unit, known, weights)})
    return weights.perms


def _silent(unit: Unit, heard: Moments | None, weights: WeightSimilarity) -> Tensor:
    """Neurons that say nothing are assigned by their weights, among the places that are left to them."""
    similarity = weights.of(unit.sites, unit.size, unit)
    if heard is None:
        return assign(similarity)
    perm = weights.perms[unit.index].clone()
    silent = heard.silent(0).cpu().nonzero().ravel()
    perm[silent] = perm[silent][assign(similarity[silent][:, perm[silent]])]
    return perm


def _blocks(
    unit: Unit,
    heard: Sequence[Moments | None],
    weights: WeightSimilarity,
    similarity: Callable[[Moments], Tensor],
) -> dict[int, Tensor]:
    """Blocks are assigned by all that is heard of them and their members; members unheard of, by weights."""
    if unit.crossings:  # what members of one kind say depends on the other's order
        heard = [None] * len(heard)
    own = torch.zeros(unit.size, unit.size, dtype=torch.float64) if heard[0] is None else similarity(heard[0]).cpu()
    kinds = []
    for kind, sites, sums in zip(unit.kinds, unit.kind_sites, heard[1:], strict=True):
        size = len(weights.perms[kind[0]])
        if sums is None:
            alike = weights.of(sites, unit.size * size, unit).cpu()
            if not unit.crossings:
                alike = alike / alike.abs().max().clamp_min(1e-300)
        else:
            alike = similarity(sums).cpu()
        kinds.append(alike.reshape(unit.size, size, unit.size, size))
    found_all = unit.placed(weights.spec, *assign_blocks(own, kinds, weights.crossings(unit)))
    return {i: found_all[i] for i in unit.members}
