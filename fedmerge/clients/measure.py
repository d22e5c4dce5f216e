"""The one line by which any Flower ClientApp sends what our strategies ask for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import zip_longest
from typing import get_args

from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from fedmerge.clients.own_parts import unmeasured
from fedmerge.errors import ConfigError
from fedmerge.inputs import OnDeviceOf
from fedmerge.layout import Layout
from fedmerge.state import State
from fedmerge.statistics import Batches, statistic
from fedmerge.statistics.layer_statistic import LayerStatistic
from fedmerge.statistics.sending.compression import Compression
from fedmerge.statistics.sending.settings import compressed
from fedmerge.tasks import Reading, Task, TaskLike, called_as_told, either
from fedmerge.training.report import TrainingReport
from fedmerge.wire.flower_records import told_in
from fedmerge.wire.keys import ERROR_KEY, PERSONAL_KEY
from fedmerge.wire.record_values import statistics_records, strings

__all__ = ["add_statistics", "measured"]


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
    with unmeasured(model, _personal(config, model)):
        sent, error = measured(config, model, batches, report, either(task, loss), told)
    for key, record in statistics_records(sent).items():
        reply[key] = record
    metrics = next(iter(reply.metric_records.values()), None)
    if metrics is not None and error is not None:
        metrics[ERROR_KEY] = error


def _personal(config: ConfigRecord, model: nn.Module) -> Collection[str]:
    """Names of what stays with the client, so that nothing is measured of it."""
    patterns = strings(config, PERSONAL_KEY)
    return Layout.of_module(model, patterns).personal if patterns else ()


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
    if any(isinstance(kind, LayerStatistic) for kind in wanted):
        shown = () if iter(batches) is batches else next((inputs for inputs, _ in placed), None)  # read it only once
        model = model if shown is None else called_as_told(model, task, shown)
    values = [(kind.name, kind.told(reading).measure(model, placed, report)) for kind in wanted]
    sent, error = compressed(values, dict(model.named_parameters()), compression, budget)  # type: ignore[arg-type]
    return sent, error if any(isinstance(kind, LayerStatistic) for kind in wanted) else None
