"""One training exchange: the order that goes to the clients of a round, and the answer that comes back."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmerge.errors import BadUpdate
from fedmerge.merging import MergeResult, Pipeline
from fedmerge.merging.result import Partial
from fedmerge.state import State
from fedmerge.strategies.identity import Identities
from fedmerge.training import EngineChoice
from fedmerge.update import ClientUpdate, MergeContext
from fedmerge.wire.flower_records import STEPS_KEY
from fedmerge.wire.keys import ERROR_KEY, KEEP_KEY, PERSONAL_KEY

__all__ = ["Answer", "Order", "Trained", "TrainingGrid"]


@dataclass(frozen=True, eq=False)
class Order:
    """What all clients of a round are told.

    Grids of ours take it as it is, see :class:`TrainingGrid`; others are given :meth:`messages`.

    Parameters
    ----------
    content
        What each message brings: the model, the configuration, and whatever else clients need.
    nodes
        Whom it is for.
    pipeline
        What will merge them: sums over clients may be taken where the clients run.
    context
        Base, round and seed of the merge.
    buffers
        Names of the model's buffers, where they are known.
    arrays_key, weight_key
        Names of the model's record, and of the number of examples among metrics.
    by_message
        Whether somebody wants to see a message and a reply for each client.
    before
        Numbers of the messages of the exchange before: replies to those do not count.
    identities
        What the server knows of clients and their nodes.
    whole, wanting
        What the messages to these nodes bring instead, which may be unable to make the tensors that do not travel.
    """

    content: RecordDict
    nodes: Sequence[int]
    pipeline: Pipeline
    context: MergeContext
    buffers: frozenset[str] | None
    arrays_key: str = "arrays"
    weight_key: str = "num-examples"
    by_message: bool = False
    before: Collection[str] = ()
    identities: Identities = field(default_factory=Identities)
    whole: RecordDict | None = None
    wanting: frozenset[int] = frozenset()
    _made: list[Message] = field(default_factory=list, init=False, repr=False)

    def messages(self) -> list[Message]:
        """A message for each node; always the same ones, for a grid numbers them while it sends them."""
        if not self._made:
            for node in self.nodes:
                content = self.whole if self.whole is not None and node in self.wanting else self.content
                self._made.append(Message(content=content, message_type="train", dst_node_id=node))
        return self._made

    @property
    def numbers(self) -> tuple[str, ...]:
        """Numbers of the messages, as far as there were any and a grid has numbered them."""
        return tuple(number for message in self._made if (number := message.metadata.message_id))

    @property
    def config(self) -> ConfigRecord:
        """The configuration in ``content``."""
        return next(iter(self.content.config_records.values()), ConfigRecord())

    def without_model(self) -> Order:
        """The same order for workers, who find the model in its context."""
        content = RecordDict({key: record for key, record in self.content.items() if key != self.arrays_key})
        return replace(self, content=content, nodes=(), identities=Identities(), whole=None)

    @property
    def keeps(self) -> bool:
        """Whether clients keep something until the next order."""
        rule = self.pipeline.local_rule
        keeping = rule is not None and rule.keeps
        told = any(self.config.get(key) for key in (KEEP_KEY, PERSONAL_KEY))
        return keeping or told or self.config.get("batch-norm") == "local"

    @property
    def folds(self) -> bool:
        """Whether sums may travel instead of models."""
        return self.pipeline.folds


@dataclass(frozen=True)
class Trained:
    """Facts about one client that answered; what is not known is None."""

    client: int
    node: int | None
    examples: float | None = None
    train_loss: float | None = None
    steps: int = 0
    error: float | None = None


@dataclass
class Answer:
    """What clients made of an :class:`Order`.

    Parameters
    ----------
    trained
        Facts about the clients that answered, in order of clients.
    partial
        The sum over clients, where the method is one and it was taken where they ran.
    updates
        Otherwise what each of them sent, or why it cannot be used.
    failures
        Nodes that did not answer, and why; None for errors that name no node.
    bytes_up
        Of all answers.
    together
        How many clients trained with others in one call.
    engine
        How clients trained; None where each was sent a message.
    kept
        By node, what clients keep until the next order.
    replies, heard, contents, refused
        Where there were messages: all replies as they came, those that count or tell of an error, what clients sent by
        client, and replies of which nobody knows whose they are.
    """

    trained: list[Trained] = field(default_factory=list)
    partial: Partial | None = None
    updates: Iterable[ClientUpdate | BadUpdate] = field(default_factory=list)
    failures: list[tuple[int | None, str]] = field(default_factory=list)
    bytes_up: int = 0
    together: int = 0
    engine: EngineChoice | None = None
    kept: dict[int, RecordDict] = field(default_factory=dict)
    replies: list[Message] = field(default_factory=list)
    heard: list[Message] = field(default_factory=list)
    contents: dict[int, RecordDict] = field(default_factory=dict)
    refused: Sequence[BadUpdate] = ()

    @property
    def nodes(self) -> dict[int, int]:
        """The node of each client that answered, as far as it is known."""
        return {one.client: one.node for one in self.trained if one.node is not None}

    @property
    def empty(self) -> bool:
        """Whether nobody answered with anything but errors."""
        return not self.trained and not self.refused

    @property
    def failed(self) -> list[tuple[int | None, str]]:
        """``failures`` in order of nodes, those that name none first."""
        return sorted(self.failures, key=lambda failure: -1 if failure[0] is None else failure[0])

    def extend(self, other: Answer, pipeline: Pipeline) -> None:
        """Add the answer of further clients, whose memory it may reuse."""
        self.trained += other.trained
        if self.partial is None:
            self.partial = other.partial
        elif other.partial is not None:
            self.partial = pipeline.join(self.partial, other.partial)
        self.updates = [*self.updates, *other.updates]
        self.failures += other.failures
        self.bytes_up += other.bytes_up
        self.together += other.together
        self.kept |= other.kept

    def merge(
        self, pipeline: Pipeline, context: MergeContext, memory: State, buffers: Collection[str] | None
    ) -> MergeResult:
        """Finish the sum, or merge what clients sent."""
        if not self.contents:  # who sent messages has told its examples there
            told = {one.client: one.examples for one in self.trained if one.examples is not None}
            context = replace(context, told=told)
        if self.partial is not None:
            return pipeline.finish(self.partial, context, memory, buffers)
        return pipeline.merge(self.updates, context, memory, buffers=buffers)

    def metrics(self, accepted: set[int]) -> MetricRecord:
        """What Flower's weighted mean gives over the accepted clients' metrics, those with NaN left out."""
        taken = [one for one in self.trained if one.client in accepted]
        counted = [one for one in taken if all(math.isfinite(x or 0.0) for x in (one.train_loss, one.error))] or taken
        weights = [one.examples or 0 for one in counted]
        total = sum(weights)
        means: dict[str, int | float | list[int] | list[float]] = {
            STEPS_KEY: sum(one.steps * (n / total) for one, n in zip(counted, weights, strict=True)),
        }
        for key, values in (
            ("train_loss", [one.train_loss for one in counted]),
            (ERROR_KEY, [one.error for one in counted]),
        ):
            known = [(value, n) for value, n in zip(values, weights, strict=True) if value is not None]
            if len(known) == len(counted):  # unless clients keep them to themselves
                means[key] = sum(value * (n / total) for value, n in known)
        return MetricRecord(means)


class TrainingGrid(Grid):
    """A Flower grid that also takes an :class:`Order` as it is."""

    @abstractmethod
    def train(self, order: Order, *, timeout: float | None = None) -> Answer:
        """Have the clients of an order train, and bring back what they made of it.

        Parameters
        ----------
        order
            What to do, and who.
        timeout
            Seconds to wait for replies, where there are messages.
        """
