"""Flower strategies, and the Flower ClientApp that answers them."""

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
from fedmerge.strategies.named import GAMF, PFNM, FedAtt, FedAvg, FedFisher, FedMA, FedNova, OTFusion
from fedmerge.strategies.observed import start_watched
from fedmerge.strategies.run_settings import RunSettings
from fedmerge.wire.flower_records import from_arrays, to_arrays

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
