"""Matching in two spaces at once: neurons are one whose weights, and what they say, correlate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedmerge.matching.activation_costs import Heard, permutations_by
from fedmerge.matching.assignment import assign, assign_blocks, total
from fedmerge.matching.features import WeightSimilarity, rows
from fedmerge.matching.listening import Moments
from fedmerge.matching.units import Unit
from fedmerge.matching.weight_costs import layer_by_layer
from fedmerge.permutations.spec import PermutationSpec, Site
from fedmerge.state import State

__all__ = ["DualSpace", "match_dual"]

_GAIN = 1e-9  # of a neuron's similarity; less is rounding
_PATIENCE = 5  # sweeps without progress, as the authors have it


def match_dual(
    spec: PermutationSpec,
    states: Sequence[State],
    heard: Heard,
    pair: tuple[int, int],
    *,
    balance: float,
    sweeps: int,
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], float]:
    """Permutations of the second of two models that make it most like the first in both spaces.

    Units are visited from input to output, then in random order, each assigned while all others stay. The search runs
    from the identity, and from where activations lead (weights, where activations have no say). The best that was seen
    is kept, the identity among it.

    Parameters
    ----------
    spec
        The symmetries of all models.
    states
        Their parameters.
    heard
        What they said.
    pair
        The numbers of the two.
    balance
        Share of the weights' correlation, in [0, 1].
    sweeps
        At most so many visits to each unit, from each start.
    generator
        For the order of visits.

    Returns
    -------
    tuple
        The permutations, and their :meth:`DualSpace.objective`.
    """
    a, b = states[pair[0]], states[pair[1]]
    alone = layer_by_layer(spec, a, b) if balance == 1 else permutations_by(spec, heard, pair, states)
    best: tuple[list[Tensor], float] | None = None
    for start in (spec.identity(), alone):
        space = DualSpace(WeightSimilarity(spec, a, b, start), heard, pair, balance)
        climbed = _climbed(space, sweeps, generator)
        if best is None or climbed[1] > best[1] + _GAIN * abs(best[1]):
            best = climbed
    assert best is not None
    return best


def _climbed(space: DualSpace, sweeps: int, generator: torch.Generator | None) -> tuple[list[Tensor], float]:
    """The best of all sweeps, the start among them."""
    units = space.heard.units
    best, reached, waited = list(space.weights.perms), space.objective(), 0
    order = list(range(len(units)))
    for _ in range(sweeps):
        moved = False
        for u in order:
            moved |= space.improve(u)
        value = space.objective()
        waited += 1
        if value > reached + _GAIN * abs(reached):
            best, reached, waited = list(space.weights.perms), value, 0
        if not moved or waited >= _PATIENCE:
            break
        order = torch.randperm(len(units), generator=generator).tolist()
    return best, reached


@dataclass(frozen=True)
class DualSpace:
    """How alike the neurons of two models are, under permutations of the second that change step by step.

    ``S = b C_w + (1 - b) C_a``: Pearson correlations of all of a neuron's weights, in the present order of all other
    neurons, and of its activations. Neurons that cannot be heard, or both never change, have their weights alone.

    Parameters
    ----------
    weights
        Of the two models, with the present permutations.
    heard, pair
        What they said, and under which numbers.
    balance
        b, in [0, 1].
    """

    weights: WeightSimilarity
    heard: Heard
    pair: tuple[int, int]
    balance: float

    def improve(self, number: int) -> bool:
        """Assign one unit; whether that moved it."""
        unit = self.heard.units[number]
        before, present = self.value(number), {i: self.weights.perms[i] for i in unit.members}
        own, kinds = self.similarities(number)
        if unit.kinds:
            placed = unit.placed(self.weights.spec, *assign_blocks(own, kinds, self.weights.crossings(unit)))
            chosen = {i: placed[i] for i in unit.members}
        else:
            chosen = {unit.index: assign(own)}
        if all(torch.equal(chosen[i], perm) for i, perm in present.items()):
            return False
        # Units that stand on two axes of a tensor change their own weights' correlation: what counts is the outcome.
        self.weights.change(unit, chosen)
        if self.value(number) <= before + _GAIN * max(1.0, abs(before)):
            self.weights.change(unit, present)
            return False
        return True

    def objective(self) -> float:
        """The mean over units of how alike neurons are that are matched; 1 where all are the same."""
        values = [self.value(u) for u in range(len(self.heard.units))]
        return sum(values) / len(values) if values else 1.0

    def value(self, number: int) -> float:
        """Of one unit, as it is matched now."""
        unit, perms = self.heard.units[number], self.weights.perms
        if unit.crossings:  # no pair of members has a similarity of its own
            names = list(dict.fromkeys(s.parameter for s in self.weights.spec.groups[unit.index].sites))
            return self.weights.objective(names) / max(self._size(names), 1e-300)
        own, kinds = self.similarities(number)
        if not unit.kinds:
            return total(own, perms[unit.index]) / unit.size
        value, parts = total(own, perms[unit.index]) / unit.size, 1
        for kind, similarity in zip(unit.kinds, kinds, strict=True):
            blocks = [(p, int(block)) for p, block in enumerate(perms[unit.index])]
            matched = [total(similarity[p, :, block], perms[kind[block]]) for p, block in blocks]
            value += sum(matched) / (len(matched) * similarity.shape[1])
            parts += 1
        return value / parts

    def similarities(self, number: int) -> tuple[Tensor, list[Tensor]]:
        """[n, n] of a unit's neurons, and [blocks, d, blocks, d] of the members of each kind within them."""
        unit = self.heard.units[number]
        first = self._first[number]
        own = self._mixed(unit, unit.sites, unit.size, first)
        kinds = []
        for k, (kind, sites) in enumerate(zip(unit.kinds, unit.kind_sites, strict=True)):
            size = self.weights.spec.groups[kind[0]].size
            similarity = self._mixed(unit, sites, unit.size * size, first + 1 + k)
            kinds.append(similarity.reshape(unit.size, size, unit.size, size))
        return own, kinds

    @cached_property
    def _first(self) -> list[int]:
        """By unit, the number of its own moments."""
        return [number for _, number in self.heard]

    def _mixed(self, unit: Unit, sites: Sequence[Site], size: int, number: int) -> Tensor:
        inner = self.weights.of(sites, size, unit).cpu()
        if unit.crossings:  # weighed against products of weights, which are in units of their own
            return inner
        by_weights = self._correlated(sites, inner) if unit.simple else inner / inner.abs().max().clamp_min(1e-300)
        moments: Moments | None = self.heard.found.get((number, *self.pair))
        if moments is None:
            return by_weights
        silent = moments.silent(0).cpu()[:, None] & moments.silent(1).cpu()
        said = torch.where(silent, by_weights, moments.correlation().cpu())
        return self.balance * by_weights + (1 - self.balance) * said

    def _correlated(self, sites: Sequence[Site], inner: Tensor) -> Tensor:
        """Pearson's coefficients of inner products; sums and squares do not depend on the order of other neurons."""
        count, sums, squares = 0, [], []
        for state in (self.weights.a, self.weights.b):
            features = [rows(state[s.parameter], s, {}).double().cpu() for s in sites if s.parameter in state]
            count = sum(f.shape[1] for f in features)
            sums.append(sum((f.sum(1) for f in features), inner.new_zeros(len(inner))))
            squares.append(sum((f.square().sum(1) for f in features), inner.new_zeros(len(inner))))
        if not count:
            return inner
        spread = [(q - s.square() / count).clamp_min(0) for q, s in zip(squares, sums, strict=True)]
        varies = [v > 1e-10 * q for v, q in zip(spread, squares, strict=True)]
        scale = torch.outer(*(torch.where(v, x, torch.inf).sqrt() for v, x in zip(varies, spread, strict=True)))
        return (inner - torch.outer(*sums) / count) / scale

    def _size(self, names: Sequence[str]) -> float:
        """``||a|| ||b||`` of these tensors."""
        both = (self.weights.a, self.weights.b)
        squares = [sum(float(s[n].double().square().sum()) for n in names if n in s) for s in both]
        return math.sqrt(squares[0]) * math.sqrt(squares[1])
