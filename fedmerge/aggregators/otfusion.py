"""OT fusion: layers carried onto each other by optimal transport, then averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import ServerData
from fedmerge.aggregators.aligning import Aligning
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.assignment import assign_blocks
from fedmerge.matching.blocks import match_blocks
from fedmerge.matching.fairness import anchor_of, bounded, shares_of
from fedmerge.matching.features import incoming
from fedmerge.matching.listening import Moments, check_heard, consumers, moments
from fedmerge.matching.optimal_transport import coupling, distances, mass, plan_of
from fedmerge.matching.symmetries import sampled_inputs, symmetries
from fedmerge.matching.units import Unit, check_forms, units
from fedmerge.matching.widths import check_widest
from fedmerge.permutations import PermutationSpec, Site, transport
from fedmerge.permutations.carrying import Plan
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["OTFusion"]

_Heard = dict[tuple[int, int, int], Moments]
_PASSES = 3  # where layers take in what is only matched after them


@register("otfusion", paper="arXiv:1910.05653")
@dataclass(frozen=True)
class OTFusion(Aligning):
    """Neurons carried onto those of the widest client, layer by layer, by optimal transport; then the average.

    Singh and Jaggi 2020, algorithm 1. Cost is the Euclidean distance between what makes two neurons (incoming
    weights, bias, norm, after the layers before have been carried over) or between what they say on the
    server's data. Widths may differ. The output layer keeps its classes, which the authors' code does not, and
    heads of attention are re-ordered whole.

    Parameters
    ----------
    ground
        ``"weights"``, or ``"activations"``, which needs data on the server.
    solver
        ``"emd"``, exact, or ``"sinkhorn"``, regularised by entropy.
    regularization
        For Sinkhorn, relative to the largest cost, positive.
    importance
        How much neurons weigh: ``"uniform"``, or the ``"l1"`` or ``"l2"`` norm of what makes them.
    fusion
        With more than two models, ``"successive"`` carries each onto the mean of those before, ``"anchor"``
        all onto the first; ``"barycentre"`` repeats with the mean of all.
    examples
        At most so many of the server's are listened to, evenly from all its batches; at least 1.
    """

    may_change_width: ClassVar[bool] = True

    ground: Literal["weights", "activations"] = "weights"
    solver: Literal["emd", "sinkhorn"] = "emd"
    regularization: float = 0.01
    importance: Literal["uniform", "l1", "l2"] = "uniform"
    fusion: Literal["successive", "anchor", "barycentre"] = "successive"
    examples: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "examples", 1, float("inf"), open_high=True)
        check_range(self, "regularization", 1e-6, float("inf"), open_high=True)
        for name, known in (
            ("ground", ("weights", "activations")),
            ("solver", ("emd", "sinkhorn")),
            ("importance", ("uniform", "l1", "l2")),
            ("fusion", ("successive", "anchor", "barycentre")),
        ):
            if getattr(self, name) not in known:
                raise InvalidOption(f"OTFusion: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def server_data(self) -> ServerData:
        """Inputs, to hear activations on."""
        own = super().server_data
        return "inputs" if self.ground == "activations" and own == "none" else own

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Carry every client onto the widest of those that look like most, of several onto the most typical."""
        if len(updates) == 1:
            yield from updates
            return
        check_widest([u.client for u in updates], [u.state for u in updates])
        specs, weights = [symmetries(context, u.state, "OTFusion") for u in updates], [u.weight for u in updates]
        check_forms(specs, updates)
        trained, shares = bounded([context.trained(u.state, "OTFusion") for u in updates]), shares_of(weights)
        sizes = [sum(t.numel() for t in state.values()) for state in trained]
        anchor = anchor_of(trained, weights, sizes)
        order = sorted(range(len(updates)), key=lambda i: (i != anchor, -sizes[i], -weights[i], i))
        heard = self._heard(specs, updates, order, context) if self.ground == "activations" else None
        carried: dict[int, tuple[list[Tensor], dict[int, Plan]]] = {}
        mean = WeightedSum()
        mean.add(trained[anchor], shares[anchor])
        for i in order[1:]:
            target = trained[anchor] if self.fusion == "anchor" else _mean(mean)
            carried[i] = self._onto((specs[anchor], target), (specs[i], trained[i]), (anchor, i), heard)
            mean.add(_moved(specs[i], trained[i], carried[i]), shares[i])
        if self.fusion == "barycentre":
            target = _mean(mean)
            for i in order:
                carried[i] = self._onto((specs[anchor], target), (specs[i], trained[i]), (anchor, i), heard)
        for i, update in enumerate(updates):
            state = _moved(specs[i], update.state, carried[i]) if i in carried else update.state
            yield replace(update, state=state)

    def _heard(
        self, specs: Sequence[PermutationSpec], updates: Sequence[ClientUpdate], order: list[int], context: MergeContext
    ) -> _Heard:
        modules = [context.module(u.state, "OTFusion") for u in updates]
        sites = [[consumers(s) for unit in units(spec) for s in (unit.sites, *unit.kind_sites)] for spec in specs]
        pairs = [(order[0], i) for i in order]
        heard_moments = moments(sites, modules, pairs, sampled_inputs(context, "OTFusion", self.examples))
        check_heard(heard_moments, [u.client for u in updates])
        return heard_moments

    def _onto(
        self,
        target: tuple[PermutationSpec, State],
        source: tuple[PermutationSpec, State],
        pair: tuple[int, int],
        heard: _Heard | None,
    ) -> tuple[list[Tensor], dict[int, Plan]]:
        """Permutations, and plans where they are not enough, that bring the source to the target's neurons."""
        (spec_a, a), (spec_b, b) = target, source
        pairs = list(zip(units(spec_a), units(spec_b), strict=True))
        plans: dict[int, Plan] = {}
        perms = spec_b.identity()
        done: set[int] = set()
        # What was heard stays the same however often one asks.
        for _ in range(_PASSES if heard is None and _has_later_inputs(spec_a) else 1):
            number = 0
            for unit_a, unit_b in pairs:
                settled = done - set(unit_a.members)
                costs = []
                parts = [(unit_a.sites, unit_b.sites), *zip(unit_a.kind_sites, unit_b.kind_sites, strict=True)]
                for sites_a, sites_b in parts:
                    sides = (spec_a, a, sites_a), (spec_b, b, sites_b)
                    costs.append(self._cost(*sides, settled, plans, pair, number, heard, unit_a.crossed))
                    number += 1
                if not unit_a.simple:
                    if heard is None or unit_a.crossings:
                        step = match_blocks((spec_a, a, unit_a), (spec_b, b, unit_b), settled, plans)
                    else:
                        step = _blocks_heard(unit_b, spec_b, [c[0] for c in costs])
                    b, perms = spec_b.apply(b, step), spec_b.compose(perms, step)
                else:
                    cost, features_a, features_b = costs[0]
                    masses = mass(features_a, self.importance), mass(features_b, self.importance)
                    plans[unit_a.index] = plan_of(coupling(cost, *masses, self.solver, self.regularization))
                done |= set(unit_a.members)
        for i, plan in list(plans.items()):
            index = plan.produce.argmax(1)
            if plan.produce.shape[0] == plan.produce.shape[1] and bool((plan.produce.amax(1) == 1).all()):
                perms[i] = index  # a permutation needs no matrix: plans of many clients would outgrow the models
                del plans[i]
        return perms, plans

    def _cost(
        self,
        side_a: tuple[PermutationSpec, State, Sequence[Site]],
        side_b: tuple[PermutationSpec, State, Sequence[Site]],
        done: set[int],
        plans: dict[int, Plan],
        pair: tuple[int, int],
        number: int,
        heard: _Heard | None,
        crossed: Mapping[tuple[str, int], Sequence[int]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[n_a, n_b] distances, and the features of both sides."""
        (spec_a, a, sites_a), (spec_b, b, sites_b) = side_a, side_b
        features_a = incoming(spec_a, a, sites_a, done, {}, crossed)
        features_b = incoming(spec_b, {n: b[n] for n in a}, sites_b, done, plans, crossed)
        if heard is not None and (number, *pair) in heard:
            own, heard_pair = heard[number, pair[0], pair[0]], heard[number, *pair]
            squares = own.squares_a[:, None] + heard_pair.squares_b[None, :] - 2 * heard_pair.products
            return squares.clamp_min(0).sqrt(), features_a, features_b
        return distances(features_a, features_b), features_a, features_b


def _mean(total: WeightedSum) -> dict[str, Tensor]:
    return {name: tensor / total.weight for name, tensor in total.tensors.items()}


def _has_later_inputs(spec: PermutationSpec) -> bool:
    """Whether a tensor takes in neurons of a later group than it lets out, as residual streams make it happen."""
    out: dict[str, int] = {}
    into: dict[str, int] = {}
    for i, group in enumerate(spec.groups):
        for site in group.sites:
            inputs = into if site.role == "in" else out
            inputs[site.parameter] = max(inputs.get(site.parameter, -1), i)
    return any(into.get(name, -1) > i for name, i in out.items())


def _moved(spec: PermutationSpec, state: State, matched: tuple[list[Tensor], dict[int, Plan]]) -> dict[str, Tensor]:
    perms, plans = matched
    return transport(spec, spec.apply(state, perms), plans)


def _blocks_heard(unit: Unit, spec: PermutationSpec, costs: Sequence[Tensor]) -> list[Tensor]:
    """Permutations of blocks, and within them, that cost least."""
    direct = -costs[0] if costs[0].numel() else torch.zeros(unit.size, unit.size, dtype=torch.float64)
    kinds = []
    for kind, cost in zip(unit.kinds, costs[1:], strict=True):
        size = spec.groups[kind[0]].size
        kinds.append(-cost.reshape(unit.size, size, unit.size, size))
    return unit.placed(spec, *assign_blocks(direct, kinds))
