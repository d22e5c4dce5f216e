"""What a merge gives, and what a worker gives of its share of the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedmerge.aggregators.routed import Routed
from fedmerge.checks.magnitudes import Outliers
from fedmerge.checks.tensor_checks import Unmoved
from fedmerge.errors import BadUpdate
from fedmerge.merging.buffers import BufferFold
from fedmerge.personal import PersonalPart, parts_in
from fedmerge.refine.exchanged import Exchanged
from fedmerge.routing import Routing
from fedmerge.state import State, prefixed, with_prefix
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["ROUTING", "MergeResult", "Partial", "routing_in", "routing_memory"]

ROUTING = "routing"
"""Below it, the pipeline's memory holds the tensors of the last merge's routing."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge gives: the new state, the memory for next time, and who took part."""

    state: dict[str, Tensor]
    memory: dict[str, Tensor]
    accepted: tuple[int, ...]
    dropped: tuple[BadUpdate, ...]
    exchanges: tuple[Exchanged, ...] = ()
    """What was asked of clients about the merged model, one entry an exchange."""
    answers: int = 0
    """How many questions a client was asked at most, those included that were asked again because another client
    failed, or whose answers were of no use: what :func:`~fedmerge.privacy.accountant.epsilon` counts."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Steps of refinements that were not taken, and why."""
    refused: tuple[tuple[int, str], ...] = ()
    """Clients whose answers to questions of the exchanges do not count, and why."""

    @property
    def personal(self) -> Mapping[int, PersonalPart]:
        """What makes each client's own model of the shared one, for methods that say so (``emr``, ``tall_masks``)."""
        return parts_in(prefixed("aggregator", self.memory))

    @property
    def routing(self) -> Routing | None:
        """What makes a routed model of the shared one, for methods that say so (``wemoe``); None for others."""
        return routing_in(self.memory)


def routing_in(memory: State) -> Routing | None:
    """The routing in a pipeline's memory, such as that of a checkpoint; None where its method makes none.

    Examples
    --------
    >>> routing_in({}) is None
    True
    """
    tensors = prefixed(ROUTING, memory)
    return Routing.from_tensors(tensors) if tensors else None


def routing_memory(
    aggregator: Routed, state: State, updates: Sequence[ClientUpdate], context: MergeContext
) -> dict[str, Tensor]:
    """What :func:`routing_in` reads, of the complete model `state` that was merged of `updates`."""
    # Whatever can be read once is read several times.
    held = None if context.data is None else list(context.data)
    routing = aggregator.route(state, updates, replace(context, data=held))
    # Its tensors may be views of the models merged, which belong to whoever sent them.
    return {} if routing is None else with_prefix(ROUTING, {n: t.clone() for n, t in routing.to_tensors().items()})


@dataclass
class Partial:
    """What a worker makes of its share of the clients: a sum of their parameters, their buffers, and who they were."""

    total: Any
    buffers: BufferFold
    accepted: list[int]
    dropped: list[BadUpdate]
    unmoved: Unmoved | None = None
    outliers: Outliers = field(default_factory=Outliers)
