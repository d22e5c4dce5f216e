"""Flower strategies, and the Flower ClientApp that answers them."""

from fedmerge.strategies.client_app import client_app
from fedmerge.strategies.merge_strategy import MergeReport, MergeStrategy
from fedmerge.strategies.named import FedAtt, FedAvg, FedNova
from fedmerge.strategies.wire import from_arrays, to_arrays

__all__ = ["FedAtt", "FedAvg", "FedNova", "MergeReport", "MergeStrategy", "client_app", "from_arrays", "to_arrays"]
