"""A grid around another one, for those that only look at whole exchanges."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmerge.strategies.order import Answer, Order, TrainingGrid
from fedmerge.strategies.rounds import by_message

__all__ = ["WrappedGrid"]


class WrappedGrid(TrainingGrid):
    """Passes everything on to the grid within; subclasses say what happens to an exchange.

    An order is sent as messages, so that a subclass sees all of them in :meth:`send_and_receive`, unless it says what
    becomes of an order itself.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    @property
    def inner(self) -> Grid:
        """The grid within."""
        return self._grid

    @property
    def innermost(self) -> Grid:
        """The grid within all grids around it."""
        return self._grid.innermost if isinstance(self._grid, WrappedGrid) else self._grid

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The inner grid's run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self._grid.get_node_ids()

    @property
    def most_nodes(self) -> int | None:
        """How many nodes there will ever be, where that is known."""
        return getattr(self._grid, "most_nodes", None)

    def partition_of_node(self, node: int) -> int | None:
        """Which partition a node holds, where the grid within knows it."""
        ask = getattr(self._grid, "partition_of_node", None)
        return ask(node) if callable(ask) else None

    def train(self, order: Order, *, timeout: float | None = None) -> Answer:
        """Send an order as messages."""
        return by_message(self, order, timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on; subclasses see only :meth:`send_and_receive`."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on; subclasses see only :meth:`send_and_receive`."""
        return self._grid.pull_messages(message_ids)
