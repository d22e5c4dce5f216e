"""CCA merging: features carried onto the reference's by the linear map that correlates them most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.aggregators.aligning import Aligning
from fedmerge.aggregators.base import check_range
from fedmerge.matching.activations import consumers, moments
from fedmerge.matching.features import units
from fedmerge.permutations import Plan, transport
from fedmerge.registry import register
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["CCAMerge"]


@register("cca", paper="arXiv:2407.05385")
@dataclass(frozen=True)
class CCAMerge(Aligning):
    """Features carried onto those of the heaviest client by canonical correlation analysis; then the average.

    Horoi et al. 2024. With the covariances Sxx of the reference, Syy of a client and Sxy between them,
    ``Sxx^-1/2 Sxy Syy^-1/2 = U S V^T``; a client's features become ``y T``, ``T = Syy^-1/2 V U^T Sxx^1/2``, and what
    takes them in ``T^-1`` of itself. That is no permutation: nonlinearities do not follow it, and statistics of
    batch norm have to be measured again.

    Parameters
    ----------
    gamma
        Ridge on the covariances, relative to their mean diagonal, positive.
    """

    requires_data = True

    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "gamma", 1e-12, float("inf"), open_high=True)

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Carry each client onto the heaviest."""
        if len(updates) == 1:
            yield from updates
            return
        spec = context.symmetries(updates[0].state, "CCA merging")
        parts = [unit for unit in units(spec) if not unit.kinds and consumers(unit.sites)]
        anchor = max(range(len(updates)), key=lambda i: updates[i].weight)
        modules = [context.module(u.state, "CCA merging") for u in updates]
        others = [i for i in range(len(updates)) if i != anchor]
        pairs = [(anchor, anchor), *((i, i) for i in others), *((anchor, i) for i in others)]
        sites = [[consumers(u.sites) for u in parts]] * len(updates)
        heard = moments(sites, modules, pairs, context.inputs("CCA merging"))
        for j, update in enumerate(updates):
            plans = {}
            for number, unit in enumerate(parts):
                if j != anchor and (number, anchor, anchor) in heard:
                    found = [heard[number, *pair].covariance() for pair in ((anchor, anchor), (j, j), (anchor, j))]
                    plans[unit.index] = self._plan(*found)
            yield replace(update, state=transport(spec, update.state, plans))

    def _plan(self, reference: Tensor, own: Tensor, cross: Tensor) -> Plan:
        sxx, sxx_inverse = self._roots(reference)
        syy, syy_inverse = self._roots(own)
        u, _, vt = torch.linalg.svd(sxx_inverse @ cross @ syy_inverse)
        rotation = vt.T @ u.T
        forward = syy_inverse @ rotation @ sxx
        backward = sxx_inverse @ rotation.T @ syy
        return Plan(forward.T, backward)

    def _roots(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """``S^1/2`` and ``S^-1/2`` of the ridged covariance."""
        values, vectors = torch.linalg.eigh(covariance)
        unit = values.clamp_min(0).mean().clamp_min(1e-300)
        values = values.clamp_min(0) + self.gamma * unit
        root = (vectors * values.sqrt()) @ vectors.T
        return root, (vectors / values.sqrt()) @ vectors.T
