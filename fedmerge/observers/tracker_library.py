"""Libraries that only some observers need."""

from __future__ import annotations

import importlib
from typing import Any

from fedmerge.data.global_rng import untouched_global_rng
from fedmerge.errors import MissingExtra

__all__ = ["need"]


def need(module: str, extra: str) -> Any:
    """Import a library that an extra of fedmerge brings.

    Raises
    ------
    MissingExtra
        It is not installed, or cannot be imported.

    Examples
    --------
    >>> need("json", "none").loads("[1]")
    [1]
    """
    try:
        with untouched_global_rng():
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"observer {extra!r}", extra, str(error)) from error
