"""Turns each round of any Flower strategy into one row, and hands it to the observers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedmerge.errors import NothingMerged
from fedmerge.observers import Watch
from fedmerge.plain_text import cut_within
from fedmerge.simulation.grids.exchanges import Exchange, MeasuredGrid
from fedmerge.simulation.grids.faulty_grid import FaultyGrid
from fedmerge.simulation.grids.policed_grid import PolicedGrid, client_of
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.simulation.runs.global_judge import Judge
from fedmerge.simulation.runs.references import reference_accuracies
from fedmerge.strategies import MergeStrategy
from fedmerge.strategies.merge_report import MergeReport
from fedmerge.wire.keys import ERROR_KEY
from fedmerge.wire.record_values import view_arrays

__all__ = ["Recorder"]

Row = dict[str, Any]


class Recorder:
    """Serves as ``evaluate_fn`` of ``Strategy.start``: tests the model, makes the row, tells the observers.

    Parameters
    ----------
    method, experiment, strategy
        What runs.
    grid
        Keeps account of exchanges.
    policed
        The grid around it, which the strategy is given.
    watch
        Who is told.
    before
        Rows of rounds that were done before.
    model
        The global model that the run begins or goes on with.
    faulty
        The grid that loses replies, where there is one.
    """

    def __init__(
        self,
        method: str,
        experiment: Experiment,
        strategy: Strategy,
        *,
        grid: MeasuredGrid,
        policed: PolicedGrid,
        watch: Watch,
        before: Iterable[Mapping[str, Any]],
        model: ArrayRecord,
        faulty: FaultyGrid | None = None,
    ) -> None:
        self._method, self._experiment, self._strategy = method, experiment, strategy
        self._judge = Judge(experiment)
        self._grid, self._policed, self._faulty, self._watch = grid, policed, faulty, watch
        self._merged, self._last_skipped, self._model = False, "", model
        for row in before:  # what was merged before an interruption counts
            self._count(row)

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Tell of round `server_round`, which ended with the global model `arrays`.

        Raises
        ------
        RunStopped, ObserverFailed, RecordError
            As :meth:`~fedmerge.observers.Watch.round_done`.
        """
        started = time.perf_counter()
        exchanges = self._grid.take()
        loss, accuracy, figures = self._tested(server_round, arrays, exchanges)
        by_domain = self._judge.domain_accuracies(arrays, self._served)
        success = self._judge.attack_success(arrays, self._served)
        evaluating = time.perf_counter() - started
        still = self._strategy.travel.still if isinstance(self._strategy, MergeStrategy) else frozenset[str]()
        unchanged = server_round > 0 and arrays is self._model
        row: Row = {
            "method": self._method,
            "seed": self._experiment.seed,
            "round": server_round,
            "test_loss": loss,
            "test_accuracy": accuracy,
            **{f"test_{name}": value for name, value in figures.items()},
            **({"accuracy_by_domain": by_domain} if by_domain else {}),
            **self._clients(server_round, exchanges, unchanged),
            **_costs(exchanges, started, evaluating, self._bytes_personal(server_round)),
            "parameters": _count(arrays, still),
            # In the first round all methods have the same client models.
            "references": self._references() if server_round == 1 and self._experiment.config.references else {},
        }
        if self._experiment.hostile is not None:
            row |= {"attackers": sorted(self._experiment.hostile.attackers), "attack_success": success}
        if self._faulty is not None:
            row["waited_for"] = self._faulty.take_waited_for()
        row, self._model = cut_within(row), arrays  # reasons are as long as clients want
        self._count(row)
        self._policed.next_round()
        self._watch.round_done(row, view_arrays(arrays))
        return MetricRecord({n: x for n, x in (("test_loss", loss), ("test_accuracy", accuracy)) if x is not None})

    def _tested(
        self, round: int, arrays: ArrayRecord, exchanges: list[Exchange]
    ) -> tuple[float | None, float | None, Mapping[str, float]]:
        """Loss, accuracy and metrics of the global model on the test set; where parts are the clients', loss and
        accuracy of their own models."""
        if not self._experiment.config.personal or round == 0:  # at first all have the same
            found = self._judge.test(arrays, self._served)
            return found.loss, found.accuracy, found.figures
        told = self._metrics(exchanges, None)[1]
        return _number(told, "eval_loss"), _number(told, "eval_acc"), _figures(told)

    def _served(self, model: nn.Module) -> nn.Module:
        """What the global model is used as: a routed one, where the method makes it."""
        return self._strategy.served(model) if isinstance(self._strategy, MergeStrategy) else model

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
            Every round was skipped, or the run was stopped before there was one.
        """
        if not self._merged and (self._last_skipped or self._watch.stopped):
            told = self._last_skipped or f"it was stopped before the first round: {self._watch.stopped}"
            last = "the last one: " if self._last_skipped else ""
            raise NothingMerged(f"{self._method}: no round merged anything, so there is no trained model; {last}{told}")

    def _clients(self, round: int, exchanges: list[Exchange], unchanged: bool) -> Row:
        """What the clients did and told."""
        report = self._strategy.last_report if isinstance(self._strategy, MergeStrategy) else None
        report = report if report is not None and report.round == round else None
        training = [exchange for exchange in exchanges if exchange.kind == "train"]
        failures = [failure for exchange in exchanges for failure in exchange.failures]
        dropped = () if report is None else report.dropped
        # Of the first exchange: further stages are of the same clients.
        ok = sum(exchange.ok for exchange in training[:1]) - len(dropped)
        skipped = self._policed.skipped if report is None else report.skipped
        if skipped is None and training and unchanged and report is None:
            skipped = "the strategy made no model of the replies"
        if skipped is None and training and ok == 0:
            told = [client_of(failure, round) for failure in failures]
            skipped = "all clients failed; the first: " + (
                f"client {told[0].client}: {told[0].reason}" if told else "none replied"
            )
        told_of_training, told_of_test = self._metrics(exchanges, report)
        return {
            "train_loss": _number(told_of_training, "train_loss"),
            "client_accuracy": _number(told_of_test, "eval_acc"),
            **{f"client_{name}": value for name, value in _figures(told_of_test).items()},
            "client_accuracy_worst": self._worst_accuracy(exchanges),
            "clients_ok": ok,
            "clients_failed": sum(len(exchange.failures) for exchange in training) + len(dropped),
            "engine": training[0].engine if training else None,
            "statistics_error": _number(told_of_training, ERROR_KEY),
            "failures": [{"client": f.client, "node": f.node, "reason": f.reason} for f in failures],
            "dropped": [{"client": bad.client, "reason": bad.reason} for bad in dropped],
            "refused": [] if report is None else [{"client": c, "reason": reason} for c, reason in report.refused],
            "skipped": skipped,
            "steps_skipped": [] if report is None else [{"step": s, "reason": why} for s, why in report.steps_skipped],
            # What an accountant of noise on them wants to know, for each client.
            "answers": 0 if report is None else report.answers,
        }

    def _metrics(
        self, exchanges: list[Exchange], report: MergeReport | None
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Means of what clients told of training and of evaluation; a strategy of ours says it itself."""
        if isinstance(self._strategy, MergeStrategy):
            evaluation = self._strategy.last_evaluation if any(e.kind == "evaluate" for e in exchanges) else None
            return ({} if report is None else report.metrics), ({} if evaluation is None else evaluation)
        by_kind = {exchange.kind: exchange.metrics for exchange in reversed(exchanges)}
        return ({} if self._policed.skipped else by_kind.get("train", {})), by_kind.get("evaluate", {})

    def _worst_accuracy(self, exchanges: list[Exchange]) -> float | None:
        """Of the tenth of the clients whose models, or the shared one, serve them worst; strategies of ours tell."""
        asked = any(exchange.kind == "evaluate" for exchange in exchanges)
        return self._strategy.worst_accuracy if asked and isinstance(self._strategy, MergeStrategy) else None

    def _bytes_personal(self, round: int) -> int:
        """What clients are sent to make models of their own; those that the server makes for them to judge are not."""
        report = self._strategy.last_report if isinstance(self._strategy, MergeStrategy) else None
        return report.bytes_personal if report is not None and report.round == round else 0

    def _references(self) -> dict[str, float]:
        return reference_accuracies(self._experiment, self._grid.trained)


def _costs(exchanges: list[Exchange], over: float, evaluating: float, personal: int) -> Row:
    """Bytes, steps and seconds of a round whose training and evaluation by clients were over at `over`."""
    evaluation = [exchange for exchange in exchanges if exchange.kind == "evaluate"]
    training = [exchange for exchange in exchanges if exchange.kind != "evaluate"]
    merging = 0.0
    if training:  # the strategy has merged between the first exchange and what came next, but for what it waited for
        until = evaluation[0].began if evaluation else over
        merging = until - training[0].ended - sum(exchange.seconds for exchange in training[1:])
    counts = [exchange.local_steps for exchange in training if exchange.kind == "train"]
    return {
        # Evaluation can be switched off without changing the result, so its traffic stands apart.
        "bytes_down": sum(exchange.bytes_down for exchange in training) + personal,
        "bytes_up": sum(exchange.bytes_up for exchange in training),
        "bytes_evaluate": sum(exchange.bytes_down + exchange.bytes_up for exchange in evaluation),
        # Of all clients and stages; None where a client does not tell.
        "local_steps": None if None in counts else sum(n for n in counts if n is not None),
        "seconds_train": sum(exchange.seconds for exchange in training),
        "seconds_merge": merging,
        "seconds_evaluate": evaluating + sum(exchange.seconds for exchange in evaluation),
    }


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if isinstance(value, int | float) else None


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The task's metrics of the clients' examples, by name."""
    named = {key.removeprefix("eval_"): key for key in metrics if key.startswith("eval_")}
    figures = {name: _number(metrics, key) for name, key in named.items() if name not in ("loss", "acc")}
    return {name: value for name, value in figures.items() if value is not None}


def _count(arrays: ArrayRecord, still: frozenset[str]) -> int:
    """Numbers in the model as it travels, buffers included."""
    total = 0
    for array in (array for name, array in arrays.items() if name not in still):
        size = 1
        for length in array.shape:
            size *= length
        total += size
    return total
