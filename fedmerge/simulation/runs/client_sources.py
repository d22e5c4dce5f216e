"""Where clients of an experiment get their examples: settings that travel to workers, and the data they stand for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fedmerge.data import ClientData, Dataset, Examples, Partition, PartitionSettings, load_dataset, make_partition
from fedmerge.data.domain_kinds import Domain
from fedmerge.data.domains import domains_of_tests, in_domains, make_domains
from fedmerge.data.withheld import withheld_rows
from fedmerge.errors import ConfigError
from fedmerge.records.model_tensors import read_metadata
from fedmerge.seeding import integer_seed

__all__ = ["DataFn", "DataSource", "LoadedDataFn"]


@dataclass(frozen=True)
class DataSource:
    """What it takes to make the data of an experiment anew, in whichever process.

    Parameters
    ----------
    name, folder, options
        The data set, where it lies, and its options as JSON.
    division
        How it is divided.
    seed
        Of the division, and of what is drawn in domains.
    base
        File of the pretrained base, whose examples no client gets; empty where nothing is withheld.
    domains
        Domains of the clients, as they are written.
    """

    name: str
    folder: Path | None
    options: str
    division: PartitionSettings
    seed: int
    base: str = ""
    domains: tuple[str, ...] = ()

    @property
    def dataset(self) -> Dataset:
        """The data set, loaded once in a process; of its test set each domain has its share."""
        return _dataset(self.name, self.folder, self.options, self.domains, self.seed)

    @property
    def partition(self) -> Partition:
        """Who holds which training examples."""
        return _partition(self)


# One entry each: a process works on one experiment at a time, and data sets are large.
@lru_cache(maxsize=1)
def _loaded(name: str, folder: Path | None, options: str) -> Dataset:
    return load_dataset(name, folder, **json.loads(options))


@lru_cache(maxsize=1)
def _dataset(name: str, folder: Path | None, options: str, domains: tuple[str, ...], seed: int) -> Dataset:
    whole, made = _loaded(name, folder, options), make_domains(domains)
    if not made:
        return whole
    which = domains_of_tests(len(whole.test), len(made), seed)
    return whole.tested_on(in_domains(whole.test, made, which, torch.arange(len(which)), seed, "test"))


@lru_cache(maxsize=1)
def _partition(source: DataSource) -> Partition:
    dataset = source.dataset
    withheld = withheld_rows(read_metadata(Path(source.base)), dataset, source.base) if source.base else None
    return make_partition(dataset, source.division, integer_seed(source.seed, "partition"), withheld)


@dataclass(frozen=True)
class DataFn:
    """Gives a client its examples; travels to workers as settings, not as tensors."""

    source: DataSource

    def __call__(self, partition_id: int, num_partitions: int) -> ClientData:
        """The examples of one client."""
        return self.loaded()(partition_id, num_partitions)

    def loaded(self) -> LoadedDataFn:
        """The same with the data in it."""
        source = self.source
        return LoadedDataFn(source.dataset, source.partition, make_domains(source.domains), source.seed)


@dataclass(frozen=True, eq=False)
class LoadedDataFn:
    """Gives a client its examples, in processes that share memory."""

    dataset: Dataset
    partition: Partition
    domains: tuple[Domain, ...] = ()
    seed: int = 0

    def __call__(self, partition_id: int, num_partitions: int) -> ClientData:
        """The examples of one client."""
        known = len(self.partition.train)
        if num_partitions != known:
            raise ConfigError(
                f"the federation has {num_partitions} nodes, the partition {known} clients: make them equal"
            )
        own = self.partition.client_data(self.dataset, partition_id)
        if not self.domains:
            return own
        train = self._in_domain(own.train, self.partition.train[partition_id], partition_id)
        return ClientData(
            train=train, held_out=self._in_domain(own.held_out, self.partition.held_out[partition_id], partition_id)
        )

    def _in_domain(self, examples: Examples, rows: Tensor, client: int) -> Examples:
        domain = self.domains[client % len(self.domains)]
        return in_domains(examples, (domain,), torch.zeros_like(rows), rows, self.seed, "train")
