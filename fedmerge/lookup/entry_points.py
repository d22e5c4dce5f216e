"""Parts that other installed packages announce: a package that is broken costs a warning, and nothing else."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from typing import Any

from fedmerge.lookup.kinds import Kind

__all__ = ["load_entry_points"]

log = logging.getLogger("fedmerge")


def load_entry_points(
    kind: Kind, announce: Callable[[Kind, str, Any], None], known: Mapping[Any, Any], forget: Callable[[Any], None]
) -> None:
    """Load the entry points of a kind's group.

    Each names a module that registers by decorators, or a class or function, which gets the entry point's name. One
    that cannot be loaded, or asks for a name that is taken, is left out whole.

    Parameters
    ----------
    kind
        What they are.
    announce
        Called with the kind, the entry point's name and what it names.
    known
        Everything registered so far.
    forget
        Called with what was registered before a package that failed half-way.
    """
    for point in importlib.metadata.entry_points(group=kind.group):
        before = dict(known)
        try:
            announce(kind, point.name, point.load())
        except (Exception, SystemExit) as error:  # somebody else's module may do anything while it is imported
            forget(before)
            package = "an unknown package" if point.dist is None else f"package {point.dist.name!r}"
            log.warning(
                "%s: its entry point %r (%s) of group %r cannot be used, and is left out: %s: %s",
                package, point.name, point.value, kind.group, type(error).__name__, error,
            )  # fmt: skip
