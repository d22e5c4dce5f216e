"""Who runs the clients: this process, or Ray actors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from flwr.app import Array, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedmerge.clients.app import FedmergeClientApp
from fedmerge.clients.client import Client
from fedmerge.simulation.workers.cohort_work import Engine, answer, choose
from fedmerge.simulation.workers.flower_task import FAILURES, error_reply, in_reply_to
from fedmerge.strategies.order import Answer, Order
from fedmerge.training import EngineChoice
from fedmerge.training.local import LocalTraining, train

__all__ = [
    "InProcess",
    "Job",
    "Outcome",
    "Workers",
    "content_bytes",
    "divided",
    "handle",
    "serial_pieces",
    "warm_up",
]

_PIECES = 64
"""Pieces of a round whose clients train one by one: whoever works at them, their sums are added in the same order."""


class Job(NamedTuple):
    """One message for one client, with what that client remembers."""

    message: Message
    context: Context


class Outcome(NamedTuple):
    """A client's reply, and what it remembers from now on."""

    reply: Message
    context: Context


class Workers(ABC):
    """Runs jobs; a client that fails gives an error reply and never stops the others.

    Parameters
    ----------
    engine
        How cohorts train: ``"serial"``, one client after the other, ``"stacked"``, many in one call, or ``"auto"``,
        whichever is faster on the first clients.
    """

    def __init__(self, engine: Engine = "auto") -> None:
        self._engine = engine
        self._choice: EngineChoice | None = None

    def use(self, app: ClientApp) -> None:
        """Answer messages with `app` from now on."""
        self._choice = None

    @property
    def chosen(self) -> Literal["serial", "stacked"] | None:
        """The engine that was measured to be faster, once it was; set it to go on with that of an earlier process."""
        return None if self._choice is None else self._choice.name

    @chosen.setter
    def chosen(self, name: Literal["serial", "stacked"] | None) -> None:
        self._choice = None if name is None else EngineChoice(name, "as before the interruption")

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Outcomes in the order of `jobs`."""

    def train(self, order: Order, total: int, kept: Mapping[int, RecordDict]) -> Answer:
        """Train a cohort of the `total` known clients, without messages; the app must be one of ours.

        `kept` is what the clients remember, by node, where the order has them keep anything.
        """
        if self._engine != "auto":
            choice = EngineChoice(self._engine, "as asked for")
        else:
            # Once for a whole run and for all workers, so that what comes out does not depend on who was how busy.
            choice = self._choice = self._choice or self.choose(order, total)
        answer = self.train_by(order, total, choice.name, kept)
        answer.engine = choice
        if choice.name == "stacked" and len(answer.trained) > 1 and not answer.together:
            answer.engine = EngineChoice("serial", "no clients could train in one call")
        return answer

    @abstractmethod
    def choose(self, order: Order, total: int) -> EngineChoice:
        """Measure which engine is faster."""

    @abstractmethod
    def train_by(
        self, order: Order, total: int, engine: Literal["serial", "stacked"], kept: Mapping[int, RecordDict]
    ) -> Answer:
        """Train a cohort with one engine."""

    def close(self) -> None:  # noqa: B027 - most have nothing to free
        """Free what the workers hold."""


class InProcess(Workers):
    """Runs clients one after the other in this process."""

    def __init__(self, engine: Engine = "auto") -> None:
        super().__init__(engine)
        warm_up()

    def use(self, app: ClientApp) -> None:
        """Answer messages with `app` from now on."""
        super().use(app)
        self._app = app

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Run each job when its outcome is asked for."""
        for job in jobs:
            yield handle(self._app, job)

    def choose(self, order: Order, total: int) -> EngineChoice:
        """Measure here."""
        return choose(self._client, order, order.nodes, total)

    def train_by(
        self, order: Order, total: int, engine: Literal["serial", "stacked"], kept: Mapping[int, RecordDict]
    ) -> Answer:
        """Train and fold here."""
        pieces = serial_pieces(order.nodes) if engine == "serial" and order.folds else [order.nodes]
        result = Answer()
        for piece in pieces:
            result.extend(answer(self._client, order, piece, total, engine, kept), order.pipeline)
        return result

    @property
    def _client(self) -> Client:
        assert isinstance(self._app, FedmergeClientApp)
        return self._app.client


def warm_up() -> None:
    """Take one training step, so that what torch imports at the first one is not counted as a client's time."""
    # Made without numbers, for the global generator is shared by threads.
    layer = nn.Linear(1, 2, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    train(layer, torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), LocalTraining(), seed=0, client=0, round=0)


def handle(app: ClientApp, job: Job) -> Outcome:
    """Answer one message; the sender's records stay as they are whatever the client does to its own."""
    message, context = job
    original, kind = message.content, message.metadata.message_type
    message.content = _copied(original)
    try:
        reply = app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp must return a Message to a {kind} message, got a {type(reply).__name__}")
        if reply.has_error():  # Flower's mods make them as replies to replies
            return Outcome(in_reply_to(message, reply), context)
        if not _answers(reply, message):
            raise ValueError("its reply names another node, or another message, than its own: Message(..., reply_to=)")
        return Outcome(reply, context)
    except FAILURES as error:
        return Outcome(error_reply(message, context, error), context)
    finally:
        message.content = original


def _answers(reply: Message, message: Message) -> bool:
    """Whether a reply is to this message and of the node that it was for, as Flower's SuperLink checks it."""
    told, wanted = reply.metadata, message.metadata
    return (told.src_node_id, told.reply_to_message_id) == (wanted.dst_node_id, wanted.message_id)


def _copied(content: RecordDict) -> RecordDict:
    """A copy that shares the tensors' bytes, which nobody changes in place."""
    copy = RecordDict()
    for key, record in content.items():
        copy[key] = record.copy()
    return copy


def content_bytes(content: RecordDict) -> int:
    """Bytes of tensors and numbers in a message, without Flower's own framing."""
    return sum(_value_bytes(value) for record in content.values() for value in record.values())


def _value_bytes(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, str | bytes):
        return len(value)
    return sum(map(_value_bytes, value)) if isinstance(value, list) else 8


def serial_pieces(nodes: Sequence[int]) -> list[Sequence[int]]:
    """What is folded apart where clients train one by one.

    The pieces depend on the clients alone, so that any number of workers gives the same bits. Pieces of a single client
    add up as the stream of a server's messages does.
    """
    return divided(nodes, _PIECES)


def divided(nodes: Sequence[int], number: int) -> list[Sequence[int]]:
    """`nodes` in `number` runs of about equal length, none empty.

    Examples
    --------
    >>> divided([2, 3, 4], 2)
    [[2], [3, 4]]
    """
    number = min(number, len(nodes))
    ends = [len(nodes) * (i + 1) // number for i in range(number)]
    return [nodes[start:end] for start, end in zip([0, *ends], ends, strict=False)]
