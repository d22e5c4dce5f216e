"""Measures what goes over a Grid: replies, failures, bytes and seconds of every exchange."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmerge.simulation.grids.told_metrics import mean_metrics
from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.simulation.scenarios.faults import no_reply
from fedmerge.simulation.workers.flower_task import FIRST_NODE
from fedmerge.simulation.workers.workers import content_bytes
from fedmerge.strategies.failures import NO_REPLY
from fedmerge.strategies.heard import Sent, heard
from fedmerge.strategies.order import Answer, Order
from fedmerge.strategies.rounds import by_message, exchanged
from fedmerge.wire.flower_records import STEPS_KEY

__all__ = ["Exchange", "Failure", "MeasuredGrid"]

_MOST_STEPS = 2**53  # of one client: beyond it a float does not count on


@dataclass(frozen=True)
class Failure:
    """A node that answered with an error, or not at all."""

    node: int
    reason: str

    @property
    def client(self) -> int | None:
        """Its client, on grids whose nodes are numbered as ours; None for a node that is none of the federation's."""
        return self.node - FIRST_NODE if self.node >= FIRST_NODE else None


@dataclass(frozen=True)
class Exchange:
    """One round of messages: ``kind`` is train, evaluate or query; ``engine`` is how clients trained.

    ``local_steps`` is how many optimiser steps all clients took, None where one of them does not tell; ``began`` and
    ``ended`` are readings of ``time.perf_counter``; ``metrics`` are means of what clients told, where messages do.
    """

    kind: str
    ok: int
    failures: tuple[Failure, ...]
    bytes_down: int
    bytes_up: int
    began: float
    ended: float
    engine: str = "messages"
    local_steps: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


class MeasuredGrid(WrappedGrid):
    """Passes everything on to another grid and keeps account; works on Flower's own grids too.

    With `keep_trained` the replies of the first training exchange stay in ``trained``: those of later ones hold
    models that the server has had a hand in, or parts of models. With `average` the clients' metrics are averaged.
    """

    def __init__(self, grid: Grid, *, keep_trained: bool = False, average: bool = False) -> None:
        super().__init__(grid)
        self._keep_trained, self._averages = keep_trained, average
        self.exchanges: list[Exchange] = []
        self.trained: list[Message] = []

    def take(self) -> list[Exchange]:
        """Exchanges since the last call."""
        taken, self.exchanges = self.exchanges, []
        return taken

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, wait, and note what it took."""
        sent = list(messages)
        asked = [message.metadata.dst_node_id for message in sent]  # a grid within may number nodes otherwise
        started = time.perf_counter()
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        return self._noted(Sent(asked, sent), replies, (started, time.perf_counter()), timeout)

    def _noted(
        self, asked: Sent, replies: list[Message], times: tuple[float, float], timeout: float | None
    ) -> list[Message]:
        sent = list(asked.messages)
        kind = sent[0].metadata.message_type.partition(".")[0] if sent else ""
        if self._keep_trained and kind == "train" and not self.trained:
            self.trained = replies
        if sent:
            found = heard(replies, asked)
            failures = [Failure(node, no_reply(node - FIRST_NODE, timeout)) for node in found.silent]
            # A node fails once; errors of nobody that is known count each.
            broken = [(-1 if node is None else node, m.error.reason or "no reason given") for node, m in found.errors]
            failures += [Failure(node, reason) for node, reason in broken if node < 0]
            failures += [Failure(node, reason) for node, reason in dict(reversed(broken)).items() if node >= 0]
            self.exchanges.append(
                Exchange(
                    kind=kind,
                    ok=sum(not reply.has_error() for reply in replies),
                    failures=tuple(sorted(failures, key=lambda failure: failure.node)),
                    bytes_down=_total_bytes(message.content for message in sent),
                    bytes_up=_total_bytes(m.content for m in replies if m.has_content()),
                    began=times[0],
                    ended=times[1],
                    local_steps=_total_steps(m.content for m in replies if m.has_content()),
                    metrics=mean_metrics(replies) if self._averages and kind != "query" else {},
                )
            )
        return replies

    def train(self, order: Order, *, timeout: float | None = None) -> Answer:
        """Hand an order on, and note what it took."""
        if self._keep_trained and not self.trained:
            return by_message(self, order, timeout)
        started = time.perf_counter()
        answer = exchanged(self._grid, order, timeout)
        ended = time.perf_counter()
        if not order.nodes:
            return answer
        told = [(-1 if node is None else node, reason) for node, reason in answer.failures]
        replies = answer.replies
        sent = [message.content for message in replies if message.has_content()]
        by_messages = answer.engine is None
        self.exchanges.append(
            Exchange(
                kind="train",
                ok=sum(not reply.has_error() for reply in replies) if by_messages else len(answer.trained),
                failures=tuple(
                    Failure(node, no_reply(node - FIRST_NODE, timeout) if reason == NO_REPLY else reason)
                    for node, reason in sorted(told, key=lambda failure: failure[0])
                ),
                bytes_down=content_bytes(order.content) * len(order.nodes),
                bytes_up=_total_bytes(sent) if by_messages else answer.bytes_up,
                began=started,
                ended=ended,
                engine="messages" if answer.engine is None else answer.engine.name,
                local_steps=_total_steps(sent) if by_messages else sum(one.steps for one in answer.trained),
            )
        )
        return answer


def _total_steps(contents: Iterable[RecordDict]) -> int | None:
    told = [[record.get(STEPS_KEY) for record in content.metric_records.values()] for content in contents]
    counts = [next((n for n in found if isinstance(n, int | float)), None) for found in told]
    # What a client tells may be no number of steps.
    usable = [n for n in counts if n is not None and 0 <= n <= _MOST_STEPS]
    return sum(map(int, usable)) if len(usable) == len(counts) else None


def _total_bytes(contents: Iterable[RecordDict]) -> int:
    """Bytes of all contents; one that many messages share is counted for each, but measured once."""
    known: dict[int, int] = {}
    total = 0
    for content in contents:
        if id(content) not in known:
            known[id(content)] = content_bytes(content)
        total += known[id(content)]
    return total
