"""How a merge reaches its clients again, after they have sent their updates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedmerge.errors import ClientFailed, NoAnswer
from fedmerge.layout import Layout
from fedmerge.state import State
from fedmerge.strategies.failures import check_mods, failures_in
from fedmerge.strategies.heard import Sent, heard

__all__ = ["Reach"]

log = logging.getLogger("fedmerge")


@dataclass(frozen=True)
class Reach:
    """The clients of one merge.

    Parameters
    ----------
    grid
        How to reach nodes; None where no round has been configured.
    nodes
        The node of each client.
    config
        What every message says besides what it is about.
    arrays_key, config_key, weight_key
        Names of records and of the number of examples, as in the strategy.
    timeout
        Seconds to wait for replies.
    round
        Of the merge.
    on_failure
        Called with those who failed in an exchange, and what it was about.
    layout
        Which tensors of a model travel to them, where it is not all.
    """

    grid: Grid | None
    nodes: Mapping[int, int]
    config: Mapping[str, Any]
    arrays_key: str = "arrays"
    config_key: str = "config"
    weight_key: str = "num-examples"
    timeout: float | None = None
    round: int = 0
    on_failure: Callable[[Sequence[ClientFailed], str], None] | None = None
    layout: Layout | None = None

    def travelling(self, state: State) -> State:
        """The part of a model that a message to these clients brings."""
        return state if self.layout is None else self.layout.travelling(state)

    def send(
        self, messages: Mapping[int, Message], about: str, late: Callable[[Message], bool] = lambda reply: False
    ) -> dict[int, Message]:
        """Send a message to each of these clients: their replies that are no errors, in order of clients.

        Who replied is told by the node and not by what the reply says; see :func:`~fedmerge.strategies.heard.heard`.
        What `late` says is a reply to another exchange is not looked at, and contradicts nothing that a node says now.

        Raises
        ------
        NoAnswer
            There is no grid.
        NoUsableUpdates
            A mod of the clients refuses such messages.
        """
        if self.grid is None:
            raise NoAnswer("aggregate_train before configure_train: there is no grid to reach clients by")
        # Read before they are sent: a grid within may number nodes otherwise.
        asked = {message.metadata.dst_node_id: client for client, message in messages.items()}
        sent = list(messages.values())
        replies = list(self.grid.send_and_receive(sent, timeout=self.timeout))
        for reply in filter(late, replies):
            client = asked.get(reply.metadata.src_node_id, f"on node {reply.metadata.src_node_id}")
            log.warning("client %s: an answer to another exchange came late, and is not opened", client)
        found = heard((reply for reply in replies if not late(reply)), Sent(list(asked), sent))

        def name(node: int | None, claimed: int | None) -> tuple[int | str, bool]:
            called = "on an unnamed node" if node is None else asked.get(node, f"on node {node}")
            return called, claimed == called

        failed = failures_in(found, self.round, name)
        failed += [ClientFailed(name(stray.node, None)[0], self.round, stray.reason) for stray in found.strays]
        if failed and self.on_failure is not None:
            self.on_failure(failed, about)
        check_mods([message for _, message in (*found.errors, *found.replies)])
        return dict(sorted(((asked[n], message) for n, message in found.replies if n is not None), key=itemgetter(0)))

    def node_of(self, client: int) -> int:
        """The node of a client that is to be asked again.

        Raises
        ------
        NoAnswer
            Its reply did not name one.
        """
        if client not in self.nodes:
            raise NoAnswer(f"client {client} cannot be asked again: its reply does not say which node it is of")
        return self.nodes[client]
