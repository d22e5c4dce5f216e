"""How a merge reaches its clients again, after they have sent their updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.serverapp import Grid

from fedmerge.errors import ClientFailed, NoAnswer
from fedmerge.strategies.failures import check_mods, failures_in

__all__ = ["Reach"]


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
    """

    grid: Grid | None
    nodes: Mapping[int, int]
    config: Mapping[str, int]
    arrays_key: str = "arrays"
    config_key: str = "config"
    weight_key: str = "num-examples"
    timeout: float | None = None
    round: int = 0
    on_failure: Callable[[Sequence[ClientFailed], str], None] | None = None

    def send(self, messages: Sequence[Message], about: str) -> list[Message]:
        """The replies that are no errors.

        Raises
        ------
        NoAnswer
            There is no grid.
        NoUsableUpdates
            A mod of the clients refuses such messages.
        """
        if self.grid is None:
            raise NoAnswer("aggregate_train before configure_train: there is no grid to reach clients by")
        asked = [message.metadata.dst_node_id for message in messages]  # a grid within may number nodes otherwise
        replies = list(self.grid.send_and_receive(messages, timeout=self.timeout))
        failed = failures_in(replies, asked, self.round)
        if failed and self.on_failure is not None:
            self.on_failure(failed, about)
        check_mods(replies)
        return [reply for reply in replies if not reply.has_error()]

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

    def telling(self, more: Mapping[str, int]) -> Reach:
        """The same clients, told more in every message."""
        return replace(self, config={**self.config, **more})
