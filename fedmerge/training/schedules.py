"""Schedules of the learning rate: factors on it, over the rounds of a run or the steps of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from fedmerge.errors import ConfigError, InvalidOption
from fedmerge.lookup.loading import load_named
from fedmerge.lookup.method_names import Part, parse_method
from fedmerge.registry import build, register

__all__ = ["Constant", "Cosine", "Schedule", "Step", "WarmUp", "factor_at", "schedule_of"]


class Schedule(Protocol):
    """A factor on the learning rate at each position."""

    def at(self, position: int, length: int | None) -> float:
        """The factor at `position`, from 0, of `length` positions; None where nobody knows how many there are."""


@register("constant", kind="schedule")
@dataclass(frozen=True)
class Constant:
    """The learning rate as it is."""

    def at(self, position: int, length: int | None) -> float:
        """1."""
        return 1.0


@register("step", kind="schedule")
@dataclass(frozen=True)
class Step:
    """Lower the learning rate again and again: ``factor^(position // every)``.

    Examples
    --------
    >>> [Step(every=2, factor=0.5).at(position, None) for position in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    every: int = 10
    factor: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "every", _whole(self.every), "a whole number of at least 1")
        _check(self, "factor", 0 < self.factor < math.inf, "positive")

    def at(self, position: int, length: int | None) -> float:
        """A power of `factor`."""
        return float(self.factor ** (position // self.every))


@register("cosine", kind="schedule")
@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 down to `floor`: ``floor + (1 - floor) (1 + cos(pi t / T)) / 2`` (arXiv 1608.03983)."""

    floor: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "floor", 0 <= self.floor <= 1, "in [0, 1]")

    def at(self, position: int, length: int | None) -> float:
        """The cosine at ``t = position`` of ``T = length``."""
        if length is None:
            raise InvalidOption(
                "schedule 'cosine' runs from the first round to the last: say how many there are, by "
                "training.total_rounds or total-rounds in the configuration of the train messages"
            )
        passed = min(position / length, 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * passed)) / 2


@register("warmup", kind="schedule")
@dataclass(frozen=True)
class WarmUp:
    """Rise in equal steps over the first `length` positions: ``min(1, (t + 1) / length)``."""

    length: int = 5

    def __post_init__(self) -> None:
        _check(self, "length", _whole(self.length), "a whole number of at least 1")

    def at(self, position: int, length: int | None) -> float:
        """A fraction of `length`, then 1."""
        return min(1.0, (position + 1) / self.length)


@dataclass(frozen=True)
class _Own:
    """Somebody's own function of position and length, imported when it is first asked."""

    name: str
    options: Mapping[str, Any]

    def at(self, position: int, length: int | None) -> float:
        function = load_named(self.name, "schedule", "function", "my_training:my_schedule", ConfigError)
        try:
            return float(function(position, length, **self.options))
        except Exception as error:  # it may raise anything
            raise InvalidOption(
                f"schedule {self.name!r} failed at position {position} of {length}: {type(error).__name__}: {error}"
            ) from error


@lru_cache(maxsize=64)
def schedule_of(text: str) -> tuple[Schedule, ...]:
    """The schedules that a text names; their factors are multiplied.

    Parameters
    ----------
    text
        A name, or several joined by ``+``, options in parentheses: ``"warmup(length=3)+cosine"``. One's own function
        ``schedule(position, length, **options)`` is ``"module:schedule"``; it returns a factor.

    Raises
    ------
    UnknownName
        There is no such schedule, or no such option of it.
    InvalidOption
        An option is out of range.

    Examples
    --------
    >>> schedule_of("warmup(length=3)+cosine")
    (WarmUp(length=3), Cosine(floor=0.0))
    """
    try:
        parts = parse_method(text)
    except InvalidOption as error:
        raise InvalidOption(
            f"cannot read the schedule {text!r}: write it as cosine, step(every=10), or warmup(length=3)+cosine"
        ) from error
    return tuple(_made(part) for part in parts)


def _made(part: Part) -> Schedule:
    if ":" in part.name:
        return _Own(part.name, part.options)
    made: Schedule = build("schedule", part.name, part.options)
    return made


def factor_at(text: str, position: int, length: int | None) -> float:
    """The factor on the learning rate that a schedule gives at one position.

    Raises
    ------
    InvalidOption
        It is not positive and finite, or the schedule has to know the length.
    ConfigError
        A function of one's own cannot be imported.

    Examples
    --------
    >>> factor_at("step(every=2,factor=0.5)", 2, None)
    0.5
    """
    factor = math.prod(schedule.at(position, length) for schedule in schedule_of(text))
    if not 0 < factor < math.inf:
        raise InvalidOption(f"schedule {text!r} gives the factor {factor} at position {position}: want a positive one")
    return factor


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(owner: Any, name: str, valid: bool, want: str) -> None:
    if not valid:
        raise InvalidOption(f"schedule {type(owner).__name__.lower()}: {name} must be {want}")
