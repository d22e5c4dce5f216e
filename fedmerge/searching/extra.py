"""Libraries that only searches need."""

from __future__ import annotations

import importlib
from typing import Any

from fedmerge.errors import MissingExtra

__all__ = ["imported"]


def imported(library: str, who: str) -> Any:
    """The library that a method searches with.

    Raises
    ------
    MissingExtra
        It is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingExtra(who, "search", str(error)) from error
