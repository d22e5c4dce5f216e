"""Observers of any Flower strategy, wherever its rounds run: in a simulation, or in a deployment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from fedmerge.observers import ObserverLike, Run, RunStopped, Watch, make_observers
from fedmerge.strategies.merge_report import MergeReport
from fedmerge.wire.record_values import view_arrays

__all__ = ["UNWATCHED", "Watched", "start_watched"]

log = logging.getLogger("fedmerge")

UNWATCHED = (
    "observers are told by this strategy's own start, which was not called: where another one is wrapped around it, "
    "leave them out here, and call fedmerge.strategies.start_watched(the other one, observers, grid=..., ...)"
)
"""Why a strategy with observers does not train when somebody else runs its rounds."""

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


def start_watched(strategy: Strategy, observers: Iterable[ObserverLike], **keywords: Any) -> Result:
    """Start any Flower strategy, and tell observers of every round.

    Of a strategy that is not ours nobody but its ``evaluate_fn`` tells anything; rows hold what that returns.

    Parameters
    ----------
    strategy
        Whose rounds they are. One of ours takes its observers itself, as ``MergeStrategy(observers=[...])``.
    observers
        Who is told, and may end the run: it then returns what there is.
    keywords
        As for ``Strategy.start``: ``grid``, ``initial_arrays``, ``num_rounds`` ...

    Returns
    -------
    Result
        Of the rounds that were run.

    Raises
    ------
    ObserverFailed
        An observer has raised.
    """
    watched = Watched(observers, type(strategy).__name__, lambda: (None, None))
    return watched.start(strategy.start, keywords)


class Watched:
    """The rounds of one strategy, watched through its ``evaluate_fn`` and what it tells of itself.

    Parameters
    ----------
    observers
        Who is told, and may end the run.
    name, seed, folder
        What runs, for whoever writes it down, and where it leaves its checkpoints, if it does.
    told
        Gives the report of the last merge, and what clients found in the last evaluation.
    """

    def __init__(
        self,
        observers: Iterable[ObserverLike],
        name: str,
        told: Callable[[], tuple[MergeReport | None, MetricRecord | None]],
        *,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        self._watch = Watch(make_observers(observers))
        self._name, self._told, self._seed, self._folder = name, told, seed, folder
        self._result, self._since = Result(), 0.0
        self._initial: ArrayRecord | None = None

    @property
    def stopped(self) -> str | None:
        """Why an observer has ended the run, if one has."""
        return self._watch.stopped

    def start(self, start: Callable[..., Result], keywords: Mapping[str, Any]) -> Result:
        """Call `start`, a strategy's, until it is through or an observer ends it."""
        evaluate: Evaluate | None = keywords.get("evaluate_fn")
        finished, self._initial, self._since = None, keywords.get("initial_arrays"), time.perf_counter()
        run = Run(self._name, self._seed, keywords.get("num_rounds", 3), folder=self._folder)
        with self._watch.over(run), suppress(RunStopped):
            self._watch.check()
            finished = start(**{**keywords, "evaluate_fn": partial(self._over, evaluate)})
        if finished is not None:
            return finished
        log.info("ended early: %s", self._watch.stopped)
        return self._result

    def _over(self, evaluate: Evaluate | None, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """A round is over: test its model as the user wants it, and tell everybody."""
        tested = None if evaluate is None else evaluate(number, arrays)
        report, judged = self._told() if number else (None, None)
        report = report if report is not None and report.round == number else None
        now = time.perf_counter()
        row: dict[str, Any] = {"method": self._name, "seed": self._seed, "round": number, "seconds": now - self._since}
        row |= {} if report is None else _facts(report)
        row |= {**(judged or {}), **(tested or {})}
        self._since = now
        # What a run that is ended now returns.
        if arrays is not self._initial:
            self._result.arrays = arrays
        if report is not None and report.metrics:
            self._result.train_metrics_clientapp[number] = MetricRecord(dict(report.metrics))
        if judged is not None:
            self._result.evaluate_metrics_clientapp[number] = judged
        if tested is not None:
            self._result.evaluate_metrics_serverapp[number] = tested
        self._watch.round_done(row, view_arrays(arrays))
        return tested


def _facts(report: MergeReport) -> dict[str, Any]:
    """A merge in a row, under the names that a comparison's rows have."""
    return {
        "clients_ok": len(report.accepted),
        "clients_failed": len(report.failed) + len(report.dropped),
        "failures": [{"client": one.client, "reason": one.reason} for one in report.failed],
        "dropped": [{"client": one.client, "reason": one.reason} for one in report.dropped],
        "skipped": report.skipped,
        "steps_skipped": [{"step": step, "reason": why} for step, why in report.steps_skipped],
        **report.metrics,
    }
