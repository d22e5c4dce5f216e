"""Flower's strategies count rounds from one: here they go on counting where a run was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

__all__ = ["counts_itself", "start_after"]


class Later(Strategy):
    """A strategy that is told of rounds by numbers that are `done` higher than those that Flower's loop counts."""

    def __init__(self, strategy: Strategy, done: int) -> None:
        self._strategy, self._done = strategy, done

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Of the later round."""
        return self._strategy.configure_train(server_round + self._done, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Of the later round."""
        return self._strategy.aggregate_train(server_round + self._done, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Of the later round."""
        return self._strategy.configure_evaluate(server_round + self._done, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Of the later round."""
        return self._strategy.aggregate_evaluate(server_round + self._done, replies)

    def summary(self) -> None:
        """Pass on."""
        self._strategy.summary()


def counts_itself(strategy: Strategy) -> bool:
    """Whether a strategy runs its rounds by a ``start`` of its own, which nobody can tell where to begin."""
    return type(strategy).start is not Strategy.start


def start_after(
    done: int,
    strategy: Strategy,
    *,
    initial_arrays: ArrayRecord,
    num_rounds: int,
    evaluate_fn: Callable[[int, ArrayRecord], Any] | None = None,
    evaluate_again: bool = False,
    **keywords: Any,
) -> Result:
    """Run the rounds after round `done` in Flower's loop, as if no round before had been interrupted.

    Parameters
    ----------
    done
        Rounds that were run before.
    strategy
        Any Flower strategy; a ``start`` of its own is not called, see :func:`counts_itself`.
    initial_arrays
        The global model after round `done`.
    num_rounds
        Number of the last round.
    evaluate_fn, keywords
        As for ``Strategy.start``.
    evaluate_again
        Whether the model after round `done` is evaluated once more, which it was then if nothing came in between.

    Returns
    -------
    Result
        Of the rounds that were run now, under their own numbers.
    """

    def evaluate(server_round: int, arrays: ArrayRecord) -> Any:
        if evaluate_fn is None or (server_round == 0 and not evaluate_again):
            return None
        return evaluate_fn(server_round + done, arrays)

    left, own = num_rounds - done, Result()
    if left < 1:  # nothing to start
        metrics, counted = evaluate(0, initial_arrays), Result()
        if metrics is not None:
            counted.evaluate_metrics_serverapp[0] = metrics
    else:
        tested = None if evaluate_fn is None else evaluate
        later = Later(strategy, done)
        counted = later.start(initial_arrays=initial_arrays, num_rounds=left, evaluate_fn=tested, **keywords)
    own.arrays = counted.arrays or initial_arrays  # no round was left, or none gave a model
    own.train_metrics_clientapp = {n + done: one for n, one in counted.train_metrics_clientapp.items()}
    own.evaluate_metrics_clientapp = {n + done: one for n, one in counted.evaluate_metrics_clientapp.items()}
    own.evaluate_metrics_serverapp = {n + done: one for n, one in counted.evaluate_metrics_serverapp.items()}
    return own
