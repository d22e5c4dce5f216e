"""How far apart models are before and after their neurons are matched: on the way, in activations, in weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.matching.features import rows, units
from fedmerge.matching.listening import consumers, moments
from fedmerge.models.resize import copy_of
from fedmerge.permutations import PermutationSpec, Site
from fedmerge.state import State

__all__ = ["MatchingCosts", "Similarity", "matching_costs", "similarity"]


@dataclass(frozen=True)
class Similarity:
    """How alike the groups of neurons of several models are.

    Parameters
    ----------
    groups
        Names, of those groups that go into a linear layer or a convolution.
    cka
        [groups, models, models], linear CKA; re-ordering neurons does not change it.
    correlation
        [groups, models, models], mean Pearson correlation of neurons in the same place, which is what matching
        raises; NaN where widths differ.
    """

    groups: tuple[str, ...]
    cka: Tensor
    correlation: Tensor


@dataclass(frozen=True)
class MatchingCosts:
    """By group, ``||a - b|| / sqrt(||a||^2 + ||b||^2)`` of all weights of its neurons, before and after matching.

    0 where they are equal, 1 where they have nothing in common, at most sqrt 2.
    """

    groups: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


def similarity(
    models: Sequence[nn.Module], inputs: Iterable[Tensor], spec: PermutationSpec | Sequence[PermutationSpec]
) -> Similarity:
    """Linear CKA, and correlation place by place, of what groups of neurons say on the same inputs.

    ``CKA = ||C_ab||_F^2 / (||C_aa||_F ||C_bb||_F)`` with covariances C (Kornblith et al., arXiv:1905.00414). In a
    convolution every position of an image is a sample.

    Parameters
    ----------
    models
        Of one architecture; none is modified.
    inputs
        Batches of inputs.
    spec
        The symmetries of the models; where widths differ, one for each.

    Raises
    ------
    InvalidOption
        There are no inputs, or not as many specs as models.

    Examples
    --------
    >>> from fedmerge.permutations import trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = similarity([model, model], [torch.randn(50, 4)], trace(model, torch.zeros(2, 4)))
    >>> found.groups, round(float(found.cka[0, 0, 1]), 4)
    (('0.weight',), 1.0)
    """
    specs = [spec] * len(models) if isinstance(spec, PermutationSpec) else list(spec)
    if len(specs) != len(models):
        raise InvalidOption(f"{len(specs)} specs for {len(models)} models: pass one, or one each")
    parts = [_parts(s) for s in specs]
    heard_at = [[consumers(sites) for _, sites in own] for own in parts]
    probes = [copy_of(model) for model in models]  # listening puts modules into eval mode
    pairs = [(i, j) for i in range(len(models)) for j in range(i, len(models))]
    heard = moments(heard_at, probes, pairs, inputs)
    if not heard:
        raise InvalidOption("there is nothing to compare: pass batches of inputs, and a spec with groups of neurons")
    groups = sorted({g for g, _, _ in heard})
    cka = torch.ones(len(groups), len(models), len(models), dtype=torch.float64)
    correlation = torch.full_like(cka, torch.nan)
    for k, g in enumerate(groups):
        sizes = [float(heard[g, i, i].covariance().norm()) for i in range(len(models))]
        for i, j in pairs:
            shared = float(heard[g, i, j].covariance().norm())
            # A group that never changes says nothing: 0, not 0 / 0.
            cka[k, i, j] = cka[k, j, i] = min(shared**2 / max(sizes[i] * sizes[j], 1e-300), 1.0)
            pearson = heard[g, i, j].correlation()
            if pearson.shape[0] == pearson.shape[1]:
                correlation[k, i, j] = correlation[k, j, i] = pearson.diagonal().mean()
    return Similarity(tuple(parts[0][g][0] for g in groups), cka, correlation)


def _parts(spec: PermutationSpec) -> list[tuple[str, list[Site]]]:
    """Groups with their sites; of blocks, the members of all blocks together, one entry for each kind."""
    parts = []
    for unit in units(spec):
        parts.append((spec.groups[unit.index].name, list(unit.sites)))
        for kind in unit.kinds:
            standing = zip(*(spec.groups[g].sites for g in kind), strict=True)
            stacked = [
                Site(s[0].parameter, s[0].axis, torch.cat([p.positions for p in s]), s[0].role) for s in standing
            ]
            parts.append((spec.groups[kind[0]].name, stacked))
    return parts


def matching_costs(spec: PermutationSpec, a: State, b: State, perms: Sequence[Tensor]) -> MatchingCosts:
    """How far the weights of second models are apart, group by group, before and after b is re-ordered.

    Parameters
    ----------
    spec
        The symmetries of both.
    a, b
        Parameters; tensors that are not in `a` have no say. Blocks count as one group with what is in them.
    perms
        For each group of the spec, the permutation of `b`; they act all at once.

    Examples
    --------
    >>> from fedmerge.permutations import trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> spec, state = trace(model, torch.zeros(2, 4)), model.state_dict()
    >>> perms = spec.random()
    >>> matching_costs(spec, state, spec.apply(state, perms), spec.inverse(perms)).after
    (0.0,)
    """
    moved = spec.apply(b, perms)
    groups = [spec.groups[unit.index] for unit in units(spec)]
    costs = []
    for other in (b, moved):
        for group in groups:
            apart = size = 0.0
            for site in group.sites:
                if site.parameter in a and site.parameter not in spec.aliases:
                    first, second = (rows(state[site.parameter].detach(), site, {}).double() for state in (a, other))
                    apart += float((first - second.to(first.device)).square().sum())
                    size += float(first.square().sum() + second.square().sum())
            costs.append((apart / max(size, 1e-300)) ** 0.5)
    return MatchingCosts(tuple(g.name for g in groups), tuple(costs[: len(groups)]), tuple(costs[len(groups) :]))
