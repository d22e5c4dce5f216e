"""PFNM: neurons matched to a global layer that grows where clients have learnt different things."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.aligning import Aligning
from fedmerge.aggregators.base import check_range
from fedmerge.matching.bayes import match_bayes
from fedmerge.matching.features import incoming, rows, units
from fedmerge.matching.growing import class_weighted, filled, membership, outputs
from fedmerge.permutations import PermutationSpec, Plan
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import ClassCounts, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["PFNM"]


@register("pfnm", paper="arXiv:1905.12022")
@dataclass(frozen=True)
class PFNM(Aligning):
    """Neurons matched to global ones by a Beta-Bernoulli process; a layer grows where nothing fits.

    Yurochkin et al. 2019. A neuron is what goes into it and, before the output layer, what comes out of it, whose
    class c has the precision ``n_jc / (sigma sum_k n_kc)``. Layers are matched from the input on, each in the
    coordinates of the layers before. A global neuron is the mean of the clients' that were matched to it, each
    weighed by its examples; the output layer weighs each class by who has seen it.

    Parameters
    ----------
    sigma
        Variance of a client's neuron about the global one, positive.
    sigma0
        Variance of global neurons about 0, positive.
    gamma
        Readiness to add neurons, positive: small values keep layers as wide as the widest client's.
    sweeps
        How often each client is matched anew, in random order.
    max_width
        Widest a layer may grow unless a client is wider; none by default.
    shrink
        Whether to return the posterior mean, which draws rare neurons towards 0, and not the mean.
    class_aware
        Whether clients send class counts, for the output layer.
    """

    may_change_width: ClassVar[bool] = True

    sigma: float = 1.0
    sigma0: float = 1.0
    gamma: float = 1.0
    sweeps: int = 5
    max_width: int | None = None
    shrink: bool = False
    class_aware: bool = True

    def __post_init__(self) -> None:
        for name in ("sigma", "sigma0", "gamma"):
            check_range(self, name, 1e-12, float("inf"), open_high=True)
        check_range(self, "sweeps", 0, float("inf"), open_high=True)
        if self.max_width is not None:
            check_range(self, "max_width", 1, float("inf"), open_high=True)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Class counts, for the output layer."""
        return (ClassCounts(),) if self.class_aware else ()

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Carry every client into the coordinates of the grown model."""
        if len(updates) == 1:
            yield from updates
            return
        specs = [context.symmetries(u.state, "PFNM") for u in updates]
        trained = [context.trained(u.state, "PFNM") for u in updates]
        weights = [u.weight for u in updates]
        counts = self._counts(updates)
        heads = [] if counts is None else outputs(specs[0], trained[0], counts.shape[1])
        plans: list[dict[int, Plan]] = [{} for _ in updates]
        done: set[int] = set()
        generator = context.torch_generator("pfnm")
        for number, unit in enumerate(units(specs[0])):
            if unit.kinds:
                continue
            described = [
                self._described(spec, state, number, done, plan, heads)
                for spec, state, plan in zip(specs, trained, plans, strict=True)
            ]
            layer = match_bayes(
                [torch.cat(parts, 1) for parts in described],
                self._precisions(described, weights, counts),
                sigma0=self.sigma0,
                gamma=self.gamma,
                sweeps=self.sweeps,
                max_width=self.max_width,
                generator=generator,
            )
            for plan, assigned in zip(plans, layer.assignments, strict=True):
                plan[unit.index] = membership(assigned, layer.size)
            done |= set(unit.members)
        carried = filled(specs, [u.state for u in updates], weights, plans)
        if counts is not None:
            class_weighted(carried, heads, weights, counts)
        for update, state in zip(updates, carried, strict=True):
            yield replace(update, state=state)

    def _counts(self, updates: Sequence[ClientUpdate]) -> Tensor | None:
        if not self.class_aware:
            return None
        return torch.stack([u.statistic("class_counts")["class_counts"] for u in updates])

    def _described(
        self,
        spec: PermutationSpec,
        state: State,
        number: int,
        done: set[int],
        plans: dict[int, Plan],
        heads: Sequence[str],
    ) -> list[Tensor]:
        """What goes into each neuron, and each output weight that comes out of it [n, classes], by output layer."""
        group = spec.groups[units(spec)[number].index]
        parts = [incoming(spec, state, group.sites, done, plans)]
        for site in group.sites:
            if site.role == "in" and site.parameter in heads:
                parts.append(rows(state[site.parameter], site, {}))
        return parts

    def _precisions(
        self, described: Sequence[Sequence[Tensor]], weights: Sequence[float], counts: Tensor | None
    ) -> list[Tensor]:
        shares = torch.tensor(weights, dtype=torch.float64) * len(weights) / sum(weights)
        found = []
        for j, parts in enumerate(described):
            vectors = [torch.full((parts[0].shape[1],), float(shares[j]) / self.sigma, dtype=torch.float64)]
            for part in parts[1:]:
                assert counts is not None  # only class counts make output layers known
                seen = counts.double()
                own = seen[j] / seen.sum(0).clamp_min(1) / self.sigma
                per_position = part.shape[1] // len(own)
                # a neuron's positions come first and its classes last
                vectors.append(own.repeat(per_position).clamp_min(1e-9))
            found.append(torch.cat(vectors))
        return found
