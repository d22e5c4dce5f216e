"""Turns each round of any Flower strategy into one row of the run record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedmerge.errors import ClientFailed, NothingMerged, NoUsableUpdates
from fedmerge.plain_text import cut_within
from fedmerge.records import RunRecord
from fedmerge.simulation.exchanges import Exchange, Failure, MeasuredGrid
from fedmerge.simulation.experiment import Experiment
from fedmerge.simulation.faulty_grid import FaultyGrid
from fedmerge.simulation.references import reference_accuracies
from fedmerge.simulation.snapshot import snapshot
from fedmerge.strategies import MergeStrategy
from fedmerge.strategies.failures import failed_client, quoted, tell
from fedmerge.strategies.measure import ERROR_KEY
from fedmerge.strategies.policies import RoundPolicies
from fedmerge.strategies.wire import view_arrays

__all__ = ["Recorder"]

Row = dict[str, Any]


class Recorder:
    """Serves as ``evaluate_fn`` of ``Strategy.start``: tests the model, writes the row, saves a checkpoint.

    Parameters
    ----------
    method, experiment
        What runs.
    strategy
        Any Flower strategy; its aggregation is timed.
    grid
        Keeps account of exchanges.
    record
        Where rows go.
    on_row
        Called with every row, to show progress.
    faulty
        The grid that loses replies, where there is one.
    """

    def __init__(
        self,
        method: str,
        experiment: Experiment,
        *,
        strategy: Strategy,
        grid: MeasuredGrid,
        record: RunRecord,
        on_row: Callable[[Row], None],
        faulty: FaultyGrid | None = None,
    ) -> None:
        self._method, self._experiment, self._strategy = method, experiment, strategy
        self._grid, self._record, self._on_row = grid, record, on_row
        self._faulty, config = faulty, experiment.config
        self._policies = RoundPolicies(config.on_client_error, config.on_too_few)
        self._merge_seconds = 0.0
        self._skipped: str | None = None
        self._merged, self._last_skipped = False, ""
        for row in record.rows():  # what was merged before an interruption counts
            self._count(row)
        self._train_metrics: MetricRecord | None = None
        self._client_metrics: MetricRecord | None = None
        self._ours = isinstance(strategy, MergeStrategy)  # one of ours tells of failures itself, and knows the policies
        setattr(strategy, "aggregate_train", self._timed(strategy.aggregate_train))  # noqa: B010 - a method
        setattr(strategy, "aggregate_evaluate", self._noted(strategy.aggregate_evaluate))  # noqa: B010

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Record round `server_round`, which ended with the global model `arrays`."""
        started = time.perf_counter()
        loss, accuracy = self._experiment.test(arrays)
        success = self._experiment.attack_success(arrays)
        evaluating = time.perf_counter() - started
        row: Row = self._row(server_round, loss, accuracy, evaluating, _count(arrays))
        if self._experiment.hostile is not None:
            row |= {"attackers": sorted(self._experiment.hostile.attackers), "attack_success": success}
        if self._faulty is not None:
            row["waited_for"] = self._faulty.take_waited_for()
        row = cut_within(row)  # reasons are as long as clients want
        self._record.append(row)
        self._count(row)
        memory = self._strategy.memory if isinstance(self._strategy, MergeStrategy) else {}
        taken = snapshot(self._strategy, self._grid.innermost)
        self._record.checkpoint(server_round, view_arrays(arrays), memory, sections=taken.sections, facts=taken.facts)
        self._on_row(row)
        return MetricRecord({"test_loss": loss, "test_accuracy": accuracy})

    def _count(self, row: Mapping[str, Any]) -> None:
        """Note whether a round merged; round 0 is that of the initial model."""
        if row.get("skipped") is not None:
            self._last_skipped = f"round {row['round']}: {row['skipped']}"
        elif row["round"]:
            self._merged = True

    def check_merged(self) -> None:
        """Make sure, when the run is over, that it has merged anything.

        Raises
        ------
        NothingMerged
            Every round was skipped.
        """
        if not self._merged and self._last_skipped:
            raise NothingMerged(
                f"{self._method}: no round merged anything, so there is no trained model; the last one: "
                f"{self._last_skipped}"
            )

    def _row(self, round: int, loss: float, accuracy: float, evaluating: float, parameters: int) -> Row:
        exchanges = self._grid.take()
        training = [e for e in exchanges if e.kind != "evaluate"]
        evaluation = [e for e in exchanges if e.kind == "evaluate"]
        report = self._strategy.last_report if isinstance(self._strategy, MergeStrategy) else None
        report = report if report is not None and report.round == round else None
        dropped = () if report is None else report.dropped
        trained = [e for e in training if e.kind == "train"]
        failures = [failure for e in exchanges for failure in e.failures]
        # Of the first exchange: further stages are of the same clients.
        ok = sum(e.ok for e in trained[:1]) - len(dropped)
        row = {
            "method": self._method,
            "seed": self._experiment.seed,
            "round": round,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "train_loss": _metric(self._train_metrics, "train_loss"),
            "client_accuracy": _metric(self._client_metrics, "eval_acc"),
            "clients_ok": ok,
            "clients_failed": sum(len(e.failures) for e in trained) + len(dropped),
            # Evaluation can be switched off without changing the result, so its traffic stands apart.
            "bytes_down": sum(e.bytes_down for e in training),
            "bytes_up": sum(e.bytes_up for e in training),
            "bytes_evaluate": sum(e.bytes_down + e.bytes_up for e in evaluation),
            "local_steps": _steps(trained),
            "seconds_train": _seconds(training),
            "seconds_merge": self._merge_seconds - _seconds([e for e in training if e.kind == "query"]),
            "seconds_evaluate": evaluating + _seconds(evaluation),
            "parameters": parameters,
            "engine": trained[0].engine if trained else None,
            # In the first round all methods have the same client models.
            "references": self._references() if round == 1 and self._experiment.config.references else {},
            "statistics_error": _metric(self._train_metrics, ERROR_KEY),
            "failures": [{"client": f.client, "node": f.node, "reason": f.reason} for f in failures],
            "dropped": [{"client": bad.client, "reason": bad.reason} for bad in dropped],
            "refused": [] if report is None else [{"client": c, "reason": reason} for c, reason in report.refused],
            "skipped": self._skipped if report is None else report.skipped,
            # What an accountant of noise on them wants to know, for each client.
            "answers": 0 if report is None else report.answers,
        }
        self._merge_seconds, self._train_metrics, self._client_metrics, self._skipped = 0.0, None, None, None
        if trained and ok == 0:
            told = [_failed(f, round) for f in failures]
            reason = f"client {told[0].client}: {told[0].reason}" if told else "none replied"
            if self._policies.on_too_few == "raise":
                raise NoUsableUpdates(
                    f"{self._method}: all clients failed in round {round}; the first: {reason}", failed=told
                )
            row["skipped"] = row["skipped"] or f"all clients failed; the first: {reason}"
        return row

    def _references(self) -> dict[str, float]:
        return reference_accuracies(self._experiment, self._grid.trained)

    def _timed(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_train(server_round: int, replies: Iterable[Message]) -> Any:
            started = time.perf_counter()
            if self._too_few(server_round):
                if isinstance(self._strategy, MergeStrategy):
                    self._strategy.pass_over()
                return None, None
            arrays, self._train_metrics = aggregate(server_round, replies)
            if arrays is None and not self._ours:
                self._skipped = self._skipped or "the strategy made no model of the replies"
            self._merge_seconds = time.perf_counter() - started
            return arrays, self._train_metrics

        return aggregate_train

    def _too_few(self, round: int) -> bool:
        """Whether too few clients replied for somebody else's strategy, which knows nothing of our policies, or none
        for any."""
        trained = [exchange for exchange in self._grid.exchanges if exchange.kind == "train"]
        least, ok = self._experiment.config.min_clients, sum(exchange.ok for exchange in trained)
        ending = bool(trained) and not ok and self._policies.on_too_few == "raise"
        if self._ours and not ending:
            return False
        failed = [_failed(f, round) for exchange in trained for f in exchange.failures]
        tell(failed)  # Flower's log is not shown here
        self._policies.check(((one.client, one.reason) for one in failed), round)
        if not trained or ok >= least:
            return False
        self._skipped = f"{ok} clients replied, at least {least} wanted" + (f" ({quoted(failed)})" if failed else "")
        if self._policies.on_too_few == "raise" and ok:
            raise NoUsableUpdates(f"{self._method}: round {round}: {self._skipped}", failed=failed)
        return True

    def _noted(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_evaluate(server_round: int, replies: Iterable[Message]) -> Any:
            if not self._ours:
                failures = [f for e in self._grid.exchanges if e.kind == "evaluate" for f in e.failures]
                tell((_failed(f, server_round) for f in failures), "evaluation")
            self._client_metrics = aggregate(server_round, replies)
            return self._client_metrics

        return aggregate_evaluate


def _failed(failure: Failure, round: int) -> ClientFailed:
    """Under the client's number, which its node tells here."""
    name = f"on node {failure.node}" if failure.client is None else failure.client
    return failed_client(failure.node, failure.reason, round, lambda node, claimed: (name, claimed == name))


def _metric(metrics: MetricRecord | None, name: str) -> float | None:
    value = None if metrics is None else metrics.get(name)
    return float(value) if isinstance(value, int | float) else None


def _seconds(exchanges: Iterable[Exchange]) -> float:
    return sum(exchange.seconds for exchange in exchanges)


def _steps(exchanges: Iterable[Exchange]) -> int | None:
    """Optimiser steps of all clients and stages; None where a client does not tell."""
    counts = [exchange.local_steps for exchange in exchanges]
    return None if None in counts else sum(n for n in counts if n is not None)


def _count(arrays: ArrayRecord) -> int:
    """Numbers in the model as it travels, buffers included."""
    total = 0
    for array in arrays.values():
        size = 1
        for length in array.shape:
            size *= length
        total += size
    return total
