"""Many models matched to one common order at once, by Frank-Wolfe on soft permutations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedmerge.matching.assignment import assign
from fedmerge.matching.fairness import shares_of
from fedmerge.matching.features import Unit, rows, units
from fedmerge.permutations.carrying import Plan, carry, transport
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.state import State

__all__ = ["match_universe"]

_Soft = list[dict[int, Tensor]]


def match_universe(
    spec: PermutationSpec,
    states: Sequence[State],
    weights: Sequence[float],
    start: Sequence[Sequence[Tensor]],
    *,
    steps: int,
    tolerance: float,
) -> list[list[Tensor]]:
    """Permutations that maximise ``sum_{i<j} p_i p_j <P_i theta_i, P_j theta_j>`` over all layers at once.

    Crisostomi et al. 2024, algorithm 1: each P is relaxed to doubly stochastic matrices; a step goes towards the
    assignment that the gradient favours, as far as the objective along the way, a polynomial, says; at the end
    each matrix is rounded by assignment.

    Parameters
    ----------
    start
        Permutations to begin with, those of blocks stay as they are.
    steps
        At most so many.
    tolerance
        Relative gain below which a step is the last.
    """
    shares = shares_of(weights)
    parts = [unit for unit in units(spec) if unit.simple]
    fixed = [
        [torch.arange(g.size) if any(u.index == i for u in parts) else p[i] for i, g in enumerate(spec.groups)]
        for p in start
    ]
    moved = [
        {n: t.double() * w for n, t in spec.apply(s, f).items()} for s, f, w in zip(states, fixed, shares, strict=True)
    ]
    device = next(iter(states[0].values())).device
    eyes = {u.index: torch.eye(u.size, dtype=torch.float64, device=device) for u in parts}
    soft: _Soft = [{i: eye[p[i].to(device)] for i, eye in eyes.items()} for p in start]
    best = _value(spec, moved, soft)
    for _ in range(steps):
        targets = _targets(spec, parts, moved, soft)
        step = _longest(spec, moved, soft, targets)
        soft = [
            {i: (1 - step) * own[i] + step * towards[i] for i in own}
            for own, towards in zip(soft, targets, strict=True)
        ]
        value = _value(spec, moved, soft)
        gain, best = value - best, value
        if gain <= tolerance * abs(best):
            break
    matched = []
    for own, kept in zip(soft, fixed, strict=True):
        matched.append([assign(own[i]) if i in own else p for i, p in enumerate(kept)])
    return matched


def _carried(spec: PermutationSpec, state: State, soft: dict[int, Tensor]) -> dict[str, Tensor]:
    return transport(spec, state, {i: Plan(p, p) for i, p in soft.items()})


def _value(spec: PermutationSpec, states: Sequence[State], soft: _Soft) -> float:
    """``sum_{i<j} <U_i, U_j> = (||sum_i U_i||^2 - sum_i ||U_i||^2) / 2`` over tensors that have neurons."""
    names = {name for name, _ in spec.touching if name in states[0]}
    total: dict[str, Tensor] = {}
    squares = 0.0
    for state, own in zip(states, soft, strict=True):
        for name, tensor in _carried(spec, {n: state[n] for n in names}, own).items():
            squares += float(tensor.square().sum())
            total[name] = tensor if name not in total else total[name] + tensor
    return (sum(float(t.square().sum()) for t in total.values()) - squares) / 2


def _targets(spec: PermutationSpec, parts: Sequence[Unit], states: Sequence[State], soft: _Soft) -> _Soft:
    """The assignment that the gradient favours, for each model and group."""
    carried = [_carried(spec, state, own) for state, own in zip(states, soft, strict=True)]
    total = {n: sum(c[n] for c in carried) for n in carried[0]}
    targets: _Soft = []
    for state, own, mine in zip(states, soft, carried, strict=True):
        towards = {}
        for unit in parts:
            gradient = torch.zeros_like(own[unit.index])
            for site in unit.sites:
                if site.parameter not in state or site.parameter in spec.aliases:
                    continue
                tensor = state[site.parameter]
                for (name, axis), standing in spec.touching.items():
                    planned = [(Plan(own[i], own[i]), s) for i, s in standing if i in own]
                    if name == site.parameter and axis != site.axis and planned:
                        tensor = carry(tensor, axis, planned)
                others = total[site.parameter] - mine[site.parameter]
                gradient += rows(others, site, {}) @ rows(tensor, site, {}).T
            towards[unit.index] = torch.eye(unit.size).to(gradient)[assign(gradient).to(gradient.device)]
        targets.append(towards)
    return targets


def _longest(spec: PermutationSpec, states: Sequence[State], soft: _Soft, targets: _Soft) -> float:
    """The step in [0, 1] of largest objective, which is a polynomial of degree 4: two axes in each of two models."""
    points = np.linspace(0, 1, 5)
    values = [
        _value(
            spec,
            states,
            [{i: (1 - t) * a[i] + t * b[i] for i in a} for a, b in zip(soft, targets, strict=True)],
        )
        for t in points
    ]
    polynomial = np.polynomial.Polynomial.fit(points, values, 4)
    roots = [complex(root) for root in polynomial.deriv().roots()]
    candidates = [0.0, 1.0, *(r.real for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1)]
    return max(candidates, key=lambda t: float(polynomial(t)))
