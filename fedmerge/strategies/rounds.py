"""The rounds of a strategy of ours, and the two roads of an order: as it is to grids of ours, elsewhere as messages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedmerge.errors import BadUpdate
from fedmerge.strategies.failures import failed_nodes
from fedmerge.strategies.heard import Sent, heard
from fedmerge.strategies.identity import Identities
from fedmerge.strategies.order import Answer, Order, Trained, TrainingGrid
from fedmerge.wire.flower_records import Decoded, weight_of

__all__ = ["by_message", "exchanged", "read_replies", "run_rounds"]

log = logging.getLogger("fedmerge")

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
_REMEDY = "Each node that is asked replies once, as the partition that its --node-config gives to no other."


class RunsRounds(Protocol):
    """A strategy that trains by orders: the methods of a :class:`~fedmerge.strategies.MergeStrategy`."""

    def summary(self) -> None: ...

    def order_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Order: ...

    def aggregate_train(self, server_round: int, replies: Answer) -> tuple[ArrayRecord | None, MetricRecord | None]: ...

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]: ...

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None: ...


def run_rounds(
    strategy: RunsRounds,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int,
    timeout: float,
    train_config: ConfigRecord | None,
    evaluate_config: ConfigRecord | None,
    evaluate_fn: Evaluate | None,
    *,
    done: int | None = None,
    evaluate_again: bool = False,
) -> Result:
    """Train, merge and evaluate, round by round.

    Parameters
    ----------
    strategy
        Whose rounds they are.
    grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
        As for ``flwr.serverapp.strategy.Strategy.start``.
    done
        The last round that is over, where a run goes on after it: 0 where the model has been evaluated and no more.
    evaluate_again
        Whether the model after round `done` is evaluated once more, which it was then if nothing came in between.
    """
    strategy.summary()
    result, arrays = Result(), initial_arrays
    if done:
        result.arrays = arrays
    train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()

    def evaluate(number: int) -> None:
        metrics = None if evaluate_fn is None else evaluate_fn(number, arrays)
        if metrics is not None:
            result.evaluate_metrics_serverapp[number] = metrics

    if done is None or evaluate_again:
        evaluate(done or 0)
    for number in range((done or 0) + 1, num_rounds + 1):
        log.info("round %d of %d", number, num_rounds)
        answer = exchanged(grid, strategy.order_train(number, arrays, train_config, grid), timeout)
        merged, metrics = strategy.aggregate_train(number, answer)
        if merged is not None:
            result.arrays = arrays = merged
        if metrics is not None:
            result.train_metrics_clientapp[number] = metrics
        asked = list(strategy.configure_evaluate(number, arrays, evaluate_config, grid))
        if asked:
            judged = strategy.aggregate_evaluate(number, grid.send_and_receive(asked, timeout=timeout))
            if judged is not None:
                result.evaluate_metrics_clientapp[number] = judged
        evaluate(number)
    return result


def exchanged(grid: Grid, order: Order, timeout: float | None = None) -> Answer:
    """The clients' answer to an order: a grid of ours takes it as it is, Flower's are given messages."""
    if isinstance(grid, TrainingGrid):
        return grid.train(order, timeout=timeout)
    return by_message(grid, order, timeout)


def by_message(grid: Grid, order: Order, timeout: float | None = None) -> Answer:
    """The clients' answer to an order, each of them reached by a message of its own."""
    replies = list(grid.send_and_receive(order.messages(), timeout=timeout)) if order.nodes else []
    keys, round = (order.arrays_key, order.weight_key), order.context.round
    return read_replies(replies, Sent(order.nodes, order.messages(), order.before), keys, round, order.identities)


def read_replies(
    replies: Iterable[Message], sent: Sent | None, keys: tuple[str, str], round: int, identities: Identities
) -> Answer:
    """Sort replies by client; they are decoded one at a time when they are merged.

    Parameters
    ----------
    replies
        Whatever came.
    sent
        What was sent to whom; None where nobody knows.
    keys
        Names of the model's record, and of the number of examples among metrics.
    round
        Of the merge.
    identities
        Who is who; learns of new nodes. Replies of which nobody knows whose they are count as bad updates.
    """
    replies = list(replies)
    found = heard(replies, sent)
    told = identities.identify(found, round)
    valid = [(client, message) for client, _, message in told.replies]
    refused = [
        BadUpdate(identities.holder(stray.node, round), stray.reason, _REMEDY)
        for stray in (*found.strays, *told.strays)
    ]
    return Answer(
        trained=[Trained(client, node, weight_of(m.content, keys[1])) for client, node, m in told.replies],
        updates=Decoded(valid, *keys, refused),
        failures=failed_nodes(found),
        replies=replies,
        heard=[message for _, message in (*found.errors, *found.replies)],
        contents={client: message.content for client, message in valid},
        refused=refused,
    )
