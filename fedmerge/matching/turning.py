"""Models turned towards each other: orthogonal Procrustes where neurons may be mixed, assignments where not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from fedmerge.matching.assignment import assign
from fedmerge.matching.fairness import anchor_of, shares_of
from fedmerge.matching.units import Unit, units
from fedmerge.matching.weight_costs import match_weights
from fedmerge.permutations.rotations import Rotations, nearest_rotation
from fedmerge.permutations.spec import Site
from fedmerge.state import State, WeightedSum, accumulator_dtype

__all__ = ["turn_many", "turn_towards"]

_GAIN = 1e-6  # of the objective; sweeps that gain less are the last
_TIE = 1e-6  # of the covariance; where nothing tells a direction, it stays as it is


@torch.no_grad()
def turn_towards(
    found: Rotations, a: State, b: State, *, sweeps: int = 10, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """`b`, a prepared state, turned and re-ordered to have the largest inner product with `a`.

    Coordinate ascent: groups that may be turned by orthogonal Procrustes, heads as wholes by what they have in common
    once each is turned to the other, all other groups by weight matching. Once from `b` as it is, and once from what
    goes from input to output, each group by the tensors all of whose other neurons are settled, which finds planted
    rotations; the better one is taken.

    Parameters
    ----------
    found
        What may be turned.
    a, b
        Tensors in float32 or better.
    sweeps
        At most so many rounds over all groups.
    generator
        For the order of visits of weight matching.
    """
    everything = units(found.spec)
    settled, done = dict(b), set[int]()
    for unit in sorted(everything, key=lambda one: not _turns(found, one)):
        settled = _improved(found, unit, a, settled, done)
        done |= set(unit.members)
    ends = [_ascended(found, everything, a, start, sweeps, generator) for start in (dict(b), settled)]
    return max(ends, key=lambda end: end[0])[1]


def _ascended(
    found: Rotations, everything: Sequence[Unit], a: State, b: State, sweeps: int, generator: torch.Generator | None
) -> tuple[float, dict[str, Tensor]]:
    """The objective that coordinate ascent reaches, and the state at which it does."""
    state, value = dict(b), _objective(found, a, b)
    for _ in range(sweeps):
        for unit in everything:
            if _turns(found, unit):
                state = _improved(found, unit, a, state, None)
        perms, _ = match_weights(found.spec, a, state, sweeps=sweeps, generator=generator)
        state = found.spec.apply(state, perms)
        before, value = value, _objective(found, a, state)
        if value - before <= _GAIN * abs(before):
            break
    return value, state


@torch.no_grad()
def turn_many(
    found: Rotations,
    states: Sequence[State],
    weights: Sequence[float],
    *,
    sweeps: int = 10,
    generator: torch.Generator | None = None,
) -> list[dict[str, Tensor]]:
    """Many prepared states, each turned to the most typical one, then in turn to the mean of the others.

    As :func:`~fedmerge.matching.weight_costs.match_many` does with permutations (Ainsworth et al. 2023, algorithm 3).
    """
    anchor, shares = anchor_of(states, weights), shares_of(weights)
    turned = [
        dict(state) if i == anchor else turn_towards(found, states[anchor], state, sweeps=sweeps, generator=generator)
        for i, state in enumerate(states)
    ]
    if len(turned) < 3:
        return turned
    mean = WeightedSum()
    for state, share in zip(turned, shares, strict=True):
        mean.add(_floats(state), share)
    reached = -float("inf")
    for _ in range(sweeps):
        total = 0.0
        for i, share in enumerate(shares):
            mean.add(_floats(turned[i]), -share)
            turned[i] = turn_towards(found, mean.tensors, turned[i], sweeps=1, generator=generator)
            total += share * _objective(found, mean.tensors, turned[i])
            mean.add(_floats(turned[i]), share)
        if total - reached <= _GAIN * abs(total):
            break
        reached = total
    return turned


def _turns(found: Rotations, unit: Unit) -> bool:
    """Whether a unit may be turned, or its blocks turned within."""
    if unit.crossings or unit.crossed or unit.twice:
        return False
    return unit.index in found.kinds or any(all(g in found.kinds for g in kind) for kind in unit.kinds)


def _improved(found: Rotations, unit: Unit, a: State, b: State, done: Collection[int] | None) -> dict[str, Tensor]:
    """`b` with one unit turned or assigned; with `done`, by the tensors all of whose other groups are in it."""
    spec, kinds = found.spec, found.kinds

    def common(groups: Sequence[int], others: Sequence[int]) -> Tensor:
        pairs = zip(groups, others, strict=True)
        return sum((_covariance(found, a, b, g, h, done) for g, h in pairs), torch.zeros(()))

    if unit.crossings or unit.crossed or unit.twice:
        return dict(b)
    if not unit.kinds:
        covariance = common([unit.index], [unit.index])
        if not covariance.any():
            return dict(b)
        if unit.index in kinds:
            return found.turned(b, {unit.index: _rotation(covariance, kinds[unit.index])})
        perms = spec.identity()
        perms[unit.index] = assign(covariance)
        return spec.apply(b, perms)
    score = torch.zeros(unit.size, unit.size, dtype=torch.float64)
    for i, j in product(range(unit.size), range(unit.size)):
        for kind in unit.kinds:
            covariance = common([kind[i]], [kind[j]])
            if kind[i] in kinds:
                score[i, j] += float(torch.linalg.svdvals(covariance).sum())
            elif covariance.any():
                score[i, j] += float(covariance.gather(1, assign(covariance)[:, None]).sum())
    perms = spec.identity()
    perms[unit.index] = assign(score)
    b = spec.apply(b, perms)
    for kind in unit.kinds:
        for group in kind:
            covariance = common([group], [group])
            if group in kinds:
                b = found.turned(b, {group: _rotation(covariance, kinds[group])})
            elif covariance.any():
                perms = spec.identity()
                perms[group] = assign(covariance)
                b = spec.apply(b, perms)
    return dict(b)


def _rotation(covariance: Tensor, kind: str) -> Tensor:
    size = len(covariance)
    tie = _TIE * covariance.norm() / size
    return nearest_rotation(covariance + tie * torch.eye(size).to(covariance), "full" if kind == "full" else "centred")


def _covariance(found: Rotations, a: State, b: State, group: int, other: int, done: Collection[int] | None) -> Tensor:
    """``sum A B^T`` over the sites of a group of `a`, and of one like it of `b`: [n, n], in float64."""
    spec = found.spec
    total = torch.zeros(spec.groups[group].size, spec.groups[other].size, dtype=torch.float64)
    for ours, theirs in zip(found.sites(group), found.sites(other), strict=True):
        name = ours.parameter
        if name not in a or (done is not None and not _settled(found, ours, done)):
            continue
        total += (_rows(a[name], ours) @ _rows(b[name], theirs).T).double().cpu()
    return total


def _settled(found: Rotations, site: Site, done: Collection[int]) -> bool:
    """Whether the other axes of a site's tensor hold only neurons that are in order already."""
    return all(
        i in done
        for (name, axis), standing in found.spec.touching.items()
        if name == site.parameter and axis != site.axis
        for i, _ in standing
    )


def _rows(tensor: Tensor, site: Site) -> Tensor:
    """[n, everything else]."""
    moved = tensor.movedim(site.axis, 0)[site.positions.to(tensor.device)]
    return moved.flatten(1).to(accumulator_dtype(tensor.dtype))


def _objective(found: Rotations, a: State, b: State) -> float:
    """``sum <a, b>`` over tensors that have neurons."""
    names = {name for name, _ in found.spec.touching if name not in found.spec.aliases}
    return sum(float((a[n].double() * b[n].double()).sum()) for n in names if n in a and n in b)


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to(accumulator_dtype(t.dtype)) for n, t in state.items() if t.is_floating_point()}
