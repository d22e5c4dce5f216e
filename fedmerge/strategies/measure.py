"""The one line by which any Flower ClientApp sends what our strategies ask for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import zip_longest
from typing import get_args

from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from fedmerge.errors import ConfigError
from fedmerge.inputs import OnDeviceOf
from fedmerge.pipeline import Pipeline
from fedmerge.state import State
from fedmerge.statistics import Batches, statistic
from fedmerge.statistics.base import LayerStatistic
from fedmerge.statistics.compression import Compression
from fedmerge.statistics.settings import StatisticsSettings, compressed, to_settings
from fedmerge.strategies.stages import KEEP_KEY
from fedmerge.strategies.wire import WITHHOLD_KEY, statistics_records, told_in
from fedmerge.tasks import Reading, Task, TaskLike, either
from fedmerge.training.report import TrainingReport

__all__ = ["ERROR_KEY", "add_statistics", "fill_config", "measured", "request_of", "strings"]

_Entry = str | float | list[str]

ERROR_KEY = "statistics-error"
"""Metric of a reply: the largest relative error that compression made."""


def add_statistics(
    reply: RecordDict,
    message: Message,
    model: nn.Module,
    batches: Batches,
    report: TrainingReport | None = None,
    *,
    task: TaskLike | None = None,
    loss: TaskLike | None = None,
) -> None:
    """Measure what the message asks for and add it to a reply; nothing happens where it asks for nothing.

    The one line that a ClientApp of one's own needs for methods such as FedFisher, after its training::

        add_statistics(reply, message, model, trainloader)

    Parameters
    ----------
    reply
        Gets a record per statistic, but for those that it holds already: in a record, or numbers such as
        ``local_steps`` or a list ``class_counts`` among its metrics.
    message
        The message that is answered: its ConfigRecord names statistics under ``needs``.
    model
        After training; left as it is.
    batches
        Pairs ``(inputs, targets)`` of the client's examples, on the model's device.
    report
        What training did, for ``local_steps``.
    task
        What the model was trained for, for whatever speaks of labels: ``"regression"``, a loss such as
        ``nn.BCEWithLogitsLoss()``, as :func:`fedmerge.compute_statistics` takes it. Read from outputs and targets where
        not given.
    loss
        Another name of `task`.

    Raises
    ------
    TaskError
        The task cannot be known, or the targets are none of it.
    UnknownName, InvalidOption
        A statistic that this version does not know, or that cannot be measured on this model.
    ConfigError
        A configuration that cannot be read.
    """
    config = next(iter(message.content.config_records.values()), ConfigRecord())
    # A report knows the constants of the optimiser besides the steps that "local-steps" tells.
    told = told_in(reply, hyphens=report is None)
    sent, error = measured(config, model, batches, report, either(task, loss), told)
    for key, record in statistics_records(sent).items():
        reply[key] = record
    metrics = next(iter(reply.metric_records.values()), None)
    if metrics is not None and error is not None:
        metrics[ERROR_KEY] = error


def measured(
    config: ConfigRecord,
    model: nn.Module,
    batches: Batches,
    report: TrainingReport | None = None,
    task: Task | None = None,
    told: Collection[str] = (),
) -> tuple[Mapping[str, State], float | None]:
    """What a message's configuration asks for and is not `told` yet, as it is sent, and the error of compression where
    there can be one."""
    names = strings(config, "needs")
    if not names:
        return {}, None
    wanted = [statistic(n, s) for n, s in zip_longest(names, strings(config, "needs-settings"), fillvalue="{}")]
    wanted = [kind for kind in wanted if kind.name not in told]
    compression, budget = config.get("statistics-compression", "auto"), config.get("statistics-budget", 1.0)
    if compression not in get_args(Compression) or not isinstance(budget, int | float):
        raise ConfigError(f"the message asks for compression {compression!r} and budget {budget!r}")
    reading, placed = Reading(task), OnDeviceOf(model, batches)
    values = [(kind.name, kind.told(reading).measure(model, placed, report)) for kind in wanted]
    sent, error = compressed(values, dict(model.named_parameters()), compression, budget)  # type: ignore[arg-type]
    return sent, error if any(isinstance(kind, LayerStatistic) for kind in wanted) else None


def request_of(pipeline: Pipeline) -> dict[str, _Entry]:
    """Entries of a ConfigRecord that ask clients for what a pipeline needs; none where it needs nothing."""
    if not pipeline.needs:
        return {}
    request: dict[str, _Entry] = {"needs": list(pipeline.needs)}
    settings = [to_settings(kind) for kind in pipeline.measured]
    if any(text != "{}" for text in settings):
        request["needs-settings"] = settings
    default = StatisticsSettings()
    if pipeline.sent_as.compression != default.compression:
        request["statistics-compression"] = pipeline.sent_as.compression
    if pipeline.sent_as.budget != default.budget:
        request["statistics-budget"] = pipeline.sent_as.budget
    return request


def fill_config(config: ConfigRecord, pipeline: Pipeline, seed: int, round: int) -> None:
    """Write into the configuration of a round's messages all that clients have to know.

    Raises
    ------
    ConfigError
        It says otherwise about the clients' training than the method does.
    """
    config.setdefault("seed", seed)  # the caller's own, if it set one, is the root of what clients draw
    for name, number in pipeline.aggregator.local_rule.items():
        key = name.replace("_", "-")
        given = {known: config[known] for known in (name, key) if known in config}
        if any(value != number for value in given.values()):
            raise ConfigError(
                f"the training configuration has {given}, the method {type(pipeline.aggregator).__name__} sets "
                f"{key} = {number}: leave one of them out"
            )
        config[key] = number
    config["server-round"] = round
    for key, value in request_of(pipeline).items():
        config[key] = value
    if pipeline.batch_norm == "local":
        config["batch-norm"] = "local"
    if pipeline.privacy.withholds_metrics:
        config[WITHHOLD_KEY] = True
    if pipeline.aggregator.several_exchanges or pipeline.compares:
        config[KEEP_KEY] = True


def strings(config: ConfigRecord, key: str) -> list[str]:
    """An entry that is a list of strings; empty where it is missing.

    Raises
    ------
    ConfigError
        It is something else.
    """
    value = config.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"the message's {key!r} must be a list of strings, got {value!r}")
    return [str(item) for item in value]
