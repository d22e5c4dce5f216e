"""What clients sent back in one exchange, be it messages or the answer to a cohort's order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import replace

from flwr.app import Message, MetricRecord, RecordDict

from fedmerge.errors import BadUpdate, ClientFailed
from fedmerge.pipeline import MergeResult, Pipeline
from fedmerge.state import State
from fedmerge.strategies.cohort_order import CohortAnswer
from fedmerge.strategies.failures import check_mods, failed_client, failures_in
from fedmerge.strategies.heard import Sent, heard
from fedmerge.strategies.identity import Identities
from fedmerge.strategies.wire import Decoded
from fedmerge.update import MergeContext

__all__ = ["Received", "ReceivedCohort", "ReceivedMessages"]

_REMEDY = "Each node that is asked replies once, as the partition that its --node-config gives to no other."


class Received(ABC):
    """Replies, ready to be merged."""

    nodes: dict[int, int]
    """The node of each client that replied with something and named it."""
    failures: list[ClientFailed]
    """Clients that did not, and why."""

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Whether nobody replied with anything but errors."""

    @abstractmethod
    def merge(
        self, pipeline: Pipeline, context: MergeContext, memory: State, buffers: Collection[str] | None
    ) -> MergeResult:
        """The next global model."""

    @abstractmethod
    def contents(self, clients: Collection[int]) -> list[RecordDict]:
        """What these clients sent; nothing where there are no messages."""

    def metrics(self, clients: set[int]) -> MetricRecord | None:
        """Their mean metrics, where they are known already."""
        return None

    def check(self) -> None:  # noqa: B027 - what has no messages has no mods
        """Make sure that no round would go as this one did.

        Raises
        ------
        NoUsableUpdates
            A mod of the clients refuses what the method exchanges.
        """


class ReceivedCohort(Received):
    """The answer to a cohort's order."""

    def __init__(self, answer: CohortAnswer, round: int, identities: Identities) -> None:
        self._answer = answer
        self.nodes = {one.client: one.node for one in answer.trained}
        name = identities.naming(round)
        self.failures = [failed_client(node, reason, round, name) for node, reason in sorted(answer.failures)]

    @property
    def empty(self) -> bool:
        """Nobody has trained."""
        return not self.nodes

    def merge(
        self, pipeline: Pipeline, context: MergeContext, memory: State, buffers: Collection[str] | None
    ) -> MergeResult:
        """Finish the sum, or merge the models."""
        context = replace(context, told={one.client: one.examples for one in self._answer.trained})
        if self._answer.partial is not None:
            return pipeline.finish(self._answer.partial, context, memory, buffers)
        return pipeline.merge(self._answer.updates, context, memory, buffers=buffers)

    def contents(self, clients: Collection[int]) -> list[RecordDict]:
        """None: there were no messages."""
        return []

    def metrics(self, clients: set[int]) -> MetricRecord | None:
        """Summed up where the clients ran."""
        return self._answer.metrics(clients)


class ReceivedMessages(Received):
    """Messages of Flower's; those of which nobody knows whose they are count as bad updates."""

    def __init__(
        self,
        replies: Iterable[Message],
        sent: Sent | None,
        arrays_key: str,
        weight_key: str,
        round: int,
        identities: Identities,
    ) -> None:
        found = heard(replies, sent)
        self._heard = [message for _, message in (*found.errors, *found.replies)]
        told = identities.identify(found, round)
        self._valid = [(client, message) for client, _, message in told.replies]
        self._keys = arrays_key, weight_key
        self._refused = [
            BadUpdate(identities.holder(stray.node, round), stray.reason, _REMEDY)
            for stray in (*found.strays, *told.strays)
        ]
        self.nodes = {client: node for client, node, _ in told.replies if node is not None}
        self.failures = failures_in(found, round, identities.naming(round))

    @property
    def empty(self) -> bool:
        """There is no message but errors."""
        return not self._valid and not self._refused

    def merge(
        self, pipeline: Pipeline, context: MergeContext, memory: State, buffers: Collection[str] | None
    ) -> MergeResult:
        """Decode them one at a time."""
        updates = Decoded(self._valid, *self._keys, self._refused)
        return pipeline.merge(updates, context, memory, buffers=buffers)

    def check(self) -> None:
        """Look at errors of mods."""
        check_mods(self._heard)

    def contents(self, clients: Collection[int]) -> list[RecordDict]:
        """Their records."""
        return [message.content for client, message in self._valid if client in clients]
