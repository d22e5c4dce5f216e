"""Graph matching of networks: neurons are nodes, weights are edges, all layers are matched at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmerge.matching.assignment import assign
from fedmerge.matching.features import Unit, rows, units
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.permutations.transport import Plan, carry
from fedmerge.state import State, WeightedSum

__all__ = ["match_graphs", "sinkhorn"]


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """The doubly stochastic matrices that scale ``exp(scores)`` [..., n, n], in the log domain.

    Examples
    --------
    >>> sinkhorn(torch.zeros(2, 2), 5)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    for _ in range(iterations):
        scores = scores - scores.logsumexp(-1, keepdim=True)
        scores = scores - scores.logsumexp(-2, keepdim=True)
    return scores.exp()


def match_graphs(
    spec: PermutationSpec,
    states: Sequence[State],
    weights: Sequence[float],
    *,
    temperatures: Sequence[float],
    iterations: int,
) -> list[list[Tensor]]:
    """Permutations of each model into a common graph by graduated assignment.

    The affinity of neuron a of the common graph with neuron b of a model sums ``exp(-d / mean d)`` over incoming and
    over outgoing edges, d being the distance between a's and b's, under the soft permutations of the layers at
    their other ends. While the temperature falls, each model's matrices are set to
    ``Sinkhorn(affinity / temperature)``, temperatures being in standard deviations of the affinities, and the common
    graph to the weighted mean of the models under the rounded matrices: under soft ones it would blur. It starts
    as the heaviest model. Blocks stay as they are.
    """
    parts = [unit for unit in units(spec) if unit.simple]
    anchor = max(range(len(states)), key=lambda i: weights[i])
    common: State = {n: t.double() for n, t in states[anchor].items()}
    soft: list[dict[int, Tensor]] = [{} for _ in states]
    for temperature in temperatures:
        mean = WeightedSum()
        for state, own, weight in zip(states, soft, weights, strict=True):
            for unit in parts:
                affinity = _affinity(spec, unit, common, state, own)
                own[unit.index] = sinkhorn(affinity / (temperature * affinity.std().clamp_min(1e-300)), iterations)
            mean.add({n: t.double() for n, t in spec.apply(state, _rounded(spec, own)).items()}, weight)
        common = mean.mean()
    return [_rounded(spec, own) for own in soft]


def _rounded(spec: PermutationSpec, own: dict[int, Tensor]) -> list[Tensor]:
    perms = spec.identity()
    for i, matrix in own.items():
        perms[i] = assign(matrix)
    return perms


def _affinity(spec: PermutationSpec, unit: Unit, common: State, state: State, own: dict[int, Tensor]) -> Tensor:
    """[n, n]; at first, while nothing beyond is known, only what comes out of settled layers counts."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"in": [], "out": []}
    for site in unit.sites:
        if site.parameter not in state or site.parameter in spec.aliases:
            continue
        tensor = state[site.parameter]
        settled = True
        for (name, axis), standing in spec.touching.items():
            if name == site.parameter and axis != site.axis:
                planned = [(Plan(own[i], own[i]), s) for i, s in standing if i in own]
                settled &= len(planned) == len(standing)
                tensor = carry(tensor, axis, planned) if planned else tensor
        if settled:
            parts[site.role].append((rows(common[site.parameter], site, {}), rows(tensor, site, {})))
    total = torch.zeros(unit.size, unit.size, dtype=torch.float64)
    for edges in parts.values():
        if edges:
            ours, theirs = (torch.cat(side, 1).double() for side in zip(*edges, strict=True))
            distance = torch.cdist(ours, theirs)
            total += torch.exp(-distance / distance.mean().clamp_min(1e-300))
    return total
