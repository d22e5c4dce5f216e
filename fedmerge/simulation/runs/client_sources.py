"""Where clients of an experiment get their examples: settings that travel to workers, and the data they stand for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedmerge.data import ClientData, Dataset, Partition, PartitionSettings, load_dataset, make_partition
from fedmerge.errors import ConfigError
from fedmerge.seeding import integer_seed

__all__ = ["DataFn", "DataSource", "LoadedDataFn"]


@dataclass(frozen=True)
class DataSource:
    """What it takes to make the data of an experiment anew, in whichever process."""

    name: str
    folder: Path | None
    options: str
    division: PartitionSettings
    seed: int

    @property
    def dataset(self) -> Dataset:
        """The data set, loaded once in a process."""
        return _dataset(self.name, self.folder, self.options)

    @property
    def partition(self) -> Partition:
        """Who holds which training examples."""
        return _partition(self)


# One entry each: a process works on one experiment at a time, and data sets are large.
@lru_cache(maxsize=1)
def _dataset(name: str, folder: Path | None, options: str) -> Dataset:
    return load_dataset(name, folder, **json.loads(options))


@lru_cache(maxsize=1)
def _partition(source: DataSource) -> Partition:
    return make_partition(source.dataset, source.division, integer_seed(source.seed, "partition"))


@dataclass(frozen=True)
class DataFn:
    """Gives a client its examples; travels to workers as settings, not as tensors."""

    source: DataSource

    def __call__(self, partition_id: int, num_partitions: int) -> ClientData:
        """The examples of one client."""
        return self.loaded()(partition_id, num_partitions)

    def loaded(self) -> LoadedDataFn:
        """The same with the data in it."""
        return LoadedDataFn(self.source.dataset, self.source.partition)


@dataclass(frozen=True, eq=False)
class LoadedDataFn:
    """Gives a client its examples, in processes that share memory."""

    dataset: Dataset
    partition: Partition

    def __call__(self, partition_id: int, num_partitions: int) -> ClientData:
        """The examples of one client."""
        known = len(self.partition.train)
        if num_partitions != known:
            raise ConfigError(
                f"the federation has {num_partitions} nodes, the partition {known} clients: make them equal"
            )
        return self.partition.client_data(self.dataset, partition_id)
