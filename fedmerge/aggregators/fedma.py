"""FedMA: layers matched one after the other, the clients training the rest on in between."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.aggregators.layerwise import Clients, Layerwise
from fedmerge.checks.validation import check_update
from fedmerge.errors import BadUpdate
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.features import Unit
from fedmerge.permutations import PermutationSpec
from fedmerge.questions.stages import News, Stage, catch_up, reordering
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import MergeContext

__all__ = ["FedMA"]

log = logging.getLogger("fedmerge")


@register("fedma", paper="arXiv:2002.06440")
@dataclass(frozen=True)
class FedMA(Layerwise):
    """Match and merge layer after layer from the input on; after each, clients train the layers above it.

    Wang et al. 2020, algorithm 1. Neurons are compared by their incoming weights. Merged layers stay frozen while the
    clients train the rest. This takes one exchange for each layer but the output. Clients keep their models between
    exchanges. A layer travels up once, when it is about to be matched, and down once, when it is merged, so that all
    exchanges together cost about one more round. Where clients cannot be reached (neither a federation nor
    ``clients=``), the one-shot variant runs instead: no training in between. In the output layer each class is averaged
    with the clients' counts of that class as weights. From the second round on all clients start from the merged model,
    so their neurons are in one order already and nothing is matched.

    Parameters
    ----------
    sigma, sigma0, gamma, sweeps, class_aware
        As in :class:`~fedmerge.aggregators.pfnm.PFNM`; gamma is 7 as the authors have it, None is by class counts.
    max_width
        Most neurons that a layer may grow to, unless a client is wider; unbounded by default. 1 keeps every layer as
        wide as at the widest client, so that later rounds cost no more than those of ``fedavg``. With retraining,
        LeNets gained more accuracy per byte without growth.
    retrain_epochs
        Passes over a client's examples between layers, at least 0; 0 is the one-shot variant.
    """

    gamma: float | None = 7.0
    retrain_epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "retrain_epochs", 0, float("inf"), open_high=True)

    def outgoing(self, state: State, unit: Unit, heads: Sequence[str]) -> list[Tensor]:
        """Nothing: outgoing weights change when the layers above are trained, so they say little about a neuron."""
        return []

    @property
    def several_exchanges(self) -> bool:
        """Unless it is the one-shot variant."""
        return self.retrain_epochs > 0

    def between(self, clients: Clients, upcoming: Unit | None, context: MergeContext) -> Clients:
        """Merge the layers that are matched by now, send them down, and let the clients train the rest.

        Each client sends back only what is needed to match the upcoming layer. Of the layers behind it the server knows
        no more than the shapes.
        """
        if context.exchange is None or not self.several_exchanges:
            return clients
        aliases = clients.specs[0].aliases
        newly_settled = _settled(clients.specs[0], clients.trained[0], clients.done) - clients.settled
        # A tied tensor travels under all its names.
        newly_settled |= {alias for alias, name in aliases.items() if name in newly_settled}
        frozen = clients.settled | newly_settled | context.frozen
        # After the last layer was matched, clients send back everything that they trained.
        wanted_back = None if upcoming is None else _wanted_for(clients, upcoming) - frozen
        order = list(clients.updates[0].state)
        merged = self._merged(clients, [n for n in order if n in newly_settled], context)
        stage = Stage(
            number=len(clients.done),
            frozen=tuple(n for n in order if n in frozen),
            epochs=self.retrain_epochs,
            send=tuple(n for n in order if (n not in frozen if wanted_back is None else n in wanted_back)),
            last=upcoming is None,
        )
        news = {
            u.client: News(merged, reordering(spec, u.state, order, plan, frozen))
            for u, spec, order, plan in zip(clients.updates, clients.specs, clients.orders, clients.plans, strict=True)
        }
        # What each client has after the news, before it trains: the state of those that do not answer.
        states = {u.client: catch_up(u.state, news[u.client]) for u in clients.updates}
        unanswered = {client: sent for client, sent in news.items() if client not in clients.silent}
        for answer in context.exchange(dict(unanswered), stage):
            if answer.client not in unanswered:
                continue
            expected = {name: states[answer.client][name] for name in stage.send}
            try:
                states[answer.client] |= check_update(answer, expected).state
            except BadUpdate as bad:
                log.warning("stage %d: %s", stage.number, bad)
                continue
            states[answer.client] |= {alias: states[answer.client][name] for alias, name in aliases.items()}
            del unanswered[answer.client]
        for client in unanswered:
            log.warning("stage %d: client %d stays at what it sent last, and is not asked again", stage.number, client)
        after = self._start([replace(u, state=states[u.client]) for u in clients.updates], context)
        after.done, after.settled, after.silent = clients.done, frozen, clients.silent | set(unanswered)
        return after

    def _merged(self, clients: Clients, names: Collection[str], context: MergeContext) -> dict[str, Tensor]:
        """These tensors in global coordinates, each combined over the clients that have its neurons."""
        carried = clients.carried()
        if not isinstance(self.combiner, FedAvg):
            parts = [
                replace(u, state={n: c[n] for n in names}, weight=w)
                for u, c, w in zip(clients.updates, carried, clients.weights, strict=True)
            ]
            merged = self.combiner.merge(parts, context, {})[0] if names else {}
        else:
            shares = clients.weights
            merged = {
                n: torch.as_tensor(sum(s * c[n].double() for s, c in zip(shares, carried, strict=True))) for n in names
            }
        return {name: tensor.to(carried[0][name].dtype) for name, tensor in merged.items()}


def _settled(spec: PermutationSpec, trained: State, done: Collection[int]) -> set[str]:
    """Names of parameters that are final: they produce neurons, and every group that they touch is matched."""
    groups: dict[str, set[int]] = {}
    produced = set()
    for (name, _), touching in spec.touching.items():
        groups.setdefault(name, set()).update(i for i, _ in touching)
        if any(site.role == "out" for _, site in touching):
            produced.add(name)
    return {name for name in trained if name in produced and groups[name] <= set(done)}


def _wanted_for(clients: Clients, upcoming: Unit) -> set[str]:
    """Names of parameters by which the upcoming layer is matched, and of those that are final once it is."""
    spec, known = clients.specs[0], clients.done | set(upcoming.members)
    groups: dict[str, set[int]] = {}
    for (name, _), touching in spec.touching.items():
        others = {i for i, site in touching if site.role != "out" or i in known}
        groups.setdefault(name, set()).update(others)
    into = {s.parameter for g in upcoming.members for s in spec.groups[g].sites if s.role == "out"}
    described = {name for name in into if name in clients.trained[0] and groups[name] <= known}
    return described | _settled(spec, clients.trained[0], known)
