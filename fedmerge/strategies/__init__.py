"""Flower strategies, and the Flower ClientApp that answers them."""

from typing import TYPE_CHECKING, Any

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
from fedmerge.strategies.named import GAMF, PFNM, FedAtt, FedAvg, FedFisher, FedMA, FedNova, OTFusion
from fedmerge.strategies.run_settings import RunSettings
from fedmerge.strategies.watched import start_watched
from fedmerge.strategies.wire import from_arrays, to_arrays

if TYPE_CHECKING:
    from fedmerge.clients import add_statistics, client_app

__all__ = [
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
    """The client side, under the names that it always had here; it stands on this package, so it is imported late."""
    if name in ("add_statistics", "client_app"):
        from fedmerge import clients  # noqa: PLC0415 - see above

        return clients.client_app if name == "client_app" else clients.add_statistics
    raise AttributeError(f"module 'fedmerge.strategies' has no attribute {name!r}")
