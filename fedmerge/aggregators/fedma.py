"""FedMA: layers matched one after the other, the clients training the rest on in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.aggregators.base import check_range
from fedmerge.aggregators.layerwise import Clients, Layerwise
from fedmerge.matching.features import Unit
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext, Stage

__all__ = ["FedMA"]


@register("fedma", paper="arXiv:2002.06440")
@dataclass(frozen=True)
class FedMA(Layerwise):
    """Layers matched from the input on; after each, clients train the layers above it while it stays as merged.

    Wang et al. 2020, algorithm 1. A neuron is what goes into it. Where clients can be reached (in a federation, or
    with ``clients=``), each layer costs one exchange with them, plus one for the output layer; where not, it is the
    one-shot variant. The output layer is averaged with each class weighed by who has seen it. Rounds after the
    first, in which all clients start from the merged model, keep its order of neurons.

    Parameters
    ----------
    sigma, sigma0, gamma, sweeps, max_width, class_aware
        As in :class:`~fedmerge.aggregators.pfnm.PFNM`.
    retrain_epochs
        Passes over a client's examples between layers, at least 0; 0 is the one-shot variant.
    """

    gamma: float = 7.0
    retrain_epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "retrain_epochs", 0, float("inf"), open_high=True)

    def outgoing(self, state: State, unit: Unit, heads: Sequence[str]) -> list[Tensor]:
        """Nothing: what a neuron is used for changes when the layers above are trained."""
        return []

    def between(self, clients: Clients, left: int, context: MergeContext) -> Clients:
        """Merge what is matched, and have the clients train the rest."""
        if self.retrain_epochs == 0 or context.exchange is None:
            return clients
        carried = clients.carried()
        frozen = self._merge_done(clients, carried)
        sent = {u.client: state for u, state in zip(clients.updates, carried, strict=True)}
        stage = Stage(number=len(clients.done), frozen=tuple(frozen), epochs=self.retrain_epochs)
        returned = {u.client: u for u in context.exchange(sent, stage)}
        updates = []
        for update in clients.updates:
            # A client that does not answer in a stage goes on with what it was sent.
            back: ClientUpdate | None = returned.get(update.client)
            state = dict(sent[update.client]) if back is None else {**back.state}
            state |= {name: sent[update.client][name] for name in frozen}
            updates.append(replace(update, state=state))
        fresh = self._start(updates, context)
        fresh.done |= clients.done
        return fresh

    @staticmethod
    def _merge_done(clients: Clients, carried: list[dict[str, Tensor]]) -> list[str]:
        """Put the mean of every tensor that is settled in place of each client's; their names."""
        spec = clients.specs[0]
        settled = []
        for name in clients.trained[0]:
            standing = [i for (other, _), all_ in spec.touching.items() if other == name for i, _ in all_]
            produced = [
                i
                for (other, _), all_ in spec.touching.items()
                for i, site in all_
                if other == name and site.role == "out"
            ]
            if produced and all(i in clients.done for i in standing):
                settled.append(name)
        weights = torch.tensor(clients.weights, dtype=torch.float64)
        weights /= weights.sum()
        for name in settled:
            mean = sum(float(w) * c[name].double() for w, c in zip(weights, carried, strict=True))
            for state in carried:
                state[name] = torch.as_tensor(mean).to(state[name].dtype)
        return settled
