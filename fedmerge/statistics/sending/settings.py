"""What clients are asked to measure, as it is set in a configuration and written into a message."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.registry import entries, registered
from fedmerge.state import State
from fedmerge.statistics.layer_statistic import LayerStatistic
from fedmerge.statistics.sending.compression import Compression, encode, state_bytes
from fedmerge.statistics.statistic_type import Statistic

__all__ = ["StatisticsSettings", "compressed", "statistic", "tellable", "to_settings"]


@dataclass(frozen=True)
class StatisticsSettings:
    """How clients measure and send what an aggregator needs.

    Parameters
    ----------
    examples
        At most so many examples per client; all where not given.
    layers
        Patterns of parameter names, such as ``"fc*"``; what is not measured is averaged. All where not given.
    compression
        See :func:`~fedmerge.statistics.sending.compression.encode`.
    budget
        Bytes of all statistics together, in units of the model's size in float32: 1 keeps an upload at twice
        the model. A larger one allows more; ``compression="none"`` heeds none.

    Raises
    ------
    InvalidOption
        A value out of range.
    """

    examples: int | None = None
    layers: tuple[str, ...] | None = None
    compression: Compression = "auto"
    budget: float = 1.0

    def __post_init__(self) -> None:
        if self.examples is not None and self.examples < 1:
            raise InvalidOption(f"statistics: examples must be at least 1, got {self.examples}")
        if self.compression not in get_args(Compression):
            raise InvalidOption(f"statistics: compression must be of {get_args(Compression)}, got {self.compression!r}")
        if not self.budget > 0:
            raise InvalidOption(f"statistics: budget must be positive, got {self.budget!r}")

    def applied(self, statistic: Statistic) -> Statistic:
        """`statistic` with these restrictions, where it has none of its own."""
        if not isinstance(statistic, LayerStatistic):
            return statistic
        return dataclasses.replace(
            statistic, examples=statistic.examples or self.examples, layers=statistic.layers or self.layers
        )


def to_settings(statistic: Statistic) -> str:
    """The fields of a statistic that are not at their defaults, as JSON."""
    default = type(statistic)()
    names = [field.name for field in dataclasses.fields(statistic) if field.name != "task"]  # type: ignore[arg-type]
    return json.dumps({n: getattr(statistic, n) for n in names if getattr(statistic, n) != getattr(default, n)})


def statistic(name: str, settings: str = "{}") -> Statistic:
    """The statistic called `name`, with the fields that `settings` (JSON) sets and defaults for the rest.

    Raises
    ------
    UnknownName
        There is none of that name.
    InvalidOption
        Settings that it does not have.

    Examples
    --------
    >>> statistic("gram", '{"examples": 100}').examples
    100
    """
    entry = registered("statistic", name)  # what others send names no module to import
    if entry is None:
        raise UnknownName("statistic", name, entries("statistic"))
    try:
        fields = json.loads(settings)
        if "loss" in fields or "task" in fields:
            raise TypeError("a loss is a function, which cannot be written")
        made: Statistic = entry.cls(**fields)
        return made
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidOption(f"statistic {name!r}: cannot read its settings {settings!r} ({error})") from error


def tellable(name: str) -> bool:
    """Whether `name` is a statistic that a client may report among its metrics.

    Examples
    --------
    >>> tellable("local_steps"), tellable("gram"), tellable("train_loss")
    (True, False, False)
    """
    entry = registered("statistic", name)
    return entry is not None and bool(entry.cls.among_metrics)


def compressed(
    values: Sequence[tuple[str, State]], model: State, compression: Compression, budget: float
) -> tuple[dict[str, dict[str, Tensor]], float]:
    """Encode all statistics of a client within one budget; also the largest error among them.

    Examples
    --------
    >>> import torch
    >>> sent, error = compressed([("gram", {"w": torch.eye(8)})], {"w": torch.zeros(8, 8)}, "auto", 1.0)
    >>> error
    0.0
    """
    left = budget * 4 * sum(tensor.numel() for tensor in model.values())
    waiting = sum(state_bytes(value) for _, value in values)
    sent, worst = {}, 0.0
    for name, value in values:
        # Each has its share by size of what is left, so that none starves the next.
        size = state_bytes(value)
        sent[name], error = encode(value, compression, int(left * size / waiting) if size else 0)
        left, waiting = left - state_bytes(sent[name]), waiting - size
        worst = max(worst, error)
    return sent, worst
