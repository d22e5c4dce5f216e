"""Data sets, and their division among clients.

Examples
--------
>>> from fedmerge.data import PartitionSettings, load_dataset, make_partition
>>> digits = load_dataset("digits")
>>> partition = make_partition(digits, PartitionSettings("dirichlet", clients=5, alpha=1.0), seed=0)
>>> partition.label_counts(digits.train_y, digits.num_classes).shape
torch.Size([5, 10])
>>> len(partition.client_data(digits, client=0)) == len(partition.train[0])
True
"""

from __future__ import annotations

from fedmerge.data.client_data import ClientData
from fedmerge.data.dataset import Dataset
from fedmerge.data.example_sets import Examples
from fedmerge.data.partition import Partition, make_partition
from fedmerge.data.partition_settings import PartitionSettings
from fedmerge.data.sources import dataset_names, load_dataset, suggested_settings

__all__ = [
    "ClientData",
    "Dataset",
    "Examples",
    "Partition",
    "PartitionSettings",
    "dataset_names",
    "load_dataset",
    "make_partition",
    "suggested_settings",
]
