"""The functions that ``import fedmerge`` offers: merge models at hand, list the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.offline.compute import compute_statistics
from fedmerge.offline.left_out import with_part
from fedmerge.offline.merge import merge
from fedmerge.offline.personal_models import personal_models
from fedmerge.offline.rows import joined_labels
from fedmerge.registry import Entry, build, entries

__all__ = ["MethodInfo", "compute_statistics", "joined_labels", "merge", "methods", "personal_models", "with_part"]


@dataclass(frozen=True)
class MethodInfo:
    """What there is to know about a method before using it.

    Parameters
    ----------
    name, summary, paper
        How it is called, what it does in a line, where it comes from.
    needs
        Statistics that clients send besides their model, under the default options.
    options
        Hyper-parameters with their defaults.
    requires_base, requires_data, may_change_width
        Whether it needs the common initial model, needs data on the server, may return another width.
    """

    name: str
    summary: str
    paper: str
    needs: tuple[str, ...]
    options: Mapping[str, Any]
    requires_base: bool
    requires_data: bool
    may_change_width: bool


def methods() -> Mapping[str, MethodInfo]:
    """Every registered method by name, those of other installed packages included.

    Examples
    --------
    >>> methods()["fednova"].needs
    ('local_steps',)
    """
    return {name: _info(entry) for name, entry in entries("aggregator").items()}


def _info(entry: Entry) -> MethodInfo:
    cls: Any = entry.cls
    default: Aggregator = build("aggregator", entry.name, {})
    return MethodInfo(
        name=entry.name,
        summary=entry.summary,
        paper=entry.paper,
        needs=tuple(need.name for need in default.needs),
        options=entry.options,
        requires_base=cls.requires_base,
        requires_data=cls.requires_data,
        may_change_width=cls.may_change_width,
    )
