"""FedMA: layers matched one after the other, the clients training the rest on in between."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.aggregators.base import check_range
from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.aggregators.layerwise import Clients, Layerwise
from fedmerge.errors import BadUpdate
from fedmerge.matching.features import Unit
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import register
from fedmerge.stages import News, Stage, catch_up, reordering
from fedmerge.state import State
from fedmerge.update import MergeContext
from fedmerge.validation import check_update

__all__ = ["FedMA"]

log = logging.getLogger("fedmerge")


@register("fedma", paper="arXiv:2002.06440")
@dataclass(frozen=True)
class FedMA(Layerwise):
    """Layers matched from the input on; after each, clients train the layers above it while it stays as merged.

    Wang et al. 2020, algorithm 1. A neuron is what goes into it. Where clients can be reached (in a federation, or
    with ``clients=``), there is one exchange for each layer but the output: clients keep their model, and a layer goes
    up when it is to be matched and down when it is merged, so that all exchanges together cost about one more round.
    Where not, it is the one-shot variant. The output layer is averaged with each class weighed by who has seen it.
    Rounds after the first, in which all clients start from the merged model, keep its order of neurons.

    Parameters
    ----------
    sigma, sigma0, gamma, sweeps, class_aware
        As in :class:`~fedmerge.aggregators.pfnm.PFNM`; gamma is 7 as the authors have it, None is by class counts.
    max_width
        Widest a layer may grow unless a client is wider; none by default. 1 keeps all at the widest client's, so that
        later rounds cost what those of ``fedavg`` do; with retraining, LeNets gained more per byte so than by growth.
    retrain_epochs
        Passes over a client's examples between layers, at least 0; 0 is the one-shot variant.
    """

    gamma: float | None = 7.0
    retrain_epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "retrain_epochs", 0, float("inf"), open_high=True)

    def outgoing(self, state: State, unit: Unit, heads: Sequence[str]) -> list[Tensor]:
        """Nothing: what a neuron is used for changes when the layers above are trained."""
        return []

    @property
    def several_exchanges(self) -> bool:
        """Unless it is the one-shot variant."""
        return self.retrain_epochs > 0

    def between(self, clients: Clients, upcoming: Unit | None, context: MergeContext) -> Clients:
        """Merge what is matched, and have the clients train the rest.

        Clients keep their model, so that a layer travels up once, when it is to be matched, and down once, when it is
        merged; of layers in between the server knows only the shapes.
        """
        if context.exchange is None or not self.several_exchanges:
            return clients
        aliases = clients.specs[0].aliases
        fresh = _settled(clients.specs[0], clients.trained[0], clients.done) - clients.settled
        fresh |= {alias for alias, name in aliases.items() if name in fresh}  # one tensor travels under all its names
        frozen = clients.settled | fresh | context.frozen
        asked = None if upcoming is None else _asked(clients, upcoming) - frozen
        order = list(clients.updates[0].state)
        merged = self._merged(clients, [n for n in order if n in fresh], context)
        stage = Stage(
            number=len(clients.done),
            frozen=tuple(n for n in order if n in frozen),
            epochs=self.retrain_epochs,
            send=tuple(n for n in order if (n not in frozen if asked is None else n in asked)),
            last=upcoming is None,
        )
        news = {
            u.client: News(merged, reordering(spec, u.state, order, plan, frozen))
            for u, spec, order, plan in zip(clients.updates, clients.specs, clients.orders, clients.plans, strict=True)
        }
        caught = {u.client: catch_up(u.state, news[u.client]) for u in clients.updates}
        reached = {client: told for client, told in news.items() if client not in clients.silent}
        for answer in context.exchange(dict(reached), stage):
            if answer.client not in reached:
                continue
            wanted = {name: caught[answer.client][name] for name in stage.send}
            try:
                caught[answer.client] |= check_update(answer, wanted).state
            except BadUpdate as bad:
                log.warning("stage %d: %s", stage.number, bad)
                continue
            caught[answer.client] |= {alias: caught[answer.client][name] for alias, name in aliases.items()}
            del reached[answer.client]
        for client in reached:
            log.warning("stage %d: client %d stays at what it sent last, and is not asked again", stage.number, client)
        after = self._start([replace(u, state=caught[u.client]) for u in clients.updates], context)
        after.done, after.settled, after.silent = clients.done, frozen, clients.silent | set(reached)
        return after

    def _merged(self, clients: Clients, names: Collection[str], context: MergeContext) -> dict[str, Tensor]:
        """Every tensor of these combined over the clients that have its neurons, in global coordinates."""
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
    """Names of parameters that neurons come out of and all of whose groups are matched."""
    groups: dict[str, set[int]] = {}
    produced = set()
    for (name, _), standing in spec.touching.items():
        groups.setdefault(name, set()).update(i for i, _ in standing)
        if any(site.role == "out" for _, site in standing):
            produced.add(name)
    return {name for name in trained if name in produced and groups[name] <= set(done)}


def _asked(clients: Clients, upcoming: Unit) -> set[str]:
    """Names of parameters that a layer is matched by, or that are settled once it is."""
    spec, known = clients.specs[0], clients.done | set(upcoming.members)
    groups: dict[str, set[int]] = {}
    for (name, _), standing in spec.touching.items():
        others = {i for i, site in standing if site.role != "out" or i in known}
        groups.setdefault(name, set()).update(others)
    into = {s.parameter for g in upcoming.members for s in spec.groups[g].sites if s.role == "out"}
    described = {name for name in into if name in clients.trained[0] and groups[name] <= known}
    return described | _settled(spec, clients.trained[0], known)
