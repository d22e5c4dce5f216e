"""Any grid with its nodes under stable numbers, so that a seed samples the same clients in every setting."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmerge.errors import ConfigError
from fedmerge.simulation.grids.waiting import Waiting
from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.simulation.workers.flower_task import FIRST_NODE, from_node
from fedmerge.strategies.heard import Sent, heard, sender_of
from fedmerge.wire.flower_records import partition_of

__all__ = ["NumberedGrid"]

log = logging.getLogger("fedmerge")


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
        self._sure: set[int] = set()

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

    def partition_of_node(self, node: int) -> int | None:
        """Which partition a node holds; -1 for one that did not tell one of its own when it was asked."""
        if node not in self._node_of:
            return None
        return node - FIRST_NODE if node in self._sure else -1

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Translate, send, translate the replies back, and return them in the order of their numbers."""
        self._waiting.used()
        sent, numbers = [], []
        for message in messages:
            numbers.append(message.metadata.dst_node_id)
            message.metadata.dst_node_id = self._node_of[numbers[-1]]
            sent.append(message)
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        of_message = Sent(numbers, sent).numbers
        back = [from_node(reply, self._number(reply, of_message)) for reply in replies]
        # Flower hands replies over as they arrive, and not every strategy or metric is indifferent to that.
        return sorted(back, key=lambda reply: reply.metadata.src_node_id)

    def _number(self, reply: Message, of_message: Mapping[str, int]) -> int:
        """The number of a reply's node; of a node that has none, something that is nobody's number."""
        node = sender_of(reply)
        if node is not None and node in self._number_of:
            return self._number_of[node]
        number = of_message.get(reply.metadata.reply_to_message_id)
        if number is not None and reply.has_error():  # Flower's own, in the node's stead
            return number
        return -abs(node or 0)

    def _ask(self, nodes: list[int]) -> None:
        """Ask nodes for their partitions. Who does not tell one, or one that another tells, gets a number that is left:
        it is known that its partition is not.

        Raises
        ------
        ConfigError
            Nobody tells a partition of its own.
        """
        asked = [Message(RecordDict(), dst_node_id=node, message_type="query.partition") for node in nodes]
        found = heard(self._grid.send_and_receive(asked), Sent(nodes, asked))
        claims = {node: partition_of(reply) for node, reply in found.replies if node is not None}
        times = Counter(claims.values())
        sure = {p: node for node, p in claims.items() if p is not None and times[p] == 1}
        left = [node for node in nodes if node not in sure.values()]
        free = [partition for partition in range(len(nodes)) if partition not in sure][: len(left)]
        if not sure:
            node = left[0]
            reasons = {of: m.error.reason for of, m in found.errors}
            several = "several nodes tell the same" if claims.get(node) is not None else "its reply names none"
            raise ConfigError(f"node {node} does not tell its partition: {reasons.get(node, several)}")
        for partition, node in zip(free, left, strict=True):
            log.warning("node %d does not tell a partition of its own: it is asked as number %d", node, partition)
        # Where all others hold the partitions from 0 on but one, that one is clear.
        if len(left) == 1 and claims.get(left[0]) is None and set(sure) < set(range(len(nodes))):
            sure[free[0]] = left[0]
        self._sure = {partition + FIRST_NODE for partition in sure}
        known = {**sure, **dict(zip(free, left, strict=True))}
        self._node_of = {partition + FIRST_NODE: node for partition, node in sorted(known.items())}
        self._number_of = {node: number for number, node in self._node_of.items()}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not translated: only whole exchanges are."""
        raise ConfigError("strategies on a NumberedGrid must use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not translated: only whole exchanges are."""
        raise ConfigError("strategies on a NumberedGrid must use send_and_receive")
