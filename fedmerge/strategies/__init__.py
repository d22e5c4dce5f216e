"""Flower strategies, and the Flower ClientApp that answers them.

Every method has a strategy of its own name, ``fedmerge.strategies.FedNova``, ``Rebasin``, ``RegMean`` ...: see
:mod:`fedmerge.strategies.named`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedmerge.clients import add_statistics, client_app
from fedmerge.strategies.flower_names import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)
from fedmerge.strategies.merge_strategy import MergeReport, MergeStrategy
from fedmerge.strategies.observed import start_watched
from fedmerge.strategies.run_settings import RunSettings
from fedmerge.wire.record_values import from_arrays, to_arrays

if TYPE_CHECKING:  # they are made when they are asked for
    from fedmerge.strategies.named import *  # noqa: F403

__all__ = [  # noqa: F405 - types of what is named after methods stand in named.pyi
    "GAMF",
    "PFNM",
    "FedAdagrad",
    "FedAdam",
    "FedAtt",
    "FedAvg",
    "FedAvgM",
    "FedFisher",
    "FedMA",
    "FedMedian",
    "FedNova",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "MergeReport",
    "MergeStrategy",
    "MultiKrum",
    "OTFusion",
    "RunSettings",
    "add_statistics",
    "client_app",
    "from_arrays",
    "start_watched",
    "to_arrays",
]


def __getattr__(name: str) -> Any:
    """A strategy that is named after a method."""
    # Imported here, for its names need all methods; and in this way, for "from ... import named" would ask here again.
    named = importlib.import_module("fedmerge.strategies.named")
    if name.startswith("_") or name not in named.strategy_methods():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(named, name)
