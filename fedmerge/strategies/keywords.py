"""Keywords of a strategy: read, and checked against what it and its method know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedmerge.errors import UnknownName
from fedmerge.method_names import parse_method
from fedmerge.registry import entry
from fedmerge.statistics import StatisticsSettings

__all__ = ["check_keywords", "statistics_settings"]


def statistics_settings(given: StatisticsSettings | Mapping[str, Any] | None) -> StatisticsSettings:
    """Read settings of statistics, be they a mapping.

    Raises
    ------
    UnknownName
        A setting that does not exist.
    """
    if given is None or isinstance(given, StatisticsSettings):
        return given or StatisticsSettings()
    known = [field.name for field in dataclasses.fields(StatisticsSettings)]
    for name in given:
        if name not in known:
            raise UnknownName("setting of statistics", name, known)
    return StatisticsSettings(**given)


def check_keywords(method: str, options: dict[str, Any], strategy: type) -> None:
    """Name the nearest keyword for a misspelt one, be it Flower's or the method's."""
    own = entry("aggregator", parse_method(method)[0].name).options
    flower = vars(strategy)["__init__"].__kwdefaults__ or {}
    for name in options:
        if name not in own:
            raise UnknownName(f"keyword of strategy {method!r}", name, [*own, *flower])
