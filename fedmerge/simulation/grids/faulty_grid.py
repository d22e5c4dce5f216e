"""A grid that loses replies: of clients that disappear, and of those that are too late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from flwr.app import ConfigRecord, Error, Message
from flwr.serverapp import Grid

from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.simulation.scenarios.faults import Mishaps
from fedmerge.simulation.workers.flower_task import FIRST_NODE, stamp
from fedmerge.strategies.order import Answer, Order
from fedmerge.strategies.rounds import exchanged

__all__ = ["FaultyGrid"]

_UNAVAILABLE = 3  # flwr.common.constant.ErrorCode.MESSAGE_UNAVAILABLE


class FaultyGrid(WrappedGrid):
    """Passes training on to all but the clients whose reply would not count; these are spared the training.

    Who disappears gives no reply, as in a deployment; who is late gives an error reply that says so.

    Parameters
    ----------
    grid
        The grid within; its node ``client + 2`` is that client.
    mishaps
        Who has which fault.
    timeout
        When a round ends, in simulated seconds; None waits for whoever is late.
    """

    def __init__(self, grid: Grid, mishaps: Mishaps, timeout: float | None) -> None:
        super().__init__(grid)
        self._mishaps, self._timeout = mishaps, timeout
        self._waited_for: list[dict[str, int | str]] = []

    def take_waited_for(self) -> list[dict[str, int | str]]:
        """Clients since the last call that were slow and still in time."""
        taken, self._waited_for = self._waited_for, []
        return taken

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send to those who will reply."""
        sent, late = [], []
        for message in messages:
            config = next(iter(message.content.config_records.values()), ConfigRecord())
            # Further stages are only for those who replied in the first.
            first = message.metadata.message_type == "train" and not config.get("stage")
            node = message.metadata.dst_node_id
            lost = self._lost([node], config) if first else {}
            if not lost:
                sent.append(message)
            elif self._is_slow(node, config):
                late.append(_too_late(message, lost[node]))
        return [*self._grid.send_and_receive(sent, timeout=timeout), *late]

    def train(self, order: Order, *, timeout: float | None = None) -> Answer:
        """Hand an order on for those who will reply."""
        lost = self._lost(order.nodes, order.config)
        left = [node for node in order.nodes if node not in lost]
        answer = exchanged(self._grid, replace(order, nodes=left), timeout) if left else Answer()
        answer.failures += lost.items()
        return answer

    def _is_slow(self, node: int, config: ConfigRecord) -> bool:
        return self._mishaps.fault(node - FIRST_NODE, _round(config)) == "slow"

    def _lost(self, nodes: Sequence[int], config: ConfigRecord) -> dict[int, str]:
        """Nodes whose reply does not come in time, and why."""
        lost: dict[int, str] = {}
        for node in nodes:
            client, round = node - FIRST_NODE, _round(config)
            reason = self._mishaps.lost(client, round, self._timeout)
            if reason is not None:
                lost[node] = reason
            elif self._is_slow(node, config):
                told = f"slow: {self._mishaps.faults.slow_seconds:g} s, and the round waited"
                self._waited_for.append({"client": client, "reason": told})
        return lost


def _too_late(message: Message, reason: str) -> Message:
    stamp(message)
    return Message(Error(_UNAVAILABLE, reason), reply_to=message)


def _round(config: ConfigRecord) -> int:
    told = config.get("server-round", 0)
    return told if isinstance(told, int) else 0
