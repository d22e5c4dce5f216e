"""Weight matching: coordinate ascent over groups of neurons, for two models and for many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmerge.matching.assignment import assign, assign_blocks, total
from fedmerge.matching.fairness import anchor_of, shares_of
from fedmerge.matching.features import WeightSimilarity
from fedmerge.matching.units import Unit
from fedmerge.permutations.spec import PermutationSpec, Site
from fedmerge.state import State, WeightedSum, accumulator_dtype

__all__ = ["layer_by_layer", "match_many", "match_weights"]

_GAIN = 1e-9  # of the objective; less is rounding
_CLEARLY = 0.05  # of the squared distance between models; by how much another start has to shorten it
_ENOUGH = 1e-3  # of the objective; rounds that gain less cost more than they bring


@torch.no_grad()
def match_weights(
    spec: PermutationSpec,
    a: State,
    b: State,
    *,
    start: Sequence[Tensor] | None = None,
    sweeps: int = 100,
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], float]:
    """Permutations of `b` under which it has the largest inner product with `a`.

    Ainsworth et al. 2023, algorithm 1: one group after the other is assigned, all others being fixed, until
    nothing changes. Groups are visited from input to output first, in random order then.

    Parameters
    ----------
    spec
        The symmetries of both models.
    a, b
        Parameters; what is not in `a` (running statistics) has no say.
    start
        Where to begin; without it, the identity.
    sweeps
        At most so many visits to each group.
    generator
        For the order of visits.

    Returns
    -------
    tuple
        The permutations, and the objective ``sum <a, P(b)>``.
    """
    state = WeightSimilarity(spec, a, b, list(spec.identity() if start is None else start))
    best = state.objective()
    order = list(range(len(state.units)))
    stale = set(order)
    for _ in range(sweeps):
        if not stale:
            break
        for u in order:
            if u not in stale:
                continue
            stale.discard(u)
            gain = _improve(state, state.units[u], _GAIN * abs(best))
            if gain > 0:
                best += gain
                stale |= _neighbours(state, u)
        order = torch.randperm(len(order), generator=generator).tolist()
    return state.perms, state.objective()


@torch.no_grad()
def layer_by_layer(spec: PermutationSpec, a: State, b: State) -> list[Tensor]:
    """Permutations of `b` found from input to output, each group by what comes out of groups that are settled.

    No later layer is looked at, as Singh and Jaggi 2020 do it. That finds a planted permutation where coordinate
    ascent from the identity stops early: groups that are not yet assigned tell it wrong things.
    """
    state = WeightSimilarity(spec, a, b, spec.identity())
    done: set[int] = set()
    for unit in state.units:
        own = state.of(_settled(spec, unit, unit.sites, done), unit.size, unit)
        kinds = []
        for kind, sites in zip(unit.kinds, unit.kind_sites, strict=True):
            size = spec.groups[kind[0]].size
            cost = state.of(_settled(spec, unit, sites, done), unit.size * size, unit)
            kinds.append(cost.reshape(unit.size, size, unit.size, size))
        perms = unit.placed(spec, *assign_blocks(own, kinds, state.crossings(unit, done)))
        state.change(unit, {i: perms[i] for i in unit.members})
        done |= set(unit.members)
    return state.perms


def _settled(spec: PermutationSpec, unit: Unit, sites: Sequence[Site], done: set[int]) -> list[Site]:
    """Those where neurons come out of a tensor all of whose other groups are done."""
    return [
        site
        for site in sites
        if site.role == "out"
        and all(i in done for i in unit.crossed.get((site.parameter, site.axis), ()))
        and all(
            i in done
            for (name, axis), standing in spec.touching.items()
            if name == site.parameter and axis != site.axis
            for i, _ in standing
        )
    ]


def _neighbours(state: WeightSimilarity, changed: int) -> set[int]:
    """Units that share a tensor with this one, and this one where its pairs interact."""
    names = {s.parameter for s in state.spec.groups[state.units[changed].index].sites}
    return {
        v
        for v, unit in enumerate(state.units)
        if (v != changed or unit.twice) and any(s.parameter in names for s in state.spec.groups[unit.index].sites)
    }


def _improve(state: WeightSimilarity, unit: Unit, least: float) -> float:
    """Assign one unit; the gain, 0 where the old permutation stays."""
    own = state.of(unit.sites, unit.size, unit)
    old = {i: state.perms[i] for i in unit.members}
    if not unit.kinds:
        new = {unit.index: assign(own)}
        gain = total(own, new[unit.index]) - total(own, old[unit.index])
    else:
        kinds = []
        for kind, sites in zip(unit.kinds, unit.kind_sites, strict=True):
            size = state.spec.groups[kind[0]].size
            kinds.append(state.of(sites, unit.size * size, unit).reshape(unit.size, size, unit.size, size))
        outer, within = assign_blocks(own, kinds, state.crossings(unit))
        placed = unit.placed(state.spec, outer, within)
        new = {i: placed[i] for i in unit.members}
        gain = total(own, outer) - total(own, old[unit.index])
        for kind, similarity, perms in zip(unit.kinds, kinds, within, strict=True):
            for place in range(unit.size):
                block, was = int(outer[place]), int(old[unit.index][place])
                gain += total(similarity[place, :, block], perms[place])
                gain -= total(similarity[place, :, was], old[kind[was]])
    if not unit.twice and not unit.crossings:
        if gain <= least:
            return 0.0
        state.change(unit, new)
        return gain
    names = list(dict.fromkeys(s.parameter for s in state.spec.groups[unit.index].sites))
    before = state.objective(names)
    state.change(unit, new)
    gain = state.objective(names) - before
    if gain <= least:
        state.change(unit, old)
        return 0.0
    return gain


@torch.no_grad()
def match_many(
    spec: PermutationSpec,
    states: Sequence[State],
    weights: Sequence[float],
    *,
    rounds: int = 10,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> list[list[Tensor]]:
    """Permutations that bring each of many models near the weighted mean of the others.

    All are first matched to the one that is most typical of them, by the best of `restarts` trials in other orders of
    visits, then each in turn to the mean of the others, until none moves (Ainsworth et al. 2023, algorithm 3). Besides
    the models there is one sum of them in memory.
    """
    anchor, shares = anchor_of(states, weights), shares_of(weights)
    perms = [spec.identity() for _ in states]
    mean = WeightedSum()
    mean.add(_floats(states[anchor]), shares[anchor])
    for i, state in enumerate(states):
        if i != anchor:
            perms[i] = _best_of(spec, states[anchor], state, restarts, generator)
            mean.add(spec.apply(_floats(state), perms[i]), shares[i])
    if len(states) < 3:
        return perms
    reached = -float("inf")
    for _ in range(rounds):
        moved, objective = False, 0.0
        for i in torch.randperm(len(states), generator=generator).tolist():
            mean.add(spec.apply(_floats(states[i]), perms[i]), -shares[i])
            perm, value = match_weights(spec, mean.tensors, states[i], start=perms[i], generator=generator)
            moved |= any(not torch.equal(p, q) for p, q in zip(perm, perms[i], strict=True))
            perms[i] = perm
            objective += shares[i] * value
            mean.add(spec.apply(_floats(states[i]), perms[i]), shares[i])
        if not moved or objective - reached <= _ENOUGH * abs(objective):
            break
        reached = objective
    return perms


def _best_of(
    spec: PermutationSpec, a: State, b: State, restarts: int, generator: torch.Generator | None
) -> list[Tensor]:
    """A match from the identity, the best of several orders of visits, or a clearly better one from layer by layer.

    Networks trained apart end equally far from each other from both starts, to within a percent, which says nothing
    about the merge; where the identity leads astray, as with planted permutations of depthwise convolutions, it ends
    far from what the other finds.
    """
    names = {n for n, _ in spec.touching if n in a and n in b and n not in spec.aliases}
    squares = sum(float(s[n].double().square().sum()) for n in names for s in (a, b))
    if squares - 2 * WeightSimilarity(spec, a, b, spec.identity()).objective() <= _GAIN * squares:
        return spec.identity()
    own = torch.Generator().manual_seed(0)  # so that a start that is not taken changes nothing that is drawn later
    other, value = match_weights(spec, a, b, start=layer_by_layer(spec, a, b), generator=own)
    if squares - 2 * value <= _GAIN * squares:  # one is the other, re-ordered: no trial finds more
        return other
    trials = [match_weights(spec, a, b, generator=generator) for _ in range(restarts)]
    best_perms, best = max(trials, key=lambda trial: trial[1])
    return other if squares - 2 * value < (1 - _CLEARLY) * (squares - 2 * best) else best_perms


def _floats(state: State) -> dict[str, Tensor]:
    return {n: t.to(accumulator_dtype(t.dtype)) for n, t in state.items() if t.is_floating_point()}
