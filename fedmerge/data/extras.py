"""Import the libraries that only simulations need, at the moment they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from fedmerge.data.global_rng import untouched_global_rng
from fedmerge.errors import DataError

__all__ = ["need"]


def need(module: str, purpose: str) -> Any:
    """Import `module`, which `purpose` needs.

    Raises
    ------
    DataError
        Where it is not installed.

    Examples
    --------
    >>> need("json", purpose="an example").loads("[1]")
    [1]
    """
    try:
        # Some of these libraries draw from the global generators as they are imported.
        with untouched_global_rng():
            return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f'{purpose} needs {module.partition(".")[0]} ({error}). Install it: pip install "fedmerge[sim]".'
        ) from error
