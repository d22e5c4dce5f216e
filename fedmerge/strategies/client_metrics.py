"""Which of the clients' metrics can be averaged: those of the form that most of them have."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict

from fedmerge.registry import build, entries
from fedmerge.tasks import Task
from fedmerge.wire.flower_records import weight_of
from fedmerge.wire.metric_sums import add_up, without_sums

__all__ = ["alike", "figures_of", "judged", "worst_tenth"]

log = logging.getLogger("fedmerge")

_LARGEST_INTEGER = 2**63


def figures_of(messages: Sequence[Message], task: Task | None) -> dict[str, float]:
    """Every metric of the clients' task by ``eval_<name>``, of the sums of all these replies, which are taken out.

    Of a task that nobody has told the server, the registered metrics are known.
    """
    records = [record for message in messages for record in message.content.metric_records.values()]
    sums = add_up(records)
    for message in messages:
        for key, record in list(message.content.metric_records.items()):
            message.content[key] = without_sums(record)
    known = {metric.name: metric for metric in (() if task is None else task.measured)}
    found: dict[str, float] = {}
    for name, total in sums.items():
        metric = known.get(name) or (build("metric", name, {}) if name in entries("metric") else None)
        try:
            value = math.nan if metric is None else float(metric.value(total))
        except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
            log.warning("the clients' metric %r cannot be read: %s", name, error)
            value = math.nan
        if math.isfinite(value):
            found[f"eval_{name}"] = value
    return found


def alike(contents: Sequence[RecordDict]) -> list[RecordDict]:
    """The replies whose metrics have the same names and kinds as most replies'; a warning counts the others.

    Flower's mean over clients fails, or counts a name for too few, where one client reports something else; and one
    client's NaN would be everybody's. Where nobody reports finite numbers, theirs are what there is.

    Examples
    --------
    >>> from flwr.app import MetricRecord
    >>> told = [{"loss": 0.5}, {"loss": 0.4}, {"loss": [0.1, 0.2]}]
    >>> len(alike([RecordDict({"metrics": MetricRecord(one)}) for one in told]))
    2
    """
    forms = [_form(content) for content in contents]
    finite = [form if _finite(content) else None for form, content in zip(forms, contents, strict=True)]
    forms = finite if any(form is not None for form in finite) else forms
    known = Counter(form for form in forms if form is not None)
    if not known:
        return []
    usual = known.most_common(1)[0][0]
    found = [content for content, form in zip(contents, forms, strict=True) if form == usual]
    if len(found) < len(forms):
        log.warning("metrics of %d of %d clients are left out: they are not those of the rest",
                    len(forms) - len(found), len(forms))  # fmt: skip
    return found


def _form(content: RecordDict) -> tuple[tuple[str, int], ...] | None:
    """Record, name and length (-1 for a number) of every metric; None where one is no number to calculate with."""
    form = []
    for record, metrics in content.metric_records.items():
        for key, value in metrics.items():
            values = value if isinstance(value, list) else [value]
            if any(isinstance(number, int) and abs(number) > _LARGEST_INTEGER for number in values):
                return None
            form.append((f"{record}/{key}", len(value) if isinstance(value, list) else -1))
    return tuple(sorted(form))


def _finite(content: RecordDict) -> bool:
    """Whether all numbers among the metrics are finite."""
    told = (value for metrics in content.metric_records.values() for value in metrics.values())
    numbers = (number for value in told for number in (value if isinstance(value, list) else [value]))
    return all(not isinstance(number, float) or math.isfinite(number) for number in numbers)


def judged(replies: Iterable[Message], weight_key: str) -> list[Message]:
    """Replies to an evaluation that Flower can average, without those with an error.

    Clients that hold out no examples do not count; those that do not tell how many are named in a warning.
    """
    counted = []
    for message in replies:
        if message.has_error():
            continue
        weight = weight_of(message.content, weight_key)
        if weight == 0:
            continue
        if weight is None or not weight > 0 or math.isinf(weight) or len(message.content.metric_records) != 1:
            log.warning("node %s: its evaluation has no usable %r", message.metadata.src_node_id, weight_key)
            continue
        counted.append(message)
    kept = {id(content) for content in alike([message.content for message in counted])}
    return [message for message in counted if id(message.content) in kept]


def worst_tenth(replies: Iterable[Message], metric: str) -> float | None:
    """Mean of a metric among the tenth of the clients that has the lowest, one at least; None where nobody tells it.

    Examples
    --------
    >>> worst_tenth([], "eval_acc") is None
    True
    """
    told = [record.get(metric) for reply in replies for record in reply.content.metric_records.values()]
    values = sorted(float(value) for value in told if isinstance(value, int | float) and math.isfinite(value))
    lowest = values[: max(1, len(values) // 10)]
    return sum(lowest) / len(lowest) if lowest else None
