"""One training exchange for many clients, without a message for each where client and server share a process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedmerge.aggregators.base import Fold
from fedmerge.intake import Partial
from fedmerge.pipeline import Pipeline
from fedmerge.strategies.measure import ERROR_KEY
from fedmerge.strategies.stages import KEEP_KEY
from fedmerge.strategies.wire import STEPS_KEY
from fedmerge.training import EngineChoice
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["CohortAnswer", "CohortOrder", "Trained"]


@dataclass(frozen=True, eq=False)
class CohortOrder:
    """What all clients of a round are told; to a grid that knows nothing of it, the messages that say so.

    Parameters
    ----------
    content
        What each message brings.
    nodes
        Whom it is for.
    pipeline
        What will merge them: sums over clients may be taken where the clients run.
    context
        Base, round and seed of the merge.
    buffers
        Names of the model's buffers, where they are known.
    """

    content: RecordDict
    nodes: Sequence[int]
    pipeline: Pipeline
    context: MergeContext
    buffers: frozenset[str] | None

    def __iter__(self) -> Iterator[Message]:
        """The messages; the same ones again, for Flower's grids number them in one pass and send them in the next."""
        return iter(self._messages)

    @cached_property
    def _messages(self) -> list[Message]:
        return [Message(content=self.content, message_type="train", dst_node_id=node) for node in self.nodes]

    @property
    def config(self) -> ConfigRecord:
        """The configuration in ``content``."""
        return next(iter(self.content.config_records.values()), ConfigRecord())

    def without_model(self) -> CohortOrder:
        """The same order for workers, who find the model in its context."""
        return replace(self, content=RecordDict({"config": self.config}), nodes=())

    @property
    def keeps(self) -> bool:
        """Whether clients are to keep something until the next message, which takes a Context each."""
        return self.config.get("batch-norm") == "local" or bool(self.config.get(KEEP_KEY))

    @property
    def folds(self) -> bool:
        """Whether sums may travel instead of models."""
        return isinstance(self.pipeline.aggregator, Fold)


@dataclass(frozen=True)
class Trained:
    """Facts about one client that answered."""

    client: int
    node: int
    examples: int
    train_loss: float | None
    steps: int
    error: float | None = None


@dataclass
class CohortAnswer:
    """What clients made of a :class:`CohortOrder`: sums or models, facts, and who failed with which reason."""

    trained: list[Trained] = field(default_factory=list)
    partial: Partial | None = None
    updates: list[ClientUpdate] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    bytes_up: int = 0
    engine: EngineChoice | None = None

    def __iter__(self) -> Iterator[Message]:
        """No messages: only a strategy of ours asks for such an answer, and it reads the fields."""
        raise TypeError("a CohortAnswer holds sums and models, not messages")

    def extend(self, other: CohortAnswer, pipeline: Pipeline) -> None:
        """Add the answer of further clients, whose memory it may reuse."""
        self.trained += other.trained
        if self.partial is None:
            self.partial = other.partial
        elif other.partial is not None:
            self.partial = pipeline.join(self.partial, other.partial)
        self.updates += other.updates
        self.failures += other.failures
        self.bytes_up += other.bytes_up

    def metrics(self, accepted: set[int]) -> MetricRecord:
        """What Flower's weighted mean gives over the accepted clients' metrics, those with NaN left out."""
        taken = [one for one in self.trained if one.client in accepted]
        counted = [one for one in taken if all(math.isfinite(x or 0.0) for x in (one.train_loss, one.error))] or taken
        total = sum(one.examples for one in counted)
        means: dict[str, int | float | list[int] | list[float]] = {
            STEPS_KEY: sum(one.steps * (one.examples / total) for one in counted),
        }
        losses = [(one.train_loss, one.examples) for one in counted if one.train_loss is not None]
        if len(losses) == len(counted):  # unless clients keep them to themselves
            means["train_loss"] = sum(loss * (examples / total) for loss, examples in losses)
        errors = [(one.error, one.examples) for one in counted if one.error is not None]
        if len(errors) == len(counted):
            means[ERROR_KEY] = sum(error * (examples / total) for error, examples in errors)
        return MetricRecord(means)
