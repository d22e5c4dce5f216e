"""Between Flower's records and our tensors: no mathematics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedmerge.errors import BadUpdate, shown
from fedmerge.state import State
from fedmerge.statistics import tellable
from fedmerge.update import ClientUpdate
from fedmerge.wire.record_values import STATISTIC, view_arrays

__all__ = [
    "CLIENT_KEY",
    "MOST_PARTITIONS",
    "PARTITION_KEY",
    "RULE_RECORD",
    "STEPS_KEY",
    "WITHHOLD_KEY",
    "Decoded",
    "claimed_partition",
    "decode_update",
    "partition_of",
    "statistics_from_reply",
    "told_in",
    "weight_of",
]

CLIENT_KEY = "client"
"""Record of a reply that tells who sent it."""
PARTITION_KEY = "partition-id"
WITHHOLD_KEY = "withhold-metrics"
"""Entry of a train message's ConfigRecord: the client keeps its training loss to itself."""
MOST_PARTITIONS = 2**31
"""More than any federation has: larger numbers are nobody's partition."""
RULE_RECORD = "local-rule"
"""Record of a train message: the tensors of the method's local rule, by the names of parameters."""
STEPS_KEY = "local-steps"
"""Metric of a reply to a train message: the optimiser steps that the client took."""
_MOST_EXAMPLES = 2**53  # beyond it a float does not count on


def statistics_from_reply(content: RecordDict, metrics: MetricRecord | None) -> dict[str, State]:
    """The statistics of a reply, as they were sent: whoever knows the model brings them back into their form.

    A client may also report numbers such as ``local_steps`` and ``momentum``, or a list ``class_counts``, among its
    metrics: each metric name offers the whole record under that name, for the statistic to pick what it knows. Where a
    name is written with ``-``, as is usual in Flower, that goes for it written with ``_`` as well.
    """
    statistics: dict[str, State] = {}
    if metrics is not None:
        numbers = {k: _numbers(v) for k, v in metrics.items()}
        numbers = {**{k.replace("-", "_"): v for k, v in numbers.items()}, **numbers}
        statistics.update(dict.fromkeys(numbers, numbers))
    for key, record in content.array_records.items():
        if key.startswith(STATISTIC):
            statistics[key[len(STATISTIC) :]] = view_arrays(record)
    return statistics


def told_in(content: RecordDict, *, hyphens: bool) -> set[str]:
    """Names of the statistics that a reply holds already, among its metrics with ``-`` for ``_`` too if `hyphens`."""
    statistics = {key[len(STATISTIC) :] for key in content.array_records if key.startswith(STATISTIC)}
    metrics = list(next(iter(content.metric_records.values()), {}))
    names = [*metrics, *(name.replace("-", "_") for name in metrics if hyphens)]
    return statistics | {name for name in names if tellable(name)}


def partition_of(reply: Message) -> int | None:
    """The partition that the sender of a reply names, if it names one that can be."""
    claim = _claim(reply)
    whole = isinstance(claim, int) and not isinstance(claim, bool)
    return claim if whole and 0 <= claim < MOST_PARTITIONS else None


def claimed_partition(reply: Message) -> str | None:
    """Whatever the sender of a reply gives for its partition, as an error can quote it; None for nothing."""
    claim = _claim(reply)
    return None if claim is None else shown(claim, 40)


def _claim(reply: Message) -> Any:
    records = reply.content.config_records if reply.has_content() else {}
    return records.get(CLIENT_KEY, ConfigRecord()).get(PARTITION_KEY)


def weight_of(content: RecordDict, key: str) -> float | None:
    """The number of examples that a reply's metrics name, if they do and it can be one."""
    metrics = next(iter(content.metric_records.values()), None)
    weight = None if metrics is None else metrics.get(key)
    return float(weight) if isinstance(weight, int | float) and not abs(weight) > _MOST_EXAMPLES else None


def _numbers(value: float | list[int] | list[float]) -> Tensor:
    try:
        return torch.tensor(value, dtype=torch.float64)
    except (OverflowError, RuntimeError):  # torch knows no whole numbers beyond 64 bits
        return torch.full((len(value),) if isinstance(value, list) else (), math.inf, dtype=torch.float64)


def decode_update(client: int, content: RecordDict, arrays_key: str, weight_key: str) -> ClientUpdate:
    """Decode one reply: what a stock Flower ClientApp sends is enough, statistics come on top.

    Raises
    ------
    BadUpdate
        The reply has no model or no weight.
    """
    arrays = content.array_records.get(arrays_key)
    if arrays is None:
        models = [record for key, record in content.array_records.items() if not key.startswith(STATISTIC)]
        if len(models) != 1:
            raise BadUpdate(
                client,
                f"its reply has {len(models)} candidates for the model and none is called {arrays_key!r}",
                f'Reply with RecordDict({{"{arrays_key}": ArrayRecord(...), ...}}).',
            )
        arrays = models[0]
    metrics = next(iter(content.metric_records.values()), None)
    weight = weight_of(content, weight_key)
    if weight is None:
        raise BadUpdate(
            client,
            f"its reply has no single number {weight_key!r} up to 2**53 among its metrics",
            f'Reply with a MetricRecord({{"{weight_key}": number of examples}}).',
        )
    try:
        return ClientUpdate(client, view_arrays(arrays), weight, statistics_from_reply(content, metrics))
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadUpdate(client, f"its arrays cannot be decoded ({error})", "Send NumPy arrays of numbers.") from error


class Decoded:
    """Replies in client order, decoded one at a time whenever they are read: a fold never holds more than one.

    Those of `refused`, of which nobody knows whose they are, come first.
    """

    def __init__(
        self,
        replies: Sequence[tuple[int, Message]],
        arrays_key: str,
        weight_key: str,
        refused: Sequence[BadUpdate] = (),
    ) -> None:
        self._replies, self._keys, self._refused = replies, (arrays_key, weight_key), refused

    def __iter__(self) -> Iterator[ClientUpdate | BadUpdate]:
        """Decode, from the start."""
        yield from self._refused
        for client, message in self._replies:
            try:
                yield decode_update(client, message.content, *self._keys)
            except BadUpdate as bad:
                yield bad
