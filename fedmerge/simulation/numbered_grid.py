"""Any grid with its nodes under stable numbers, so that a seed samples the same clients in every setting."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmerge.errors import ConfigError
from fedmerge.simulation.flower_task import FIRST_NODE, from_node
from fedmerge.simulation.waiting import Waiting
from fedmerge.simulation.wrapped_grid import WrappedGrid
from fedmerge.strategies.wire import partition_of

__all__ = ["NumberedGrid"]


class NumberedGrid(WrappedGrid):
    """Shows node ``partition + 2`` for the client with that partition, whatever id Flower drew for it.

    Flower's simulation gives nodes random ids in every run. This asks every node once which partition it
    holds (a ``query`` that changes nothing) and translates from then on; a round costs nothing more.

    Parameters
    ----------
    grid
        Flower's grid.
    num_clients
        Nodes to wait for.
    """

    def __init__(self, grid: Grid, num_clients: int) -> None:
        super().__init__(grid)
        self._num_clients, self._waiting = num_clients, Waiting(num_clients)
        self._node_of: dict[int, int] = {}
        self._number_of: dict[int, int] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Stable numbers of the nodes; none until all have connected.

        Raises
        ------
        InvalidOption
            Flower's own loop asks, which waits for more nodes than are numbered.
        """
        if not self._node_of:
            nodes = list(self._grid.get_node_ids())
            if len(nodes) < self._num_clients:
                return []
            self._ask(nodes)
        self._waiting.asked()
        return sorted(self._node_of)

    @property
    def most_nodes(self) -> int:
        """How many nodes there will ever be."""
        return self._num_clients

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Translate, send, translate the replies back, and return them in the order of their numbers."""
        self._waiting.used()
        sent = []
        for message in messages:
            message.metadata.dst_node_id = self._node_of[message.metadata.dst_node_id]
            sent.append(message)
        replies = self._grid.send_and_receive(sent, timeout=timeout)
        back = [from_node(reply, self._number_of[reply.metadata.src_node_id]) for reply in replies]
        # Flower hands replies over as they arrive, and not every strategy or metric is indifferent to that.
        return sorted(back, key=lambda reply: reply.metadata.src_node_id)

    def _ask(self, nodes: list[int]) -> None:
        asked = [Message(RecordDict(), dst_node_id=node, message_type="query.partition") for node in nodes]
        for reply in self._grid.send_and_receive(asked):
            partition = partition_of(reply)
            if partition is None:
                reason = reply.error.reason if reply.has_error() else "its reply names none"
                raise ConfigError(f"node {reply.metadata.src_node_id} does not tell its partition: {reason}")
            self._node_of[partition + FIRST_NODE] = reply.metadata.src_node_id
        self._number_of = {node: number for number, node in self._node_of.items()}
        if len(self._node_of) < self._num_clients:
            raise ConfigError(f"{self._num_clients} nodes hold only {len(self._node_of)} different partitions")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not translated: only whole exchanges are."""
        raise ConfigError("strategies on a NumberedGrid must use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not translated: only whole exchanges are."""
        raise ConfigError("strategies on a NumberedGrid must use send_and_receive")
