"""Graph matching of networks: neurons are nodes, weights are edges, all layers are matched at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.matching.assignment import assign, assign_blocks
from fedmerge.matching.blocks import match_blocks
from fedmerge.matching.fairness import anchor_of, shares_of
from fedmerge.matching.features import rows
from fedmerge.matching.units import Unit, units
from fedmerge.permutations.carrying import Plan, carry
from fedmerge.permutations.spec import PermutationSpec, Site
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
    as the model that is most typical of all. Blocks are assigned as a whole and within from the start, as soft ones
    would be none.
    """
    anchor, shares = anchor_of(states, weights), shares_of(weights)
    common: State = {n: t.double() for n, t in states[anchor].items()}
    graphs = [_Graph(spec, state) for state in states]
    for temperature in temperatures:
        mean = WeightedSum()
        for graph, share in zip(graphs, shares, strict=True):
            graph.match(common, temperature, iterations)
            mean.add({n: t.double() for n, t in spec.apply(graph.state, graph.rounded()).items()}, share)
        common = mean.mean()
    return [spec.compose(graph.order, graph.rounded()) for graph in graphs]


class _Graph:
    """One model on its way into the common graph: blocks are in order already, `soft` are matrices of the rest."""

    def __init__(self, spec: PermutationSpec, state: State) -> None:
        self.spec, self.state, self.order = spec, state, spec.identity()
        self.soft: dict[int, Tensor] = {}
        self.blocks: set[int] = set()

    def match(self, common: State, temperature: float, iterations: int) -> None:
        """Assign all units once, those of blocks hard."""
        for unit in units(self.spec):
            if unit.crossings or unit.crossed:
                plans = {i: Plan(matrix, matrix) for i, matrix in self.soft.items()}
                side = (self.spec, {n: t.double() for n, t in self.state.items() if n in common}, unit)
                self._step(unit, match_blocks((self.spec, common, unit), side, self.blocks | set(self.soft), plans))
                continue
            affinity = self._affinity(unit.sites, unit.size, common)
            if unit.simple:
                scale = temperature * affinity.std().clamp_min(1e-300)
                self.soft[unit.index] = sinkhorn(affinity / scale, iterations)
                continue
            kinds = []
            for kind, sites in zip(unit.kinds, unit.kind_sites, strict=True):
                size = self.spec.groups[kind[0]].size
                matched = self._affinity(sites, unit.size * size, common)
                kinds.append(matched.reshape(unit.size, size, unit.size, size))
            self._step(unit, unit.placed(self.spec, *assign_blocks(affinity, kinds)))

    def _step(self, unit: Unit, step: list[Tensor]) -> None:
        self.state, self.order = self.spec.apply(self.state, step), self.spec.compose(self.order, step)
        self.blocks |= set(unit.members)

    def rounded(self) -> list[Tensor]:
        """Permutations of what is not in blocks."""
        perms = self.spec.identity()
        for i, matrix in self.soft.items():
            perms[i] = assign(matrix)
        return perms

    def _affinity(self, sites: Sequence[Site], size: int, common: State) -> Tensor:
        return _affinity(self.spec, sites, size, common, self.state, self.soft, self.blocks)


def _affinity(
    spec: PermutationSpec,
    sites: Sequence[Site],
    size: int,
    common: State,
    state: State,
    own: Mapping[int, Tensor],
    blocks: Collection[int],
) -> Tensor:
    """[n, n]; at first, while nothing beyond is known, only what comes out of settled layers counts."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"in": [], "out": []}
    for site in sites:
        if site.parameter not in state or site.parameter in spec.aliases:
            continue
        tensor = state[site.parameter]
        settled = True
        for (name, axis), standing in spec.touching.items():
            if name == site.parameter and axis != site.axis:
                planned = [(Plan(own[i], own[i]), s) for i, s in standing if i in own]
                settled &= all(i in own or i in blocks for i, _ in standing)
                tensor = carry(tensor, axis, planned) if planned else tensor
        if settled:
            parts[site.role].append((rows(common[site.parameter], site, {}), rows(tensor, site, {})))
    device = next(iter(common.values())).device
    total = torch.zeros(size, size, dtype=torch.float64, device=device)
    for edges in parts.values():
        if edges:
            ours, theirs = (torch.cat(side, 1).double() for side in zip(*edges, strict=True))
            distance = torch.cdist(ours, theirs)
            total += torch.exp(-distance / distance.mean().clamp_min(1e-300))
    return total
