"""Measures what goes over a Grid: replies, failures, bytes and seconds of every exchange."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmerge.simulation.workers import content_bytes
from fedmerge.strategies.wire import reply_order

__all__ = ["Exchange", "Failure", "MeasuredGrid"]


@dataclass(frozen=True)
class Failure:
    """A node that answered with an error."""

    node: int
    reason: str


@dataclass(frozen=True)
class Exchange:
    """One round of messages: ``kind`` is train, evaluate or query."""

    kind: str
    ok: int
    failures: tuple[Failure, ...]
    bytes_down: int
    bytes_up: int
    seconds: float


class MeasuredGrid(Grid):
    """Passes everything on to another grid and keeps account; works on Flower's own grids too."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.exchanges: list[Exchange] = []

    def take(self) -> list[Exchange]:
        """Exchanges since the last call."""
        taken, self.exchanges = self.exchanges, []
        return taken

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, wait, and note what it took."""
        sent = list(messages)
        started = time.perf_counter()
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        seconds = time.perf_counter() - started
        if sent:
            failed = [m for _, m in reply_order(replies) if m.has_error()]
            self.exchanges.append(
                Exchange(
                    kind=sent[0].metadata.message_type.partition(".")[0],
                    ok=len(replies) - len(failed),
                    failures=tuple(
                        Failure(m.metadata.src_node_id, m.error.reason or "no reason given") for m in failed
                    ),
                    bytes_down=_total_bytes(message.content for message in sent),
                    bytes_up=_total_bytes(m.content for m in replies if m.has_content()),
                    seconds=seconds,
                )
            )
        return replies

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

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on; only :meth:`send_and_receive` is measured."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._grid.pull_messages(message_ids)


def _total_bytes(contents: Iterable[RecordDict]) -> int:
    """Bytes of all contents; one that many messages share is counted for each, but measured once."""
    known: dict[int, int] = {}
    total = 0
    for content in contents:
        if id(content) not in known:
            known[id(content)] = content_bytes(content)
        total += known[id(content)]
    return total
