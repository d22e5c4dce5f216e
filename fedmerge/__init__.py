"""fedmerge: federated learning in which the merge is the subject.

Merge client models with :func:`merge`, list what there is with :func:`methods`, compare methods on a
federation with ``fedmerge compare``, and deploy one with :mod:`fedmerge.strategies`.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from fedmerge.lookup.moved_modules import install
from fedmerge.plain_text import CleanLines

if TYPE_CHECKING:
    from fedmerge.api import MethodInfo, methods, personal_models
    from fedmerge.errors import (
        AdapterError,
        BadArgument,
        BadStatistic,
        BadUpdate,
        CannotMatch,
        CannotStack,
        ClientFailed,
        ConfigError,
        DataError,
        FedMergeError,
        FolderInUse,
        InjectedFault,
        InvalidOption,
        MissingExtra,
        MissingStatistic,
        ModelError,
        NoAnswer,
        NothingMerged,
        NoUsableUpdates,
        ObserverFailed,
        PartitionError,
        RecordError,
        TaskError,
        UnknownName,
        WorkersUnavailable,
        WriteError,
    )
    from fedmerge.update import ClientUpdate, MergeContext

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "BadArgument",
    "BadStatistic",
    "BadUpdate",
    "CannotMatch",
    "CannotStack",
    "ClientFailed",
    "ClientUpdate",
    "ConfigError",
    "DataError",
    "FedMergeError",
    "FolderInUse",
    "InjectedFault",
    "InvalidOption",
    "MergeContext",
    "MethodInfo",
    "MissingExtra",
    "MissingStatistic",
    "ModelError",
    "NoAnswer",
    "NoUsableUpdates",
    "NothingMerged",
    "ObserverFailed",
    "PartitionError",
    "RecordError",
    "TaskError",
    "UnknownName",
    "WorkersUnavailable",
    "WriteError",
    "compute_statistics",
    "joined_labels",
    "merge",
    "methods",
    "personal_models",
    "with_part",
]

# Warnings quote what clients, replies and files say, in deployments as well, where others show them.
logging.getLogger("fedmerge").addFilter(CleanLines())
install()

_HOMES = {
    "MethodInfo": "api",
    "joined_labels": "api",
    "merge": "api",
    "methods": "api",
    "with_part": "api",
    "compute_statistics": "api",
    "personal_models": "api",
    "ClientUpdate": "update",
    "MergeContext": "update",
}
_MODULES = (
    *("data", "errors", "merging", "models", "observers", "permutations", "plotting"),
    *("simulation", "statistics", "strategies", "tasks", "training"),
)


def __getattr__(name: str) -> Any:
    """What is asked for is imported then: ``fedmerge --help`` must not wait for torch."""
    if name in _MODULES:
        return importlib.import_module(f"fedmerge.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'fedmerge' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fedmerge.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Everything public, imported or not."""
    return sorted({*globals(), *__all__, *_MODULES})
