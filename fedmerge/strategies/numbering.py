"""Flower's strategies count rounds from one: here they go on counting where a run was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result, Strategy

__all__ = ["start_after"]

_NUMBERED = ("order_train", "configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")


def start_after(
    done: int,
    strategy: Strategy,
    start: Callable[..., Result],
    *,
    initial_arrays: ArrayRecord,
    num_rounds: int,
    evaluate_fn: Callable[[int, ArrayRecord], Any] | None = None,
    evaluate_again: bool = False,
    **keywords: Any,
) -> Result:
    """Run the rounds after round `done`: everything that depends on a round's number is as if none was interrupted.

    Parameters
    ----------
    done
        Rounds that were run before.
    strategy
        Any Flower strategy.
    start
        Its way to start, such as ``strategy.start``.
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

    left = num_rounds - done
    if left < 1:  # nothing to start
        result, found = Result(), evaluate(0, initial_arrays)
        if found is not None:
            result.evaluate_metrics_serverapp[0] = found
    else:
        with _shifted(strategy, done):
            result = start(
                initial_arrays=initial_arrays,
                num_rounds=left,
                evaluate_fn=None if evaluate_fn is None else evaluate,
                **keywords,
            )
    if not result.arrays:  # no round was left, or none gave a model
        result.arrays = initial_arrays
    for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        setattr(result, name, {number + done: metrics for number, metrics in getattr(result, name).items()})
    return result


@contextmanager
def _shifted(strategy: Strategy, by: int) -> Iterator[None]:
    """Let the strategy see rounds `by` later than it is told."""
    own = {name: vars(strategy)[name] for name in _NUMBERED if name in vars(strategy)}
    numbered = [name for name in _NUMBERED if hasattr(strategy, name)]
    for name in numbered:
        setattr(strategy, name, _later(getattr(strategy, name), by))
    try:
        yield
    finally:
        for name in numbered:
            delattr(strategy, name)
        for name, method in own.items():
            setattr(strategy, name, method)


def _later(method: Callable[..., Any], by: int) -> Callable[..., Any]:
    def shifted(server_round: int, *arguments: Any, **keywords: Any) -> Any:
        return method(server_round + by, *arguments, **keywords)

    return shifted
