"""fedmerge: federated learning in which the merge is the subject.

Merge client models with :func:`merge`, list what there is with :func:`methods`, compare methods on a
federation with ``fedmerge compare``, and deploy one with :mod:`fedmerge.strategies`.
"""

from fedmerge.api import MethodInfo, merge, methods
from fedmerge.errors import (
    BadUpdate,
    CannotStack,
    ClientFailed,
    ConfigError,
    DataError,
    FedMergeError,
    InjectedFault,
    InvalidOption,
    MissingStatistic,
    ModelError,
    NoAnswer,
    NoUsableUpdates,
    PartitionError,
    RecordError,
    UnknownName,
    WriteError,
)
from fedmerge.statistics import compute_statistics
from fedmerge.update import ClientUpdate, MergeContext

__version__ = "0.1.0"

__all__ = [
    "BadUpdate",
    "CannotStack",
    "ClientFailed",
    "ClientUpdate",
    "ConfigError",
    "DataError",
    "FedMergeError",
    "InjectedFault",
    "InvalidOption",
    "MergeContext",
    "MethodInfo",
    "MissingStatistic",
    "ModelError",
    "NoAnswer",
    "NoUsableUpdates",
    "PartitionError",
    "RecordError",
    "UnknownName",
    "WriteError",
    "compute_statistics",
    "merge",
    "methods",
]
