"""What PFNM and FedMA share: layers are matched one after the other from the input on.

Once a layer is matched, the next one is described in global coordinates: its incoming weights are re-ordered as the
neurons of the matched layer were.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.aligning import Aligning
from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.errors import ModelError
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.assignment import assign_blocks
from fedmerge.matching.bayes import match_bayes, readiness
from fedmerge.matching.blocks import match_blocks
from fedmerge.matching.fairness import bounded, normalised, shares_of
from fedmerge.matching.features import Unit, incoming, units
from fedmerge.matching.growing import class_weighted, filled, membership, outputs
from fedmerge.matching.symmetries import computes_alike, symmetries
from fedmerge.matching.units import check_forms
from fedmerge.matching.widths import check_widest
from fedmerge.permutations import PermutationSpec, Plan, transport
from fedmerge.permutations.carrying import Plans
from fedmerge.state import State
from fedmerge.statistics import ClassCounts, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Clients", "Layerwise"]

log = logging.getLogger("fedmerge")


@dataclass
class Clients:
    """How far a merge has come: every client's tensors, and how they map to global coordinates.

    Parameters
    ----------
    updates
        The clients' updates as they were sent, at first or after the last stage of retraining.
    specs, trained
        Each client's symmetries and trained parameters. Blocks (such as attention heads) that are matched already are
        in the order of the first client's.
    orders
        For each client, the permutations that bring its blocks into that order.
    plans
        For each client, by group of neurons: the plan that maps its neurons to global ones.
    done
        Groups that are matched.
    heads
        Names of tensors with one row per class; empty where class counts are not known.
    counts
        [clients, classes], examples of each class at each client, or None.
    settled
        Names of the tensors that are merged already: all clients have the same values.
    silent
        Clients that failed to answer once; they are not asked again.
    """

    updates: list[ClientUpdate]
    specs: list[PermutationSpec]
    trained: list[dict[str, Tensor]]
    orders: list[list[Tensor]]
    plans: list[dict[int, Plan]]
    done: set[int]
    heads: list[str]
    counts: Tensor | None
    settled: set[str] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)

    @property
    def weights(self) -> list[float]:
        """The clients' weights, summing to 1."""
        return normalised([u.weight for u in self.updates])

    @property
    def say(self) -> list[float]:
        """The clients' weights in matching, bounded so that none decides alone; see :func:`shares_of`."""
        return shares_of([u.weight for u in self.updates])

    def carried(self) -> list[dict[str, Tensor]]:
        """Every client's tensors in global coordinates, see :func:`~fedmerge.matching.growing.filled`."""
        states = [s.apply(u.state, o) for s, u, o in zip(self.specs, self.updates, self.orders, strict=True)]
        return filled(self.specs, states, self.weights, self.plans)


@dataclass(frozen=True)
class Layerwise(Aligning):
    """Match layer after layer; subclasses say what describes a neuron, and what happens between two layers."""

    may_change_width: ClassVar[bool] = True

    sigma: float = 1.0
    sigma0: float = 1.0
    gamma: float | None = None
    sweeps: int = 5
    max_width: int | None = None
    class_aware: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sigma", "sigma0", *(["gamma"] if self.gamma is not None else [])):
            check_range(self, name, 1e-12, float("inf"), open_high=True)
        check_range(self, "sweeps", 0, float("inf"), open_high=True)
        if self.max_width is not None:
            check_range(self, "max_width", 1, float("inf"), open_high=True)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Class counts, for the output layer."""
        return (ClassCounts(),) if self.class_aware else ()

    @abstractmethod
    def outgoing(self, state: State, unit: Unit, heads: Sequence[str]) -> list[Tensor]:
        """Output weights [n, positions * classes] that describe a neuron besides what goes into it."""

    def between(self, clients: Clients, upcoming: Unit | None, context: MergeContext) -> Clients:
        """Called after each layer is matched; `upcoming` is the next one, None after the last."""
        return clients

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Bring every client's parameters into the coordinates of the merged model, which may be wider."""
        if len(updates) == 1:
            yield from updates
            return
        clients = self._start(list(updates), context)
        if not _in_step(updates, context):
            generator = context.torch_generator(type(self).__name__)
            layers = units(clients.specs[0])
            for position, upcoming in zip_longest(range(len(layers)), layers[1:]):
                if not layers[position].simple:
                    _match_blocks(clients, position)
                else:
                    self._match(clients, position, generator, context)
                clients = self.between(clients, upcoming, context)
        carried = clients.carried()
        if clients.counts is not None and isinstance(self.combiner, FedAvg):  # others know no weights
            class_weighted(carried, clients.heads, clients.weights, clients.counts)
        for update, state in zip(clients.updates, carried, strict=True):
            yield replace(update, state=state)

    def _start(self, updates: list[ClientUpdate], context: MergeContext) -> Clients:
        name = type(self).__name__
        check_widest([u.client for u in updates], [u.state for u in updates])
        trained = bounded([context.trained(u.state, name) for u in updates])
        specs = [symmetries(context, u.state, name) for u in updates]
        check_forms(specs, updates)
        counts = None
        if self.class_aware:
            counts_sent = [u.statistic("class_counts")["class_counts"] for u in updates]
            if len({len(c) for c in counts_sent}) == 1:
                counts = torch.stack(counts_sent).cpu()  # weights, with which they are combined, are on the CPU
            else:
                log.warning("%s: clients count different numbers of classes: the output layer is averaged", name)
        heads = [] if counts is None else outputs(specs[0], trained[0], counts.shape[1])
        orders = [spec.identity() for spec in specs]
        return Clients(updates, specs, trained, orders, [{} for _ in updates], set(), heads, counts)

    def _match(self, clients: Clients, position: int, generator: torch.Generator, context: MergeContext) -> None:
        """Match one layer.

        A layer is allowed to grow only if a client's model, widened by neurons that nothing uses, still computes the
        same function. That fails, for instance, for the two directions of an LSTM, which share one width, and for a
        norm over all neurons, which would count the added ones. Then the layer is matched again at the widest client's
        width.
        """
        described = []
        for spec, state, plan in zip(clients.specs, clients.trained, clients.plans, strict=True):
            unit = units(spec)[position]
            own = incoming(spec, state, unit.sites, clients.done, plan)
            described.append([own, *self.outgoing(state, unit, clients.heads)])
        widths = [len(parts[0]) for parts in described]
        widest = max(widths)
        gamma = readiness(clients.counts, sum(widths) / len(widths)) if self.gamma is None else self.gamma
        for most in (self.max_width, widest):
            layer = match_bayes(
                [torch.cat(parts, 1) for parts in described],
                self._precisions(described, clients),
                sigma0=self.sigma0,
                gamma=gamma,
                sweeps=self.sweeps,
                max_width=most,
                generator=generator,
            )
            for plan, assigned in zip(clients.plans, layer.assignments, strict=True):
                plan[unit.index] = membership(assigned, layer.size)
            if layer.size == widest or self._bears_growth(clients, context):
                break
        clients.done |= set(unit.members)

    def _bears_growth(self, clients: Clients, context: MergeContext) -> bool:
        """Whether the first client's model computes the same function in global coordinates as before."""
        own = clients.updates[0].state
        try:
            # The added neurons have no outgoing weights, yet a tied tensor or a norm of weights may still read them.
            grown = clients.carried()[0]
        except ModelError:
            return False
        return computes_alike(context, own, grown, type(self).__name__)

    def _precisions(self, described: Sequence[Sequence[Tensor]], clients: Clients) -> list[Tensor]:
        """``1 / sigma`` times a client's share of all examples or, for output weights, of the examples of a class."""
        weights = torch.tensor(clients.say, dtype=torch.float64)
        shares = weights * len(weights) / weights.sum()
        precisions = []
        for j, (own, *outgoing) in enumerate(described):
            vectors = [torch.full((own.shape[1],), float(shares[j]) / self.sigma, dtype=torch.float64)]
            for part in outgoing:
                seen = clients.counts.double() if clients.counts is not None else weights[:, None]
                frequency = seen[j] / seen.sum(0).clamp_min(1) / self.sigma
                vectors.append(frequency.repeat(part.shape[1] // len(frequency)).clamp_min(1e-9))
            precisions.append(torch.cat(vectors))
        return precisions


def _match_blocks(clients: Clients, position: int) -> None:
    """Bring a layer's blocks, and the neurons within them, into the order of the first client's; no growth.

    Blocks are compared by their incoming weights. Each client's blocks are matched to the weighted mean of the clients
    before it. Where a neuron belongs to two kinds of blocks at once, a mean is not defined, and they are matched to the
    first client's.

    Raises
    ------
    ModelError
        Clients have other numbers or sizes of blocks.
    """
    sums: list[Tensor] = []
    seen = 0.0
    for j, (spec, weight) in enumerate(zip(clients.specs, clients.say, strict=True)):
        unit = units(spec)[position]
        described = _described(spec, clients.trained[j], unit, clients.done, clients.plans[j])
        if not sums:
            sums, seen = [weight * d for d in described], weight
            continue
        if any(d.shape != s.shape for d, s in zip(described, sums, strict=True)):
            raise ModelError(
                f"the blocks of {spec.groups[unit.index].name!r} (heads, or groups of a norm) differ between clients "
                "in number or size: they cannot be merged"
            )
        if unit.crossings or unit.crossed:
            spec_a, state = clients.specs[0], transport(clients.specs[0], clients.trained[0], clients.plans[0])
            target = (spec_a, state, units(spec_a)[position])
            step = match_blocks(target, (spec, clients.trained[j], unit), clients.done, clients.plans[j])
        else:
            own, *similarities = [s / seen @ d.T for s, d in zip(sums, described, strict=True)]
            sizes = [spec.groups[kind[0]].size for kind in unit.kinds]
            within = [s.reshape(unit.size, n, unit.size, n) for s, n in zip(similarities, sizes, strict=True)]
            direct = own if own.numel() else own.new_zeros(unit.size, unit.size)
            step = unit.placed(spec, *assign_blocks(direct, within))
        clients.trained[j] = spec.apply(clients.trained[j], step)
        clients.orders[j] = spec.compose(clients.orders[j], step)
        described = _described(spec, clients.trained[j], unit, clients.done, clients.plans[j])
        sums, seen = [s + weight * d for s, d in zip(sums, described, strict=True)], seen + weight
    clients.done |= set(unit.members)


def _described(spec: PermutationSpec, state: State, unit: Unit, done: set[int], plan: Plans) -> list[Tensor]:
    """Incoming weights of the blocks, then those of the neurons within them, one tensor for each kind."""
    return [incoming(spec, state, sites, done, plan) for sites in (unit.sites, *unit.kind_sites)]


def _in_step(updates: Sequence[ClientUpdate], context: MergeContext) -> bool:
    """Whether all clients started from a merged model: then their neurons are in one order already."""
    base = context.base
    if base is None or context.round < 2:
        return False
    return all(u.state[name].shape == tensor.shape for u in updates for name, tensor in base.items())
