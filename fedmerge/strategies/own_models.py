"""Models of clients' own, and routed ones, that clients judge where a method makes them out of the shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord
from torch import Tensor

from fedmerge.merging import MergeResult
from fedmerge.merging.result import routing_in
from fedmerge.personal import PersonalPart
from fedmerge.routing import Routing
from fedmerge.state import State
from fedmerge.wire.record_values import to_arrays, view_arrays

__all__ = ["OwnModels"]


@dataclass(frozen=True)
class OwnModels:
    """The personal parts and the routing of the last merge, and what they are relative to.

    Parameters
    ----------
    parts
        By node.
    base
        The model that clients started from.
    tied
        By further names of shared parameters, their first.
    routing
        Experts and gates, where the method makes a routed model.
    clients
        The numbers of the clients that took part, by node.
    """

    parts: Mapping[int, PersonalPart] = field(default_factory=dict)
    base: State = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    routing: Routing | None = None
    clients: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, result: MergeResult, nodes: Mapping[int, int], base: State | None, tied: Mapping[str, str]
    ) -> OwnModels:
        """Those of a merge whose clients answered from these nodes."""
        parts = {nodes[client]: part for client, part in result.personal.items() if client in nodes}
        clients = {node: client for client, node in nodes.items() if client in result.accepted}
        return cls(parts, base or {}, tied, result.routing, clients)

    def remembering(self, memory: Mapping[str, Tensor]) -> OwnModels:
        """With the routing that a strategy's memory holds: a process that goes on has not made it itself."""
        return self if self.routing is not None else replace(self, routing=routing_in(memory))

    @property
    def differ(self) -> bool:
        """Whether nodes may judge models that differ from one to the next."""
        return bool(self.parts) or (self.routing is not None and not self.routing.looks_at_inputs)

    @property
    def bytes(self) -> int:
        """What clients need to make their models of the shared one.

        A bit a parameter and a number for masks; all experts and gates where these look at inputs; and where they look
        at none, what makes each client's own model, see :meth:`~fedmerge.routing.Routing.bytes_of`.
        """
        total = sum(part.bytes for part in self.parts.values())
        if self.routing is None:
            return total
        if self.routing.looks_at_inputs:
            return total + len(self.clients) * self.routing.bytes
        return total + sum(self.routing.bytes_of(client, self.base) for client in self.clients.values())

    @property
    def brought(self) -> ArrayRecord | None:
        """What a node is sent beside the shared model, where its gates are to look at its inputs."""
        if self.routing is None or not self.routing.looks_at_inputs:
            return None
        return to_arrays(self.routing.to_tensors())

    def judged_by(self, node: int, arrays: ArrayRecord) -> ArrayRecord:
        """The model that a node judges: its own of the shared model `arrays`, or that where it took no part."""
        part, routing = self.parts.get(node), self.routing
        if part is not None:
            return to_arrays(part.of(view_arrays(arrays), self.base, self.tied))
        if routing is None or routing.looks_at_inputs:
            return arrays
        own = routing.of_client(self.clients[node]) if node in self.clients else routing
        return to_arrays(own.unloaded(view_arrays(arrays), tied=self.tied))
